"""Which cell is recommended, and which lie on the front."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st
from support.sweep_cells import cell

from patcher.recipe.evaluate import GuardSpec
from patcher.sweep.choosing import pareto, recommended, rule, strongest

NAN = math.nan


def within(limit: float = 0.5):
    return lambda found: found.damage <= limit


def test_the_largest_lower_end_wins_over_the_largest_mean() -> None:
    sure = cell(1, effects=(0.2, 0.21, 0.22, 0.2))
    lucky = cell(2, effects=(2.0, 0.0, 0.0, 0.0))
    assert lucky.effect > sure.effect and recommended([lucky, sure], within()) is sure


def test_damage_decides_among_equals_and_the_guard_before_everything() -> None:
    gentle, rough, broken = cell(3, damage=0.1), cell(1, damage=0.2), cell(0, effects=(9.0,) * 4, damage=0.6)
    assert recommended([rough, gentle, broken], within()) is gentle
    assert recommended([broken], within()) is None
    assert recommended([cell(effects=(-0.1, -0.2, -0.1, -0.3))], within()) is None


def test_only_cells_of_the_most_items_are_compared() -> None:
    few, many = cell(0, effects=(0.9,) * 4), cell(1, effects=(0.1,) * 12)
    assert recommended([few, many], within()) is many


def test_what_is_no_number_is_never_chosen() -> None:
    good = cell(1)
    bad = [cell(0, effects=(NAN,) * 4), cell(0, effects=(math.inf,) * 4), cell(0, damage=NAN)]
    assert recommended([*bad, good], lambda _cell: True) is good
    assert recommended(bad, lambda _cell: True) is None
    assert pareto([*bad, good]) == [good] and strongest([*bad, good]) is good
    assert strongest(bad) in bad


finite = st.floats(-1, 1).map(lambda value: round(value, 2))


@given(st.lists(st.tuples(finite, finite.map(abs)), min_size=1, max_size=20))
def test_no_cell_beats_one_of_the_front(points: list[tuple[float, float]]) -> None:
    cells = [cell(place, effects=(effect,) * 4, damage=damage) for place, (effect, damage) in enumerate(points)]
    front = pareto(cells)
    for found in front:
        assert found.effect > 0
        assert not any(c.effect > found.effect and c.damage <= found.damage for c in cells)
        assert not any(c.effect >= found.effect and c.damage < found.damage for c in cells)
    for other in cells:
        if other.effect > 0:
            assert any(c.effect >= other.effect and c.damage <= other.damage for c in front)
    assert [c.damage for c in front] == sorted(c.damage for c in front)


def test_the_rule_says_what_the_guard_is() -> None:
    assert "at most 0.5 nats" in rule(GuardSpec()) and "times the base's" not in rule(GuardSpec())
    assert "at most 1.5 times the base's" in rule(GuardSpec(kl=None, perplexity=1.5))
    assert "neutral" not in rule(GuardSpec(kl=None))
