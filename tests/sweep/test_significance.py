"""The sign-flip test of the best of many cells: what it says of noise, of a real effect, and of few items."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from patcher.sweep.significance import FEWEST_ITEMS, LEVEL, above_zero


def noise(cells: int, items: int, seed: int) -> torch.Tensor:
    """Cells that are alike, as neighbours in a grid are."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(4, items, generator=generator, dtype=torch.float64)
    mix = torch.randn(cells, 4, generator=generator, dtype=torch.float64)
    return mix @ shared + 0.3 * torch.randn(cells, items, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("items", [5, 8, 24])
def test_noise_is_rarely_called_an_effect(items: int) -> None:
    runs = 200
    found = sum(bool((above_zero(noise(45, items, seed), seed).lows > 0).any()) for seed in range(runs))
    # 5 % of 200, and three standard errors.
    assert found <= 20
    alone = sum(bool((above_zero(noise(45, items, seed)[:1], seed).lows > 0).any()) for seed in range(runs))
    assert alone <= 20


@pytest.mark.parametrize("items", [6, pytest.param(24, marks=pytest.mark.slow)])
def test_without_the_correction_noise_would_be(items: int) -> None:
    """The check is checked: each cell by itself, and then the best of them."""
    runs = 60
    best = [max(float(above_zero(row[None], seed).lows) for row in noise(45, items, seed)) for seed in range(runs)]
    assert sum(low > 0 for low in best) > 0.15 * runs


def test_an_effect_is_found_in_the_cells_that_have_it() -> None:
    effects = noise(20, 24, 3)
    effects[7] += 4
    found = above_zero(effects, 0)
    assert (found.lows > 0).nonzero().flatten().tolist() == [7] and float(found.p[7]) < LEVEL
    assert 0 < float(found.lows[7]) < float(effects[7].mean())


def test_the_p_value_is_that_of_all_patterns_of_signs() -> None:
    effects = noise(3, 6, 1) + 0.5

    def largest(rows: torch.Tensor) -> float:
        return float((rows.mean(dim=1) / rows.std(dim=1)).max())

    signs = [torch.tensor(each, dtype=torch.float64) for each in itertools.product((1, -1), repeat=6)]
    statistics = [largest(effects * each) for each in signs]
    for row, p in zip(effects, above_zero(effects, 0).p, strict=True):
        expected = sum(value >= largest(row[None]) - 1e-9 for value in statistics) / len(statistics)
        assert float(p) == pytest.approx(expected)


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=14), st.integers(1, 4))
def test_both_answers_agree(values: list[float], cells: int) -> None:
    found = above_zero(torch.tensor([values] * cells, dtype=torch.float64), 0)
    for low, p in zip(found.lows.tolist(), found.p.tolist(), strict=True):
        assert (low > 0) == (p <= LEVEL and len(values) >= FEWEST_ITEMS)
        assert low <= max(sum(values) / len(values), 0) + 1e-9


def test_few_items_tell_nothing() -> None:
    assert FEWEST_ITEMS == 5
    for items in range(1, 8):
        found = above_zero(torch.full((3, items), 0.2), 0)
        assert bool((found.lows > 0).all()) == (items >= FEWEST_ITEMS) and float(found.p[0]) == 0.5**items
    assert math.isinf(float(above_zero(torch.ones(1, 4), 0).lows))


def test_what_is_no_number_or_nothing_is_no_effect() -> None:
    wrong = above_zero(torch.tensor([[1.0] * 5 + [math.nan], [1.0] * 6]), 0)
    assert bool(wrong.p.isnan().all()) and not bool((wrong.lows > 0).any())
    assert not bool((above_zero(torch.zeros(2, 9), 0).lows > 0).any())
