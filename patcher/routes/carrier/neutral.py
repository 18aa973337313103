"""Contents under which an inserted block does nothing: the identity, or as near to it as its class comes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import nn

from patcher.architectures.model_class import submodule
from patcher.routes.carrier.fills import Fill
from patcher.routes.carrier.trial import SCALES, InsertionTrial


def neutral_fills(trial: InsertionTrial, also: Mapping[str, Fill] | None = None) -> dict[str, Fill] | None:
    """Contents under which the block is the identity, or None.

    Args:
        also: contents of some parameters, such as a router's, without which it may not be.
    """
    fills, streams = {}, trial.streams
    others = []
    for name, tensor in trial.parameters.items():
        if name.endswith("bias") or tensor.ndim >= 2:
            continue
        owner = submodule(trial.block, name.rpartition(".")[0])
        if name.endswith("weight") and "norm" in type(owner).__name__.lower():
            # The sum of squares of several streams' mean is no constant, that of one alone is.
            every = streams > 1 and tensor.numel() == streams * trial.hidden
            fills[name] = Fill("first stream" if every else "constant", _unit_weight(owner))
        else:
            others.append(name)
    for choice in _ways_to_do_nothing(trial, others):
        trial.leak = None
        trial.set({**fills, **choice, **(also or {})})
        gains = trial.gains()
        if not gains or gains[0].ndim not in (3, 4) or gains[0].shape[-1] != trial.hidden:
            return None
        # Where streams are mixed, a trace of the others is left (of DeepSeek-V4's, 1e-6).
        sizes = [scale if streams == 1 else float(trial.noise(scale).abs().max()) for scale in SCALES]
        if all(float(gained.abs().max()) <= 1e-5 * size for gained, size in zip(gains, sizes, strict=True)):
            trial.leak = gains[-1] / SCALES[-1] if streams > 1 else None
            return {**fills, **choice}
        if not others:
            return None
    return None


def _ways_to_do_nothing(trial: InsertionTrial, others: list[str]) -> Iterator[dict[str, Fill]]:
    """Contents of the parameters that are neither matrices, biases nor norms."""
    # What a factor may depend on is set, not copied: the template's own values are not the stand-in's.
    one, zero = (dict.fromkeys(others, Fill("constant", value)) for value in (1.0, 0.0))
    streams = trial.streams
    if streams == 1:
        yield from (one, zero)
        return
    # Gates of a sigmoid are even at 0. What mixes the streams may be the end of such a parameter.
    sizes = {streams * (streams + gates) for gates in range(3)}
    mixing = [name for name in others if trial.parameters[name].numel() in sizes]
    yield from (zero, {**zero, **dict.fromkeys(mixing, Fill("unmixed", 50.0, streams=streams))}, one)


def _unit_weight(norm: nn.Module) -> float:
    """The weight under which a norm does not scale: 1, or 0 where it multiplies by 1 + weight."""
    weight: torch.Tensor = norm.weight  # type: ignore[assignment]
    kept = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.zero_()
            silent = norm(torch.linspace(-1.0, 1.0, weight.numel()).view(1, 1, -1))
        return 0.0 if float(silent.abs().max()) > 0.1 else 1.0
    except (TypeError, RuntimeError, ValueError, AttributeError):
        return 1.0  # a norm with a gate as its second input
    finally:
        with torch.no_grad():
            weight.copy_(kept)
