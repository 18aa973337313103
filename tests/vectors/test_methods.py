"""Directions out of activations, against their definitions."""

from __future__ import annotations

import pytest
import torch

from patcher.errors import InputError
from patcher.vectors.methods import METHODS, mean_difference, pca, require_usable
from patcher.vectors.steering_vector import SteeringVector


def activations(pairs: int, hidden: int, *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    positive, negative = torch.randn(2, pairs, hidden, generator=generator)
    return positive + torch.linspace(0, 2, hidden), negative


def reference_component(positive: torch.Tensor, negative: torch.Tensor, *, center: bool) -> torch.Tensor:
    rows = positive.double() - negative.double()
    if center:
        rows = rows - rows.mean(dim=0)
    return torch.linalg.svd(rows, full_matrices=False).Vh[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_mean_difference(dtype):
    positive, negative = (side.to(dtype) for side in activations(7, 5))
    direction = mean_difference(positive, negative)
    assert direction.dtype == torch.float32
    torch.testing.assert_close(direction, (positive.float() - negative.float()).mean(0), rtol=1e-6, atol=1e-7)


def test_the_mean_is_accumulated_in_double_precision():
    positive = torch.tensor([[2.0**24]] + [[1.0]] * 64)
    assert mean_difference(positive, torch.zeros(65, 1)).item() == pytest.approx((2**24 + 64) / 65, rel=1e-7)


def test_over_one_pair_the_mean_is_the_difference():
    positive, negative = activations(1, 5)
    assert torch.equal(mean_difference(positive, negative), positive[0] - negative[0])


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize(("pairs", "hidden"), [(4, 32), (32, 4), (8, 8), (2, 6)])
def test_pca_is_the_first_right_singular_vector(pairs, hidden, center):
    positive, negative = activations(pairs, hidden)
    component = pca(positive, negative, center=center)
    assert component.dtype == torch.float32
    assert component.norm().item() == pytest.approx(1, abs=1e-6)
    cosine = component.double() @ reference_component(positive, negative, center=center)
    assert abs(cosine.item()) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("center", [True, False])
def test_positive_examples_project_higher_on_average(seed, center):
    positive, negative = activations(9, 16, seed=seed)
    component = pca(positive, negative, center=center)
    assert (positive @ component).mean() > (negative @ component).mean()
    torch.testing.assert_close(pca(negative, positive, center=center), -component)


def test_uncentred_pca_of_one_pair_is_its_difference():
    positive, negative = activations(1, 6)
    difference = positive[0] - negative[0]
    torch.testing.assert_close(pca(positive, negative), difference / difference.norm())


def test_the_size_of_the_activations_does_not_matter():
    positive, negative = activations(5, 12)
    for size in (1e-18, 1e18):
        torch.testing.assert_close(pca(positive * size, negative * size), pca(positive, negative))


def test_centring_needs_two_pairs():
    with pytest.raises(InputError, match="of a single pair nothing is left") as caught:
        pca(*activations(1, 6), center=True)
    assert "at least two pairs" in str(caught.value)


def test_where_no_component_is_left_the_result_is_refused_later():
    positive, negative = activations(1, 6)
    same = positive.repeat(4, 1) * 1.1, negative.repeat(4, 1)
    assert not pca(*same, center=True).any()
    rounded = torch.tensor([[0.1, 0.7, 1 / 3, 3e5, 1e-5, 7.7]], dtype=torch.float64).repeat(7, 1)
    assert not pca(rounded, torch.zeros(7, 6), center=True).any()
    assert not pca(positive, positive).any()
    assert pca(*same, center=False).any()
    infinite = positive.clone()
    infinite[0, 0] = torch.inf
    assert pca(infinite, negative).isnan().all()


def test_a_tie_of_signs_is_broken_the_same_way_every_time():
    positive = torch.tensor([[0.0, -3.0], [0.0, 3.0]])
    assert torch.equal(pca(positive, torch.zeros(2, 2), center=True), torch.tensor([0.0, 1.0]))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_called_alike(method):
    direction = METHODS[method](*activations(3, 4), center=False)
    assert direction.shape == (4,)
    for shapes in (((2, 4), (3, 4)), ((0, 4), (0, 4)), ((4,), (4,))):
        with pytest.raises(ValueError, match="two equal"):
            METHODS[method](*(torch.zeros(shape) for shape in shapes))


@pytest.mark.parametrize(
    ("values", "message", "found"),
    [
        ([0.0, 0.0], "the vector is zero", "norm 0"),
        ([1e-9, 0.0], "the vector is zero", "norm 1e-09"),
        ([torch.nan, 1.0], "not finite", "1 of 2 values"),
        ([torch.inf, -torch.inf], "not finite", "2 of 2 values"),
    ],
)
def test_unusable_directions_are_refused_by_name_and_layer(values, message, found):
    with pytest.raises(InputError, match=message) as caught:
        require_usable(torch.tensor(values), name="kindness", layer=13)
    problem = caught.value.problems[0]
    assert problem.where == "vector `kindness`, layer 13"
    assert found in (problem.found or "")
    assert problem.remedy


def test_usable_directions_pass():
    require_usable(torch.tensor([1e-3, 0.0]), name="kindness", layer=0)


def test_steering_vectors_hold_fp32_of_one_dimension():
    SteeringVector("a", 3, 3, 1.0, torch.ones(4), 2.0)
    for values in (torch.ones(4).half(), torch.ones(1, 4)):
        with pytest.raises(ValueError, match="fp32"):
            SteeringVector("a", 3, 3, 1.0, values, None)
