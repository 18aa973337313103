"""Titles, captions and alternative texts of the pictures. Needs no drawing package."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import itemgetter
from typing import Any

from patcher.report.pictures.changes import limit_of, texts_of
from patcher.report.pictures.reading import (
    cells_along,
    grid_of,
    measure_name,
    number,
    part_of,
    recommended_cell,
    report_row,
    row_at,
    rows_of,
    shown_cell,
)
from patcher.report.pictures.wording import cell_name, interval, shown, visible_token

TITLES = {
    "controls": "Effect beside its controls",
    "heat_map": "Effect and damage over the grid",
    "effect_by_layer": "Effect by layer",
    "by_coefficient": "Effect and damage by coefficient",
    "pareto_front": "Effect against damage",
    "perplexity_curves": "Perplexity on and off the topic",
    "contrast_pca": "Contrast activations by layer",
    "cosine_by_layer": "Vectors of different layers",
    "shifted_tokens": "Most shifted tokens",
    "token_changes": "Change of each token's log-probability",
}

CAPTIONS = {
    "controls": "Change against the base, measured on the pairs kept for the report; bars are 95 % intervals. Random"
    " vectors have the same norm.",
    "heat_map": "Effect on the choosing pairs (+ is the expected way) and KL divergence from the base on neutral text."
    " The frame marks the recommended cell; hatched cells exceed the guard.",
    "effect_by_layer": "One line a coefficient; the thick one, with its 95 % interval, is the recommended coefficient,"
    " or that of the largest effect where none is recommended.",
    "by_coefficient": "One layer's effect with its 95 % interval, and its KL divergence on neutral text, beside random"
    " vectors of equal norm. The dash-dotted line is the guard's limit.",
    "pareto_front": "Every dot is a cell of the grid. No cell has both more effect and less damage than one on the"
    " front.",
    "perplexity_curves": "Below 1 the steered model finds a text more likely than the base does.",
    "contrast_pca": "Each dot is one side of a contrast pair, on the first two principal components of its layer."
    " Separation d′: how far apart the means of both sides lie along the mean difference of the other pairs, in pooled"
    " standard deviations.",
    "cosine_by_layer": "1: the vectors of two layers point the same way; 0: they have nothing in common.",
    "shifted_tokens": "Probability of the next token before and after steering; × and ÷ tell the ratio.",
    "token_changes": "Blue with a solid underline: the steered model finds the token more likely. Vermilion with a"
    " dotted underline: less likely.",
}


def alt_text(name: str, sweep: Mapping[str, Any]) -> str:
    """What the picture shows, with its main numbers, in one or two sentences. Strings in it are not escaped."""
    describe = _DESCRIPTIONS.get(name)
    told = describe(sweep) if describe else ""
    return f"{TITLES.get(name, name)}. {told}".strip()


def _controls(sweep: Mapping[str, Any]) -> str:
    row = report_row(sweep, "recommended")
    randoms = [abs(number(row.get("effect")) or 0.0) for row in rows_of(sweep, "report") if row.get("kind") == "random"]
    parts = []
    if row is not None:
        parts.append(f"The recommended cell: {_effect(row)} {interval(row.get('low'), row.get('high'))}".strip() + ".")
    if randoms:
        parts.append(f"Random vectors: at most {shown(max(randoms))} either way.")
    return " ".join(parts)


def _known(rows: list[Mapping[str, Any]], key: str) -> list[Mapping[str, Any]]:
    return [row for row in rows if number(row.get(key)) is not None]


def _effect(row: Mapping[str, Any]) -> str:
    return shown(row.get("effect"), signed=True)


def _heat_map(sweep: Mapping[str, Any]) -> str:
    grid = grid_of(sweep, "effect")
    numbers = grid.numbers()
    if not numbers:
        return ""
    cell = recommended_cell(sweep)
    told = (
        f"{len(grid.layers)} layers by {len(grid.coefficients)} coefficients; effects on {measure_name(sweep)} from"
        f" {shown(min(numbers), signed=True)} to {shown(max(numbers), signed=True)}."
    )
    return told + (f" Recommended: {cell_name(*cell)}." if cell else " No cell is recommended.")


def _by_layer(sweep: Mapping[str, Any]) -> str:
    cell = shown_cell(sweep)
    known = [] if cell is None else _known(cells_along(rows_of(sweep, "grid"), "layer", cell), "effect")
    if cell is None or not known:
        return ""
    best = max(known, key=itemgetter("effect"))
    return (
        f"At {cell_name(None, cell.coefficient)} the largest is {_effect(best)}, at {cell_name(best['layer'], None)}."
    )


def _by_coefficient(sweep: Mapping[str, Any]) -> str:
    cell = shown_cell(sweep)
    if cell is None:
        return ""
    parts = []
    for key, name in (("grid", "the steering vector"), ("random_grid", "random vectors")):
        rows = _known(cells_along(rows_of(sweep, key), "coefficient", cell), "effect")
        if rows:
            told = ", ".join(f"{_effect(row)} at {shown(row['coefficient'], digits=6)}" for row in rows)
            parts.append(f"Effects of {name} by coefficient: {told}.")
    return " ".join(parts)


def _pareto(sweep: Mapping[str, Any]) -> str:
    row = row_at(sweep, recommended_cell(sweep))
    if row is None:
        return ""
    return f"The recommended cell has effect {_effect(row)} at {shown(row.get('damage'))} nats a token."


def _perplexities(sweep: Mapping[str, Any]) -> str:
    cell, baseline = shown_cell(sweep), part_of(sweep, "baseline")
    row = row_at(sweep, cell)
    told = [
        f"{name} {shown(baseline.get(key))} before, {shown(row.get(key))} after"
        for key, name in (("on_topic", "on-topic"), ("off_topic", "off-topic"))
        if row is not None and number(row.get(key)) is not None
    ]
    return f"At {cell_name(*cell)}: {'; '.join(told)}." if cell is not None and told else ""


def _separation(sweep: Mapping[str, Any]) -> str:
    geometry = part_of(sweep, "geometry")
    pairs = zip(geometry.get("separation", []), geometry.get("layers", []), strict=True)
    known = [(value, layer) for value, layer in pairs if value is not None]
    if not known:
        return ""
    value, layer = max(known)
    return f"Positive and negative sides lie furthest apart at {cell_name(layer, None)}, d′ {shown(value)}."


def _cosines(sweep: Mapping[str, Any]) -> str:
    rows = part_of(sweep, "geometry").get("cosine", [])
    known = [value for place, row in enumerate(rows, 1) for value in row[place : place + 1] if value is not None]
    return f"Between neighbouring layers of the grid at least {shown(min(known))}." if known else ""


def _shifted(sweep: Mapping[str, Any]) -> str:
    for entry in rows_of(sweep, "shifted"):
        tokens = sorted(_known(rows_of(entry, "tokens"), "log_ratio"), key=itemgetter("log_ratio"))
        if tokens:
            raised, lowered = visible_token(tokens[-1]["token"]), visible_token(tokens[0]["token"])
            return f"Most raised {raised}, most lowered {lowered}."
    return ""


def _changes(sweep: Mapping[str, Any]) -> str:
    texts = texts_of(sweep)
    return f"{len(texts)} texts; the full colour stands for {shown(limit_of(texts), digits=2)} nats." if texts else ""


_DESCRIPTIONS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "controls": _controls,
    "heat_map": _heat_map,
    "effect_by_layer": _by_layer,
    "by_coefficient": _by_coefficient,
    "pareto_front": _pareto,
    "perplexity_curves": _perplexities,
    "contrast_pca": _separation,
    "cosine_by_layer": _cosines,
    "shifted_tokens": _shifted,
    "token_changes": _changes,
}
