"""The streaming fit against dense solutions, and its break tests."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patcher.errors import InputError
from patcher.routes.rank_one.ridge import ConstantFit


def activations(tokens: int, width: int, seed: int = 0, *, noise: float = 0.3) -> torch.Tensor:
    """Features of very unlike sizes, some of which follow a common constant."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(-2, 2, width)
    return (1 + noise * torch.randn(tokens, width, generator=generator)) * scales * torch.linspace(-1, 1, width)


def solve(fit: ConstantFit) -> SimpleNamespace:
    """The fit, with its errors on what was held out."""
    found, held = fit.solve(), fit.held_out()
    errors = (held.activations.double() @ found.right.double() / held.targets - 1).abs()
    mean, p95 = float(errors.mean()), float(errors.quantile(0.95))
    return SimpleNamespace(**vars(found), error_mean=mean, error_p95=p95, held_out_tokens=len(errors))


def test_without_a_ridge_it_is_least_squares() -> None:
    z = activations(400, 24)
    fit = ConstantFit(24)
    fit.update(z)
    found = fit.candidates([0.0])[0.0]
    dense, *_ = np.linalg.lstsq(z.double().numpy(), np.ones(400), rcond=None)
    assert torch.allclose(found.double(), torch.from_numpy(dense), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("ridge", [1e-6, 1e-2, 1.0])
def test_with_a_ridge_weights_and_targets_it_is_the_dense_solution(ridge: float) -> None:
    z, generator = activations(300, 16), torch.Generator().manual_seed(1)
    targets, weights = torch.rand(300, generator=generator) + 0.5, torch.rand(300, generator=generator)
    fit = ConstantFit(16)
    fit.update(z, targets, weights)
    found = fit.candidates([ridge])[ridge].double()
    dense, weight = z.double(), weights.double()
    gram = dense.T @ (dense * weight[:, None])
    system = gram + ridge * gram.diagonal().mean() * torch.eye(16, dtype=torch.float64)
    expected = torch.linalg.solve(system, dense.T @ (weight * targets.double()))
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-10)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.integers(1, 12), st.integers(0, 10**6))
def test_streaming_is_one_batch(sizes: list[int], width: int, seed: int) -> None:
    z = activations(sum(sizes) + 1, width, seed)
    held = activations(9, width, seed + 1)
    whole, streamed = ConstantFit(width), ConstantFit(width)
    whole.update(z)
    for part in torch.split(z, [*sizes, 1]):
        streamed.update(part)
    whole.update(held, held_out=True)
    for row in held:
        streamed.update(row[None], held_out=True)
    one, many = solve(whole), solve(streamed)
    assert one.tokens == many.tokens == len(z)
    assert one.held_out_tokens == many.held_out_tokens == 9
    gains = held.double() @ torch.stack([one.right, many.right]).double().T
    assert torch.allclose(gains[:, 0], gains[:, 1], atol=1e-4 * max(1.0, float(gains.abs().max())))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.floats(1e-3, 1e3), st.integers(0, 10**6))
def test_the_gain_does_not_depend_on_the_unit_of_the_activations(width: int, unit: float, seed: int) -> None:
    z = activations(60, width, seed).double()
    found = []
    for scale in (1.0, unit):
        fit = ConstantFit(width)
        fit.update(z * scale)
        found.append((z * scale) @ fit.candidates([1e-4])[1e-4].double())
    assert torch.allclose(found[0], found[1], rtol=1e-4, atol=1e-4)


def test_the_ridge_is_the_one_that_serves_what_was_held_out() -> None:
    z, held = activations(30, 24, noise=2.0), activations(500, 24, seed=7, noise=2.0)
    fit = ConstantFit(24)
    fit.update(z)
    fit.update(held, held_out=True)
    solved = solve(fit)
    losses = {
        ridge: float((held.double() @ right.double() - 1).square().mean()) for ridge, right in fit.candidates().items()
    }
    assert solved.ridge == min(losses, key=losses.__getitem__)
    assert len(set(losses.values())) > 1
    errors = (held.double() @ solved.right.double() - 1).abs()
    assert solved.error_mean == pytest.approx(float(errors.mean()))
    assert solved.error_p95 == pytest.approx(float(errors.quantile(0.95)))


