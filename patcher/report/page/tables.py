"""The numbers of a sweep as tables that a reader can sort."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from patcher.report.page.sortable import Read, Table, TableColumn, TableRow, Value, numeric, table_of
from patcher.report.pictures.reading import number, part_of, place_of, recommended_cell, rows_of
from patcher.report.pictures.wording import ABSENT, fixed, visible_token


def token_of(row: Mapping[str, Any]) -> Value:
    return Value(visible_token(row.get("token", ""), 80))


def _number(key: str, *, digits: int = 3) -> Read:
    return lambda row: numeric(row.get(key), digits=digits)


def _aligned(title: str, key: str, *, signed: bool = False) -> tuple[TableColumn, Read]:
    return TableColumn(title, places=True, signed=signed), _number(key)


def _guard(row: Mapping[str, Any]) -> Value:
    within = row.get("within_guard")
    return Value(ABSENT if within is None else "within" if within else "exceeded")


def _ratio(row: Mapping[str, Any]) -> Value:
    base, steered = number(row.get("base")), number(row.get("steered"))
    return numeric(steered / base if base and steered is not None else None)


_LAYER = (TableColumn("layer"), _number("layer", digits=9))
_COEFFICIENT = (TableColumn("coefficient"), _number("coefficient", digits=6))
_EFFECT = _aligned("effect", "effect", signed=True)
_DAMAGE = (TableColumn("KL, nats a token"), _number("damage"))
_PERPLEXITY = _aligned("perplexity", "perplexity")
_GUARD = (TableColumn("guard", numeric=False), _guard)
_TOKEN = (TableColumn("token", numeric=False), token_of)
_BASE = (TableColumn("base"), _number("base"))
_STEERED = (TableColumn("steered"), _number("steered"))


def controls_table(sweep: Mapping[str, Any]) -> Table | None:
    return table_of(
        "report",
        "On the pairs kept for the report; effects are changes against the base",
        rows_of(sweep, "report"),
        [
            (TableColumn("what", numeric=False), lambda row: Value(str(row.get("name", "")))),
            _LAYER,
            _COEFFICIENT,
            _aligned("value", "value"),
            _EFFECT,
            _aligned("95 % from", "low", signed=True),
            _aligned("to", "high", signed=True),
            _DAMAGE,
            _PERPLEXITY,
            _GUARD,
        ],
        lambda row: row.get("kind") == "recommended",
    )


def grid_table(sweep: Mapping[str, Any]) -> Table | None:
    cell = recommended_cell(sweep)
    front = set(map(place_of, rows_of(sweep, "pareto")))

    def here(row: Mapping[str, Any]) -> bool:
        return cell is not None and place_of(row) == cell

    def mark(row: Mapping[str, Any]) -> Value:
        return Value(", ".join([*["recommended"] * here(row), *["Pareto front"] * (place_of(row) in front)]))

    return table_of(
        "grid",
        "Every cell of the grid, measured on the choosing pairs",
        rows_of(sweep, "grid"),
        [
            _LAYER,
            _COEFFICIENT,
            _EFFECT,
            _aligned("95 % from", "effect_low", signed=True),
            _aligned("to", "effect_high", signed=True),
            _aligned("value", "steered"),
            _DAMAGE,
            _PERPLEXITY,
            _aligned("on-topic perplexity", "on_topic"),
            _aligned("off-topic perplexity", "off_topic"),
            _aligned("norm added", "norm"),
            _aligned("residual norm", "residual_norm"),
            (TableColumn("pairs"), _number("pairs", digits=9)),
            _GUARD,
            (TableColumn("mark", numeric=False), mark),
        ],
        here,
    )


def random_table(sweep: Mapping[str, Any]) -> Table | None:
    return table_of(
        "random",
        "Random vectors of equal norm, mean of their seeds",
        rows_of(sweep, "random_grid"),
        [_LAYER, _COEFFICIENT, _EFFECT, _DAMAGE],
    )


def behaviours_table(sweep: Mapping[str, Any]) -> Table | None:
    def change(row: Mapping[str, Any]) -> Value:
        base, steered = number(row.get("base")), number(row.get("steered"))
        return numeric(None if base is None or steered is None else steered - base)

    return table_of(
        "behaviours",
        "By behaviour, at the recommended cell",
        rows_of(sweep, "behaviours"),
        [
            (TableColumn("behaviour", numeric=False), lambda row: Value(str(row.get("name", "")))),
            (TableColumn("pairs"), _number("pairs", digits=9)),
            _aligned("base", "base"),
            _aligned("steered", "steered"),
            (TableColumn("change", places=True, signed=True), change),
        ],
    )


def kl_table(sweep: Mapping[str, Any]) -> Table | None:
    return table_of(
        "kl-tokens",
        "Tokens that contribute most to the KL divergence on neutral text",
        rows_of(sweep, "kl_tokens"),
        [_TOKEN, (TableColumn("nats"), _number("contribution")), _BASE, _STEERED, (TableColumn("ratio"), _ratio)],
    )


def shifted_tables(sweep: Mapping[str, Any]) -> list[tuple[str, Table]]:
    """(prompt, table) of every prompt."""
    tables = []
    for place, entry in enumerate(rows_of(sweep, "shifted")):
        table = table_of(
            f"shifted-{place}",
            "Probability of the next token",
            rows_of(entry, "tokens"),
            [_TOKEN, _BASE, _STEERED, _aligned("log ratio, nats", "log_ratio", signed=True)],
        )
        if table is not None:
            tables.append((str(entry.get("prompt", "")), table))
    return tables


def generation_table(place: int, entry: Mapping[str, Any]) -> Table | None:
    """What was counted in one prompt's generations."""
    variants = rows_of(entry, "variants")
    words = list(dict.fromkeys(word for variant in variants for word in part_of(variant, "words")))
    return table_of(
        f"generations-{place}",
        "Share of distinct words and pairs of words, share of repetition, and words counted",
        variants,
        [
            (TableColumn("variant", numeric=False), lambda row: Value(str(row.get("name", "")))),
            (TableColumn("distinct-1"), _number("distinct_1")),
            (TableColumn("distinct-2"), _number("distinct_2")),
            (TableColumn("repetition"), _number("repetition")),
            *[(TableColumn(f"“{visible_token(word, 40)}”"), _counted(word)) for word in words],
        ],
    )


