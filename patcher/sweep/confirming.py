"""Whether what was chosen is recommended: only if the items that were kept back confirm it, and in plain words why."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from patcher.recipe.evaluate import GuardSpec
from patcher.sweep.cells import Cell
from patcher.sweep.choosing import Choice, Place
from patcher.sweep.significance import FEWEST_ITEMS, LEVEL

Row = Mapping[str, Any]
RANDOM_OF_DEFAULT = "random_of_default"
NOT_CONFIRMED = "chosen"
"""The kind of the row of a cell that was chosen and is not recommended."""


@dataclass(frozen=True)
class Default:
    """The fixed default that does best on the choosing items.

    Attributes:
        name: what it is called.
        cell: on the choosing items.
    """

    name: str
    cell: Cell

    @property
    def place(self) -> Place:
        """Its layer and coefficient."""
        return self.cell.layer, self.cell.coefficient


@dataclass(frozen=True)
class Decision:
    """What comes out of a sweep.

    Attributes:
        recommended: whether the chosen cell is.
        reason: why, or why not, in sentences.
        best_default: ``best_default`` of sweep.json, or None.
    """

    recommended: bool
    reason: str
    best_default: dict[str, Any] | None


def best_of_defaults(
    cells: Sequence[Cell], names: Mapping[Place, str], accepted: Callable[[Cell], bool]
) -> Default | None:
    """The fixed default within the guard with the largest mean effect on the choosing items, if that is above 0."""
    usable = [cell for cell in cells if cell.finite and accepted(cell) and cell.effect > 0]
    best = max(usable, key=lambda cell: cell.effect, default=None)
    return None if best is None else Default(names[best.layer, best.coefficient], best)


def decide(
    choice: Choice,
    chosen: Place | None,
    report: Sequence[Row],
    default: Default | None,
    *,
    kept_back: bool,
    guard: GuardSpec,
) -> Decision:
    """Confirm the chosen cell, and the best default, on the items that were kept back.

    A cell is confirmed by an effect above zero (its 95 % interval, and a one-sided sign-flip test at 5 %, which few
    items do not fool), larger than the size of the effect of every random vector of equal norm at its layer, with the
    upper end of its damage within the guard. It must also do more than every fixed default within the guard. That is a
    comparison of means on the same items: it does not guard against luck, which the other conditions do, but asks
    whether the search was worth anything; of two that do as much, the default is the simpler. The best default was
    picked on the choosing items, so that what the other items say of it is not the best of several.

    Args:
        choice: what the choosing items say.
        chosen: the cell whose effect was measured on the items that were kept back; None where none may be chosen.
        report: rows of :func:`patcher.sweep.reporting.measure_rows`, with the random vectors of the default.
        default: on the choosing items.
        kept_back: whether no vector has seen the items of the report.
        guard: what damage is accepted.
    """
    rows = {row["kind"]: row for row in report}
    found = _default_json(default, chosen, report, kept_back=kept_back, guard=guard)
    if chosen is None:
        return Decision(False, _sentences(_why_none(choice), _of_default(found)), found)
    row, randoms = rows["recommended"], _effects(report, "random")
    wrong = _not_confirmed(row, randoms, kept_back=kept_back, guard=guard)
    others = [each for each in report if each["kind"] == "default" and _place(each) != chosen and each["within_guard"]]
    better = [each for each in others if not each["effect"] < row["effect"]]
    if better:
        best = max(better, key=lambda each: each["effect"])
        wrong.append(f"the fixed default {_named(best)} does as much or more ({best['effect']:+.3g})")
    cell = _cell(*chosen)
    many = f"the best of {_counted(len(choice.ranked), 'cell')} on {_counted(choice.items, 'choosing item')}"
    if wrong:
        items = f"the {_counted(row['items'], 'item')} that were kept back do not confirm {cell}, {many}"
        return Decision(False, _sentences(f"{items}: {'; '.join(wrong)}", _of_default(found)), found)
    beside = f"more than every random vector of equal norm (at most {abs(_largest(randoms)):.3g})"
    if others:
        largest = max(others, key=lambda each: each["effect"])
        beside += f" and than every fixed default within the guard ({_named(largest)}: {largest['effect']:+.3g})"
    told = f"{cell} is {many} (lower end of its effect, corrected for their number: {choice.lows[chosen]:+.3g})"
    effect = f"on the {_counted(row['items'], 'item')} that were kept back its effect is {_interval(row)}, {beside}"
    return Decision(True, _sentences(told, effect), found)


def told_apart(report: Sequence[Row], decision: Decision) -> list[dict[str, Any]]:
    """`report` of sweep.json: a cell that is not recommended is not called so."""
    rows = [dict(row) for row in report if row["kind"] != RANDOM_OF_DEFAULT]
    if not decision.recommended:
        for row in rows:
            if row["kind"] == "recommended":
                row |= {"kind": NOT_CONFIRMED, "name": "chosen, not recommended"}
    return rows


def _default_json(
    default: Default | None, chosen: Place | None, report: Sequence[Row], *, kept_back: bool, guard: GuardSpec
) -> dict[str, Any] | None:
    if default is None:
        return None
    row = next(row for row in report if row["kind"] == "default" and _place(row) == default.place)
    randoms = _effects(report, "random" if default.place == chosen else RANDOM_OF_DEFAULT)
    wrong = _not_confirmed(row, randoms, kept_back=kept_back, guard=guard)
    names = ("layer", "coefficient", "effect", "low", "high", "p", "damage", "damage_high", "within_guard")
    return {
        "name": default.name,
        **{name: row[name] for name in names},
        "choosing_effect": default.cell.effect,
        "largest_random": _largest(randoms),
        "confirmed": not wrong,
        "reason": "; ".join(wrong) or None,
    }


def _not_confirmed(row: Row, randoms: Sequence[float], *, kept_back: bool, guard: GuardSpec) -> list[str]:
    """What stands against a row of the report, if anything does."""
    wrong = []
    if not kept_back:
        wrong.append("nothing was kept back that the vector has not seen (see `evaluate.held_out`, `evaluate.pairs`)")
    if not row["low"] > 0:
        wrong.append(f"the 95 % interval of its effect is not above 0 ({_interval(row)})")
    elif not row["p"] <= LEVEL:
        few = f" (at least {FEWEST_ITEMS} are needed)" if row["items"] < FEWEST_ITEMS else ""
        wrong.append(f"{_counted(row['items'], 'item')} are too few to tell it from chance{few}")
    largest = _largest(randoms)
    if not row["effect"] > abs(largest):
        wrong.append(f"a random vector of equal norm does as much ({largest:+.3g})")
    if not row["within_guard"]:
        wrong.append(f"its damage on neutral text may be beyond the guard ({_damage(row, guard)})")
    return wrong


def _why_none(choice: Choice) -> str:
    if not choice.ranked:
        return "no cell that may be chosen is within the guard"
    if choice.items < FEWEST_ITEMS:
        few = f"{_counted(choice.items, 'choosing item')} are too few to tell any effect from chance"
        return f"{few}: at least {FEWEST_ITEMS} are needed"
    of = f"{_counted(len(choice.ranked), 'cell')} on {_counted(choice.items, 'choosing item')}"
    if choice.above_zero:
        return f"of {of}, those with an effect above 0 may be beyond the guard on the neutral text of a build"
    most = max(choice.ranked, key=lambda cell: cell.effect)
    low = choice.lows[most.layer, most.coefficient]
    largest = f"{_cell(most.layer, most.coefficient)}: {most.effect:+.3g}, corrected lower end {low:+.3g}"
    return f"of {of}, none has an effect above 0 once that is corrected for their number (the largest, {largest})"


def _of_default(default: Mapping[str, Any] | None) -> str:
    if default is None:
        return "no fixed default within the guard has an effect above 0 on the choosing items"
    if default["confirmed"]:
        return f"the best fixed default, {_named(default)}, is confirmed: {_interval(default)}"
    return f"the best fixed default, {_named(default)}, is not confirmed either: {default['reason']}"


def _sentences(*parts: str) -> str:
    return " ".join(f"{part[0].upper()}{part[1:]}." for part in parts)


def _effects(report: Sequence[Row], kind: str) -> list[float]:
    return [row["effect"] for row in report if row["kind"] == kind]


def _largest(randoms: Sequence[float]) -> float:
    """By size; one that is no number is larger than all."""
    return max(randoms, key=lambda effect: math.inf if math.isnan(effect) else abs(effect))


def _place(row: Row) -> Place:
    return row["layer"], row["coefficient"]


def _cell(layer: int, coefficient: float) -> str:
    return f"{'the embedding' if layer < 0 else f'layer {layer}'}, coefficient {coefficient:g}"


def _named(row: Row) -> str:
    return f"{row['name']} ({_cell(*_place(row))})"


def _interval(row: Row) -> str:
    if math.isnan(row["effect"]):
        return "no number"
    return f"{row['effect']:+.3g}, {row['low']:+.3g} to {row['high']:+.3g}"


def _damage(row: Row, guard: GuardSpec) -> str:
    if guard.kl is not None and not row["damage_high"] <= guard.kl:
        return f"KL divergence {row['damage']:.3g} nats a token, at most {row['damage_high']:.3g}; guard {guard.kl:g}"
    return f"perplexity {row['perplexity']:.4g}"


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