def test_the_mean_can_be_made_exact_and_then_is_the_constrained_solution() -> None:
    z = activations(200, 12, noise=1.0)
    fit = ConstantFit(12)
    fit.update(z)
    found = fit.candidates([1e-8], exact_mean=True)[1e-8].double()
    assert float((z.double() @ found).mean()) == pytest.approx(1, abs=1e-5)
    dense = z.double()
    system = torch.zeros(13, 13, dtype=torch.float64)
    system[:12, :12] = dense.T @ dense + 1e-8 * (dense.T @ dense).diagonal().mean() * torch.eye(12)
    system[12, :12] = system[:12, 12] = dense.mean(dim=0)
    expected = torch.linalg.solve(system, torch.cat([dense.sum(dim=0), torch.ones(1, dtype=torch.float64)]))[:12]
    assert torch.allclose(dense @ found, dense @ expected, atol=1e-4)


def test_a_basis_of_sampled_activations_comes_close_to_the_exact_fit() -> None:
    generator = torch.Generator().manual_seed(3)
    # As in a real MLP, most of what happens lies in few directions.
    mixing = torch.randn(40, 256, generator=generator) * torch.logspace(0, -2, 40)[:, None]
    hidden = torch.randn(4000, 40, generator=generator) + 0.7
    z = hidden @ mixing + 0.01 * torch.randn(4000, 256, generator=generator)
    errors = {}
    for rank in (None, 64, 8):
        fit = ConstantFit(256, rank=rank)
        for part in z[:3500].split(100):
            fit.update(part)
        fit.update(z[3500:], held_out=True)
        errors[rank] = solve(fit).error_mean
    assert errors[64] <= 1.1 * errors[None] + 1e-3
    assert errors[8] > errors[64]


def test_fewer_tokens_than_the_basis_wants_are_enough() -> None:
    fit = ConstantFit(64, rank=32)
    fit.update(activations(10, 64))
    assert fit.solve().tokens == 10


def test_the_sample_of_held_out_tokens_is_bounded_and_seeded() -> None:
    fits = [ConstantFit(4, seed=seed) for seed in (0, 0, 1)]
    z = activations(5000, 4)
    for fit, size in zip(fits, (100, 777, 100), strict=True):
        fit._capacity = 1024
        for part in z.split(size):
            fit.update(part, held_out=True)
    first, second, other = (fit.held_out().activations for fit in fits)
    assert first.shape == (1024, 4)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_an_attention_sink_does_not_spoil_the_fit() -> None:
    z = activations(500, 16, noise=0.1)
    z[::50, 3] = 1e5
    fit = ConstantFit(16)
    fit.update(z)
    fit.update(z, held_out=True)
    solved = solve(fit)
    assert solved.error_mean < 0.1


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_are_refused(bad: float) -> None:
    z = activations(4, 3)
    z[2, 1] = bad
    with pytest.raises(InputError, match="not finite"):
        ConstantFit(3).update(z)


def test_nothing_to_fit_on_is_refused() -> None:
    fit = ConstantFit(3)
    fit.update(torch.zeros(0, 3))
    with pytest.raises(InputError, match="no calibration token"):
        fit.solve()


def test_activations_of_zero_are_refused_or_give_zero() -> None:
    fit = ConstantFit(3)
    fit.update(torch.zeros(5, 3))
    try:
        assert torch.isfinite(fit.solve().right).all()
    except InputError as error:
        assert "degenerate" in str(error)


def test_half_precision_activations_are_summed_in_double() -> None:
    z = activations(2000, 8).bfloat16()
    fit, exact = ConstantFit(8), ConstantFit(8)
    fit.update(z)
    exact.update(z.double())
    assert torch.equal(fit.candidates([1e-6])[1e-6], exact.candidates([1e-6])[1e-6])