def _counted(word: str) -> Read:
    return lambda row: numeric(part_of(row, "words").get(word), digits=9)


def layers_table(sweep: Mapping[str, Any]) -> Table | None:
    geometry = part_of(sweep, "geometry")
    clouds = part_of(geometry, "pca")
    rows = []
    layers = geometry.get("layers") or []
    separations = geometry.get("separation") or []
    for place, layer in enumerate(layers):
        explained = part_of(clouds, str(layer)).get("explained") or []
        separation = separations[place] if place < len(separations) else None
        rows.append({"layer": layer, "separation": separation, **{f"pc{i}": part for i, part in enumerate(explained)}})
    return table_of(
        "layers",
        "Separation of the two sides, and the share of variance that a principal component explains",
        rows,
        [
            _LAYER,
            _aligned("separation d′", "separation"),
            _aligned("PC 1", "pc0"),
            _aligned("PC 2", "pc1"),
        ],
    )


def cosine_table(sweep: Mapping[str, Any]) -> Table | None:
    geometry = part_of(sweep, "geometry")
    layers, cosines = geometry.get("layers") or [], geometry.get("cosine") or []
    if len(layers) < 2 or len(cosines) != len(layers):
        return None
    rows = [
        TableRow([numeric(layer, digits=9), *[Value(fixed(value, 2, signed=False), number(value)) for value in line]])
        for layer, line in zip(layers, cosines, strict=True)
    ]
    return Table(
        "cosine", "Cosine similarity", [TableColumn("layer"), *[TableColumn(str(layer)) for layer in layers]], rows
    )


def changes_table(place: int, tokens: Sequence[tuple[str, float | None]]) -> Table:
    """One text's tokens by place; the ratio is that of the probabilities."""
    rows = [
        TableRow(
            [
                numeric(index + 1, digits=9),
                Value(visible_token(token, 80)),
                numeric(change, signed=True),
                numeric(None if change is None else math.exp(min(change, 700.0))),
            ]
        )
        for index, (token, change) in enumerate(tokens)
    ]
    columns = [
        TableColumn("place"),
        TableColumn("token", numeric=False),
        TableColumn("change, nats"),
        TableColumn("ratio"),
    ]
    return Table(f"changes-{place}", "Change of each token's log-probability", columns, rows)


def timings_table(sweep: Mapping[str, Any]) -> Table | None:
    timings = part_of(sweep, "timings")
    return table_of(
        "timings",
        "Seconds",
        [{"name": name, "seconds": seconds} for name, seconds in timings.items()],
        [
            (TableColumn("part", numeric=False), lambda row: Value(str(row["name"]))),
            (TableColumn("seconds"), _number("seconds")),
        ],
    )
