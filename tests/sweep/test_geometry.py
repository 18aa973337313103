"""Separation, principal components and cosines of contrast activations."""

from __future__ import annotations

import json

import pytest
import torch

from patcher.sweep.geometry import geometry, separation


def sides(apart: float, pairs: int = 400, hidden: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.randn(2, pairs, hidden, generator=torch.Generator().manual_seed(0))
    positive, negative = draw[0], draw[1]
    positive[:, 0] += apart
    return positive, negative


def test_separation_is_the_distance_in_standard_deviations() -> None:
    assert separation(*sides(4.0)) == pytest.approx(4.0, abs=0.3)
    positive, negative = sides(4.0)
    assert separation(100 * positive, 100 * negative) == pytest.approx(separation(positive, negative))
    assert separation(*sides(0.0)) == pytest.approx(0.0, abs=0.3)


def test_pairs_do_not_separate_themselves() -> None:
    """In more dimensions than pairs the direction made of a pair separates it in any case."""
    positive, negative = sides(0.0, pairs=10, hidden=1000)
    direction = (positive - negative).mean(dim=0)
    spread = torch.cat([positive @ direction, negative @ direction]).std()
    assert ((positive - negative) @ direction).mean() / spread > 1.5
    assert abs(separation(positive, negative) or 0.0) < 1.5


def test_too_few_pairs_and_none_that_vary() -> None:
    assert separation(*sides(1.0, pairs=2)) is None
    assert separation(torch.ones(5, 3), torch.zeros(5, 3)) is None


def test_components_and_cosines() -> None:
    positive, negative = sides(4.0, pairs=300)
    found = geometry(
        {3: (positive, negative), 1: (negative, positive)},
        {3: torch.tensor([1.0, 0.0]), 1: torch.tensor([1.0, 1.0]), 5: torch.tensor([-2.0, 0.0])},
    )
    json.dumps(found, allow_nan=False)
    assert found["layers"] == [1, 3, 5]
    assert found["separation"][1] == pytest.approx(4.0, abs=0.3) and found["separation"][2] is None
    half = 2**-0.5
    expected = [[1.0, half, -half], [half, 1.0, -1.0], [-half, -1.0, 1.0]]
    assert torch.allclose(torch.tensor(found["cosine"]), torch.tensor(expected))
    cloud = found["pca"]["3"]
    assert len(cloud["positive"]) == len(cloud["negative"]) == 200
    means = [torch.tensor(cloud[side]).mean(dim=0) for side in ("positive", "negative")]
    # The positive side to the right, as far as it lies.
    assert float(means[0][0] - means[1][0]) == pytest.approx(4.0, abs=0.3)
    centred = torch.cat([positive[:200], negative[:200]])
    values = torch.linalg.svdvals(centred - centred.mean(dim=0)) ** 2
    assert cloud["explained"] == pytest.approx((values[:2] / values.sum()).tolist(), rel=1e-4)


def test_a_single_pair() -> None:
    found = geometry({0: (torch.ones(1, 4), torch.zeros(1, 4))}, {0: torch.ones(4)})
    json.dumps(found, allow_nan=False)
    assert found["separation"] == [None] and found["pca"]["0"]["explained"] == pytest.approx([1.0, 0.0])
    same = geometry({0: (torch.ones(1, 4), torch.ones(1, 4))}, {0: torch.ones(4)})
    json.dumps(same, allow_nan=False)
