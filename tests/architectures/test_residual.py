"""Blocks that hand on several residual streams: what is read of them, and what a vector does to each."""

from __future__ import annotations

import pytest
import torch

from patcher.architectures.analysis import Architecture
from patcher.architectures.default_configs import default_config
from patcher.architectures.residual import gained, mean_stream, streams_of
from patcher.architectures.streams import stream_count

ONE, APART, BESIDE = (2, 5, 8), (2, 5, 4, 8), (2, 5, 32)
"""One stream; four in a dimension of their own; four side by side."""


def hidden(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", [ONE, APART, BESIDE])
@pytest.mark.parametrize("rows", [(), (2, 1), (2, 5)], ids=["one vector", "one a row", "one a token"])
def test_every_stream_gains_the_vector_and_their_mean_does(shape: tuple[int, ...], rows: tuple[int, ...]) -> None:
    before, vector = hidden(shape), hidden((*rows, 8))
    after = gained(before, vector)
    assert after.shape == before.shape
    torch.testing.assert_close(mean_stream(after, 8), mean_stream(before, 8) + vector)
    each = vector.unsqueeze(-2) if rows and shape != ONE else vector
    torch.testing.assert_close(streams_of(after, 8), streams_of(before, 8) + each)


def test_a_mean_of_half_precision_is_taken_in_full() -> None:
    streams = torch.tensor([256.0, 1.0, 1.0, 1.0], dtype=torch.bfloat16).view(1, 1, 4, 1).expand(1, 1, 4, 8)
    mean = mean_stream(streams, 8)
    assert mean.dtype == torch.bfloat16 and float(mean[0, 0, 0]) == pytest.approx(64.75, abs=0.3)


@pytest.mark.parametrize(("model_type", "count"), [("llama", 1), ("hy_v4", 4), ("deepseek_v4", 4)])
def test_streams_are_counted_on_a_stand_in(model_type: str, count: int) -> None:
    assert stream_count(Architecture(default_config(model_type))) == count


def test_streams_that_lie_side_by_side_are_counted() -> None:
    assert stream_count(Architecture(default_config("qwen4_exp_text"))) == 4
