"""What is recommended, and what is said where nothing is."""

from __future__ import annotations

import math
from typing import Any

import pytest
from support.sweep_cells import cell

from patcher.recipe.evaluate import GuardSpec
from patcher.sweep.choosing import Choice, compared
from patcher.sweep.confirming import Decision, Default, best_of_defaults, decide, told_apart

NAMES = {(2, 1.0): "40% depth, +1", (3, 1.0): "60% depth, +1"}
SIX = (0.2, 0.3, 0.25, 0.22, 0.21, 0.28)
CHOSEN = (4, 2.5)


def row(kind: str, place: tuple[int, float] | None = None, **changed: Any) -> dict[str, Any]:
    layer, coefficient = place or (None, None)
    numbers = {
        "effect": 0.3,
        "low": 0.2,
        "high": 0.4,
        "p": 0.001,
        "damage": 0.1,
        "damage_high": 0.12,
        "perplexity": 9.0,
    }
    found = {"kind": kind, "name": NAMES.get(place, kind) if place else kind, "items": 24, "within_guard": True}  # type: ignore[arg-type]
    return {**found, "layer": layer, "coefficient": coefficient, **numbers, **changed}


def report(
    random: float = 0.1, default: float = 0.2, *, of_default: dict[str, Any] | None = None, **changed: Any
) -> Any:
    return [
        row("base"),
        row("recommended", CHOSEN, **changed),
        row("random", effect=random),
        row("random", effect=-0.01),
        row("default", (2, 1.0), **{"effect": default, **(of_default or {})}),
        row("default", (3, 1.0), effect=-0.1, low=-0.2, high=0.0),
        row("random_of_default", effect=0.05),
    ]


def decided(rows: Any, *, kept_back: bool = True, default: Default | None = None) -> Decision:
    choice = compared([cell(*CHOSEN, effects=SIX)], lambda _: True)
    default = default or Default(NAMES[2, 1.0], cell(2, 1.0, effects=SIX))
    return decide(choice, CHOSEN, rows, default, kept_back=kept_back, guard=GuardSpec())


def test_what_is_confirmed_is_recommended_and_said_why() -> None:
    found = decided(report())
    assert found.recommended and found.best_default is not None and found.best_default["confirmed"]
    for told in ("best of 1 cell on 6 choosing items", "24 items that were kept back", "+0.3, +0.2 to +0.4"):
        assert told in found.reason
    assert "every random vector of equal norm (at most 0.1)" in found.reason and "40% depth, +1" in found.reason
    assert [each["kind"] for each in told_apart(report(), found)].count("random_of_default") == 0


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            {"effect": 0.04, "low": -0.026, "high": 0.105},
            "interval of its effect is not above 0 (+0.04, -0.026 to +0.105)",
        ),
        ({"p": 0.07, "items": 4}, "4 items are too few to tell it from chance (at least 5 are needed)"),
        ({"random": 0.31}, "a random vector of equal norm does as much (+0.31)"),
        ({"random": -0.31}, "a random vector of equal norm does as much (-0.31)"),
        ({"random": math.nan}, "a random vector"),
        ({"within_guard": False, "damage_high": 0.7}, "KL divergence 0.1 nats a token, at most 0.7; guard 0.5"),
        ({"effect": math.nan, "low": math.nan, "high": math.nan, "p": math.nan}, "no number"),
        ({"default": 0.31}, "the fixed default 40% depth, +1 (layer 2, coefficient 1) does as much or more (+0.31)"),
        ({"default": 0.3}, "does as much or more"),
    ],
)
def test_what_is_not_confirmed_is_not_recommended(changed: dict[str, Any], said: str) -> None:
    rows = report(**changed)
    found = decided(rows)
    assert not found.recommended and said in found.reason
    # The default by itself is.
    assert "The best fixed default, 40% depth, +1 (layer 2, coefficient 1), is confirmed: " in found.reason
    told = next(each for each in told_apart(rows, found) if each["layer"] == CHOSEN[0])
    assert told["kind"] == "chosen" and "not recommended" in told["name"]


def test_the_figures_of_a_cell_that_a_default_beats() -> None:
    """Of a real sweep: every one of them speaks against the cell."""
    found = decided(report(random=0.036, default=0.071, effect=0.034, low=-0.026, high=0.105, p=0.3))
    assert not found.recommended
    for said in ("-0.026 to +0.105", "+0.036", "+0.071"):
        assert said in found.reason


def test_a_default_beyond_the_guard_stands_in_nobodys_way() -> None:
    assert decided(report(default=0.9, of_default={"within_guard": False})).recommended


def test_what_the_vector_has_seen_confirms_nothing() -> None:
    found = decided(report(), kept_back=False)
    assert not found.recommended and "nothing was kept back" in found.reason
    assert found.best_default is not None and not found.best_default["confirmed"]


def test_a_default_that_is_not_confirmed_is_named_as_such() -> None:
    found = decided(report(default=0.04, of_default={"low": -0.1}, effect=0.02))
    assert found.best_default is not None and not found.best_default["confirmed"]
    assert "is not confirmed either: the 95 % interval" in found.reason and "+0.05" in found.reason


def test_the_chosen_cell_may_be_a_default() -> None:
    rows = [row("base"), row("recommended", (2, 1.0)), row("random", effect=0.1), row("default", (2, 1.0))]
    choice = compared([cell(2, 1.0, effects=SIX)], lambda _: True)
    found = decide(choice, (2, 1.0), rows, Default("it", cell(2, 1.0)), kept_back=True, guard=GuardSpec())
    assert found.recommended and found.best_default is not None and found.best_default["largest_random"] == 0.1


def test_the_best_default_is_picked_on_the_choosing_items() -> None:
    cells = [cell(2, 1.0, effects=(0.1,) * 6), cell(3, 1.0, effects=SIX)]
    assert best_of_defaults(cells, NAMES, lambda _: True) == Default(NAMES[3, 1.0], cells[1])
    assert best_of_defaults(cells, NAMES, lambda found: found.layer == 2) == Default(NAMES[2, 1.0], cells[0])
    assert best_of_defaults([cell(2, 1.0, effects=(-0.1,) * 6)], NAMES, lambda _: True) is None


def test_why_no_cell_is_chosen() -> None:
    def said(choice: Choice) -> str:
        return decide(choice, None, [row("base")], None, kept_back=True, guard=GuardSpec()).reason

    assert "No cell that may be chosen is within the guard." in said(Choice(items=6))
    assert "4 choosing items are too few" in said(compared([cell()], lambda _: True))
    none = said(compared([cell(4, 2.5, effects=(-0.1, 0.3, 0.1, -0.2, 0.1, 0.0))], lambda _: True))
    assert "none has an effect above 0" in none and "layer 4, coefficient 2.5: +0.0333" in none
    beyond = said(compared([cell(effects=SIX)], lambda _: True))
    assert "beyond the guard on the neutral text of a build" in beyond
