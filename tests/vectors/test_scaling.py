"""Scale and coefficient."""

from __future__ import annotations

import pytest
import torch

from patcher.errors import InputError
from patcher.vectors.steering_vector import scale_direction

DIRECTION = torch.tensor([3.0, 0.0, -4.0])


@pytest.mark.parametrize(
    ("scale", "coefficient", "norm"),
    [("raw", 2.0, 10.0), ("unit", 2.0, 2.0), ("residual", 0.5, 10.0), (7.0, 2.0, 14.0), (7, -1.0, 7.0)],
)
def test_norm_and_direction(scale, coefficient, norm):
    values = scale_direction(DIRECTION, scale=scale, coefficient=coefficient, residual_norm=20.0)
    assert values.dtype == torch.float32
    assert values.norm().item() == pytest.approx(norm, rel=1e-6)
    sign = 1 if coefficient > 0 else -1
    torch.testing.assert_close(values / norm, sign * DIRECTION / 5)


def test_raw_with_coefficient_one_changes_nothing():
    direction = torch.randn(64)
    assert torch.equal(scale_direction(direction, scale="raw", coefficient=1.0, residual_norm=None), direction)


def test_half_precision_directions_are_scaled_exactly():
    values = scale_direction(DIRECTION.bfloat16(), scale="unit", coefficient=1.0, residual_norm=None)
    torch.testing.assert_close(values, DIRECTION / 5)


def test_a_residual_norm_that_was_not_measured():
    with pytest.raises(InputError, match="none was measured") as caught:
        scale_direction(DIRECTION, scale="residual", coefficient=1.0, residual_norm=None)
    assert "as a number" in (caught.value.problems[0].remedy or "")


def test_a_zero_direction_has_no_unit():
    with pytest.raises(ValueError, match="zero direction"):
        scale_direction(torch.zeros(3), scale="unit", coefficient=1.0, residual_norm=None)
