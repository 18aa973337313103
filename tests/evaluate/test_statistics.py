"""The bootstrap against a resampling by hand, and what must hold of any interval."""

from __future__ import annotations

import math
import random
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.behaviours import by_behaviour

from patcher.evaluate import statistics as measured
from patcher.evaluate.statistics import bootstrap_interval

VALUES = [0.1, 0.9, 0.4, 0.35, 0.6, 0.2, 0.8, 0.75, 0.05, 0.5]
NUMBERS = st.lists(st.floats(-100, 100, allow_subnormal=False), min_size=1, max_size=30)


def by_hand(values: list[float], weights: list[float], resamples: int) -> tuple[float, float]:
    drawing = random.Random(1)
    means = []
    for _ in range(resamples):
        places = [drawing.randrange(len(values)) for _ in values]
        means.append(sum(weights[p] * values[p] for p in places) / sum(weights[p] for p in places))
    cuts = statistics.quantiles(means, n=40)
    return cuts[0], cuts[-1]


@pytest.mark.parametrize("weights", [None, [1.0, 30.0, 2.0, 5.0, 1.0, 9.0, 3.0, 4.0, 1.0, 2.0]])
def test_as_a_bootstrap_by_hand(weights: list[float] | None) -> None:
    found = bootstrap_interval(VALUES, 0, weights=weights, resamples=20_000)
    expected = by_hand(VALUES, weights or [1.0] * len(VALUES), 20_000)
    width = expected[1] - expected[0]
    assert width > 0.2
    assert max(abs(one - other) for one, other in zip(found, expected, strict=True)) < 0.05 * width


def test_as_the_normal_approximation_of_many_values() -> None:
    values = torch.randn(2000, generator=torch.Generator().manual_seed(0)).double()
    low, high = bootstrap_interval(values, 0)
    half = 1.96 * float(values.std()) / math.sqrt(len(values))
    assert abs(low - (float(values.mean()) - half)) < 0.1 * half
    assert abs(high - (float(values.mean()) + half)) < 0.1 * half
    narrow = bootstrap_interval(values, 0, level=0.5)
    assert abs((narrow[1] - narrow[0]) / (high - low) - 0.674 / 1.96) < 0.03


@settings(max_examples=50, deadline=None)
@given(NUMBERS, st.integers(0, 2**31))
def test_what_holds_of_any_interval(values: list[float], seed: int) -> None:
    low, high = bootstrap_interval(values, seed, resamples=200)
    assert min(values) - 1e-9 <= low <= high <= max(values) + 1e-9
    assert bootstrap_interval(values, seed, resamples=200) == (low, high)
    shifted = bootstrap_interval([2 * value + 1 for value in values], seed, resamples=200)
    assert shifted == pytest.approx((2 * low + 1, 2 * high + 1), abs=1e-6)
    even = bootstrap_interval(values, seed, resamples=200, weights=[3.0] * len(values))
    assert even == pytest.approx((low, high), abs=1e-9)
    with_none = bootstrap_interval([*values, 1e6], seed, resamples=200, weights=[1.0] * len(values) + [0.0])
    assert with_none == pytest.approx((low, high), abs=1e-9)


def test_drawn_in_parts_is_drawn_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = bootstrap_interval(VALUES, 3, resamples=1000)
    monkeypatch.setattr(measured, "_ELEMENTS", 64)
    assert bootstrap_interval(VALUES, 3, resamples=1000) == pytest.approx(whole, abs=0.03)


def test_few_and_broken_values() -> None:
    assert bootstrap_interval([0.25], 0) == (0.25, 0.25)
    assert all(math.isnan(end) for end in bootstrap_interval([0.25, math.nan, 0.5], 0))


def test_pairs_are_drawn_together() -> None:
    base = torch.tensor(VALUES)
    steered = base + 0.1 + 0.01 * torch.randn(len(VALUES), generator=torch.Generator().manual_seed(1))
    low, high = bootstrap_interval(steered - base, 0)
    assert 0.08 < low < high < 0.12
    alone = bootstrap_interval(steered, 0)
    assert alone[1] - alone[0] > 10 * (high - low)


def test_behaviours_apart() -> None:
    values = torch.tensor([[0.1, 0.2, 0.3, 0.6], [0.5, 0.5, 0.7, 0.9]])
    found = by_behaviour(["myopia", "refusal", "myopia", "refusal"], values)
    assert [(item.name, item.questions) for item in found] == [("myopia", 2), ("refusal", 2)]
    assert found[0].means == pytest.approx((0.2, 0.6)) and found[1].means == pytest.approx((0.4, 0.7))
