"""Which cell is recommended, and which lie on the front."""

from __future__ import annotations

import math
from functools import partial

import torch
from hypothesis import given
from hypothesis import strategies as st
from support.sweep_cells import cell as made

from patcher.recipe.evaluate import GuardSpec
from patcher.sweep.choosing import compared, pareto, recommended, rule, strongest

NAN = math.nan
# Of fewer than five items nothing is chosen.
cell = partial(made, effects=(0.2, 0.3, 0.25, 0.22, 0.21, 0.28))


def within(limit: float = 0.5):
    return lambda found: found.damage <= limit


def test_the_largest_lower_end_wins_over_the_largest_mean() -> None:
    sure = cell(1, effects=(0.2, 0.21, 0.22, 0.2, 0.21))
    lucky = cell(2, effects=(2.0, 0.0, 0.0, 0.0, 0.0))
    assert lucky.effect > sure.effect and recommended([lucky, sure], within()) is sure


def test_damage_decides_among_equals_and_the_guard_before_everything() -> None:
    gentle, rough, broken = cell(3, damage=0.1), cell(1, damage=0.2), cell(0, effects=(9.0,) * 6, damage=0.6)
    assert recommended([rough, gentle, broken], within()) is gentle
    assert recommended([broken], within()) is None
    assert recommended([cell(effects=(-0.1, -0.2, -0.1, -0.3, -0.2, -0.1))], within()) is None


def test_only_cells_of_the_most_items_are_compared() -> None:
    few, many = cell(0, effects=(0.9,) * 4), cell(1, effects=(0.1,) * 12)
    assert recommended([few, many], within()) is many


def test_items_that_decided_which_cells_go_on_choose_no_cell() -> None:
    """Successive halving kept the luckiest of the first six."""
    dropped = [cell(place, effects=(0.1,) * 6) for place in range(1, 9)]
    lucky = cell(0, effects=(0.9,) * 6 + (0.1, -0.1, 0.2, -0.2, 0.1, -0.1))
    assert recommended([lucky], within()) is lucky
    assert recommended([lucky, *dropped], within()) is None and compared([lucky, *dropped], within()).items == 6


def test_too_few_items_choose_nothing() -> None:
    assert recommended([cell(effects=(0.2, 0.21, 0.22, 0.2))], within()) is None
    assert recommended([cell(effects=(0.2, 0.21, 0.22, 0.2, 0.2))], within()) is not None


def test_more_cells_ask_for_more() -> None:
    """What would be enough of one cell is not of the best of forty that have nothing to do with each other."""
    noise = torch.Generator().manual_seed(1)
    cells = [cell(place, effects=torch.randn(12, generator=noise).tolist()) for place in range(40)]
    best = max(cells, key=lambda found: found.interval[0])
    assert best.interval[0] > 0 and recommended([best], within()) is best
    assert recommended(cells, within()) is None
    # The same cell forty times is still one.
    assert recommended([best] * 40, within()) is best


def test_what_is_no_number_is_never_chosen() -> None:
    good = cell(1)
    bad = [cell(0, effects=(NAN,) * 6), cell(0, effects=(math.inf,) * 6), cell(0, damage=NAN)]
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
    for told in ("corrected for the number of cells", "every random vector", "every fixed default"):
        assert told in rule(GuardSpec())
