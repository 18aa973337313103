"""The tables of a sweep's report: heads, and the key of a row that each column shows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from patcher.report.page.sortable import ALIGNED, Table, TableColumn, table_of
from patcher.report.pictures.reading import number, part_of, place_of, recommended_cell, rows_of
from patcher.report.pictures.wording import ABSENT, visible_token

_Rows = Sequence[Mapping[str, Any]]

_text = partial(TableColumn, numeric=False)
_count = partial(TableColumn, digits=9)
_aligned = partial(TableColumn, places=ALIGNED)
_change = partial(TableColumn, places=ALIGNED, signed=True)

_LAYER = _count("layer", "layer")
_COEFFICIENT = TableColumn("coefficient", "coefficient", digits=6)
_EFFECT = _change("effect", "effect")
_DAMAGE = TableColumn("KL, nats a token", "damage")
_PERPLEXITY = _aligned("perplexity", "perplexity")
_GUARD = _text("guard", "guard")
_TOKEN = _text("token", "token")
_BASE = TableColumn("base", "base")
_STEERED = TableColumn("steered", "steered")


def _report(sweep: Mapping[str, Any]) -> _Rows:
    rows = rows_of(sweep, "report")
    return [{**row, "guard": _guard(row), "marked": row.get("kind") == "recommended"} for row in rows]


def _guard(row: Mapping[str, Any]) -> str:
    within = row.get("within_guard")
    return ABSENT if within is None else "within" if within else "exceeded"


def _grid(sweep: Mapping[str, Any]) -> _Rows:
    cell, chosen = recommended_cell(sweep), part_of(sweep, "chosen")
    front = set(map(place_of, rows_of(sweep, "pareto")))
    rows = []
    for row in rows_of(sweep, "grid"):
        here = cell is not None and place_of(row) == cell
        unsure = cell is None and bool(chosen) and place_of(row) == place_of(chosen)
        marks = {"recommended": here, "chosen, not recommended": unsure, "Pareto front": place_of(row) in front}
        mark = ", ".join(name for name, holds in marks.items() if holds)
        rows.append({**row, "guard": _guard(row), "mark": mark, "marked": here})
    return rows


def _behaviours(sweep: Mapping[str, Any]) -> _Rows:
    def change(row: Mapping[str, Any]) -> float | None:
        base, steered = number(row.get("base")), number(row.get("steered"))
        return None if base is None or steered is None else steered - base

    return [{**row, "change": change(row)} for row in rows_of(sweep, "behaviours")]


def _shown_tokens(rows: _Rows) -> _Rows:
    return [{**row, "token": visible_token(row.get("token", ""), 80)} for row in rows]


def _kl_tokens(sweep: Mapping[str, Any]) -> _Rows:
    def ratio(row: Mapping[str, Any]) -> float | None:
        base, steered = number(row.get("base")), number(row.get("steered"))
        return steered / base if base and steered is not None else None

    return [{**row, "ratio": ratio(row)} for row in _shown_tokens(rows_of(sweep, "kl_tokens"))]


def _layers(sweep: Mapping[str, Any]) -> _Rows:
    geometry = part_of(sweep, "geometry")
    clouds = part_of(geometry, "pca")
    rows = []
    for layer, separation in zip(geometry.get("layers", []), geometry.get("separation", []), strict=True):
        explained = part_of(clouds, str(layer)).get("explained", [])
        rows.append({"layer": layer, "separation": separation, **{f"pc{i}": part for i, part in enumerate(explained)}})
    return rows


def _timings(sweep: Mapping[str, Any]) -> _Rows:
    return [{"name": name, "seconds": seconds} for name, seconds in part_of(sweep, "timings").items()]


_TABLES: dict[str, tuple[str, Callable[[Mapping[str, Any]], _Rows], list[TableColumn]]] = {
    "report": (
        "On the pairs kept for the report; effects are changes against the base",
        _report,
        [
            _text("what", "name"),
            _LAYER,
            _COEFFICIENT,
            _aligned("value", "value"),
            _EFFECT,
            _change("95 % from", "low"),
            _change("to", "high"),
            _DAMAGE,
            _PERPLEXITY,
            _GUARD,
        ],
    ),
    "grid": (
        "Every cell of the grid, measured on the choosing pairs",
        _grid,
        [
            _LAYER,
            _COEFFICIENT,
            _EFFECT,
            _change("95 % from", "effect_low"),
            _change("to", "effect_high"),
            _change("from, corrected", "choosing_low"),
            _aligned("value", "steered"),
            _DAMAGE,
            _PERPLEXITY,
            _aligned("on-topic perplexity", "on_topic"),
            _aligned("off-topic perplexity", "off_topic"),
            _aligned("norm added", "norm"),
            _aligned("residual norm", "residual_norm"),
            _count("pairs", "pairs"),
            _GUARD,
            _text("mark", "mark"),
        ],
    ),
    "random": (
        "Random vectors of equal norm, mean of their seeds",
        lambda sweep: rows_of(sweep, "random_grid"),
        [_LAYER, _COEFFICIENT, _EFFECT, _DAMAGE],
    ),
    "behaviours": (
        "By behaviour, at the recommended cell",
        _behaviours,
        [
            _text("behaviour", "name"),
            _count("pairs", "pairs"),
            _aligned("base", "base"),
            _aligned("steered", "steered"),
            _change("change", "change"),
        ],
    ),
    "kl-tokens": (
        "Tokens that contribute most to the KL divergence on neutral text",
        _kl_tokens,
        [_TOKEN, TableColumn("nats", "contribution"), _BASE, _STEERED, TableColumn("ratio", "ratio")],
    ),
    "layers": (
        "Separation of the two sides, and the share of variance that a principal component explains",
        _layers,
        [_LAYER, _aligned("separation d′", "separation"), _aligned("PC 1", "pc0"), _aligned("PC 2", "pc1")],
    ),
    "timings": ("Seconds", _timings, [_text("part", "name"), TableColumn("seconds", "seconds")]),
}


def sweep_table(sweep: Mapping[str, Any], name: str) -> Table | None:
    """The table of that name; None where the sweep has no rows of it."""
    caption, rows, columns = _TABLES[name]
    return table_of(name, caption, rows(sweep), columns)


def shifted_tables(sweep: Mapping[str, Any]) -> list[tuple[str, Table]]:
    """(prompt, table) of every prompt."""
    columns = [_TOKEN, _BASE, _STEERED, _change("log ratio, nats", "log_ratio")]
    tables = []
    for place, entry in enumerate(rows_of(sweep, "shifted")):
        rows = _shown_tokens(rows_of(entry, "tokens"))
        table = table_of(f"shifted-{place}", "Probability of the next token", rows, columns)
        if table is not None:
            tables.append((str(entry.get("prompt", "")), table))
    return tables


def generation_table(place: int, entry: Mapping[str, Any]) -> Table | None:
    """What was counted in one prompt's generations."""
    rows = [
        {**variant, **{f"word {word}": count for word, count in part_of(variant, "words").items()}}
        for variant in rows_of(entry, "variants")
    ]
    words = dict.fromkeys(word for variant in rows_of(entry, "variants") for word in part_of(variant, "words"))
    return table_of(
        f"generations-{place}",
        "Share of distinct words and pairs of words, share of repetition, and words counted",
        rows,
        [
            _text("variant", "name"),
            TableColumn("distinct-1", "distinct_1"),
            TableColumn("distinct-2", "distinct_2"),
            TableColumn("repetition", "repetition"),
            *[_count(f"“{visible_token(word, 40)}”", f"word {word}") for word in words],
        ],
    )


def cosine_table(sweep: Mapping[str, Any]) -> Table | None:
    geometry = part_of(sweep, "geometry")
    layers, cosines = geometry.get("layers", []), geometry.get("cosine", [])
    if len(layers) < 2:
        return None
    beside = [str(layer) for layer in layers]
    rows = [
        {"layer": layer, **dict(zip(beside, line, strict=True))} for layer, line in zip(layers, cosines, strict=True)
    ]
    return table_of(
        "cosine", "Cosine similarity", rows, [_LAYER, *[TableColumn(name, name, places=2) for name in beside]]
    )


def changes_table(place: int, tokens: Sequence[tuple[str, float | None]]) -> Table | None:
    """One text's tokens by place; the ratio is that of the probabilities."""
    rows = [
        {
            "place": index,
            "token": token,
            "change": change,
            "ratio": None if change is None else math.exp(min(change, 700.0)),
        }
        for index, (token, change) in enumerate(tokens, 1)
    ]
    columns = [
        _count("place", "place"),
        _TOKEN,
        TableColumn("change, nats", "change", signed=True),
        TableColumn("ratio", "ratio"),
    ]
    return table_of(f"changes-{place}", "Change of each token's log-probability", _shown_tokens(rows), columns)
