"""Where a block has experts beside one that every token uses, they may hold the vector together.

The router is zero, so that all experts weigh alike, and all hold the same: which of them a token uses does not matter.
The shared expert holds the first coordinates, as many as it has room for, and the others hold the rest. How much each
counts is measured; the shared one's rows make up for the difference but for a power of two, so that both round the
vector to the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch

from patcher.routes.carrier.epsilon import loss_of
from patcher.routes.carrier.fills import Fill, gain
from patcher.routes.carrier.neutral import neutral_fills
from patcher.routes.carrier.probe import TOLERANCE, Form, constant_gain, proven, quadratic
from patcher.routes.carrier.trial import SCALES, InsertionTrial

_NEAR = 1e-5


def find_shared(trial: InsertionTrial, shapes: Mapping[str, tuple[int, ...]], hidden: int) -> Iterator[Form]:
    """Every content of the inserted block in which experts and a shared one hold the vector together, proven.

    Args:
        trial: the extended stand-in, with all experts.
        shapes: of the real model's block, by name.
        hidden: width of the real residual stream.
    """
    neutral = neutral_fills(trial)
    sinks = _sinks(trial) if neutral is not None else {}
    routed = [name for name in sinks if trial.parameters[name].ndim == 3]
    for sink in routed:
        around = sink.rpartition(".")[0].rpartition(".")[0] + "."
        for other in [name for name in sinks if name.startswith(around) and name not in routed]:
            after = min(hidden, shapes[other][-1] // 2)
            if shapes[other][-2] != hidden or shapes[sink][-2] != hidden or hidden - after > shapes[sink][-1] // 2:
                continue
            form = _together(trial, neutral or {}, {**sinks[sink], **sinks[other]}, sink, other)
            if form is not None and (found := proven(trial, form)) is not None:
                yield replace(found, after=after)


def _sinks(trial: InsertionTrial) -> dict[str, dict[str, Fill]]:
    """Output projection -> the squares in front of it."""
    found = {}
    for name, tensor in trial.parameters.items():
        if tensor.ndim < 2 or tensor.shape[-2] != trial.hidden:
            continue
        parent = (name if tensor.ndim == 3 else name.rpartition(".")[0]).rpartition(".")[0] + "."
        beside = [other for other in trial.parameters if other.startswith(parent) and other != name]
        for fills, right in quadratic(trial, beside, tensor.shape[-1]):
            if right == "gated":
                found[name] = fills
                break
    return found


def _together(
    trial: InsertionTrial, neutral: Mapping[str, Fill], pairs: Mapping[str, Fill], sink: str, other: str
) -> Form | None:
    width = trial.parameters[other].shape[-1] // 2
    after = min(trial.hidden, width)
    held = {
        name: replace(fill, after=after) if trial.parameters[name].ndim == 3 else fill for name, fill in pairs.items()
    }
    one = gain("gated", trial.hidden)
    first, rest = Fill("carrier", right="gated", factor=one), Fill("carrier", right="gated", factor=one, after=after)
    contents = {**neutral, **held}
    measured = _weights(trial, contents, {other: first, sink: rest})
    if measured is None:
        return None
    scale, shared, routed = _levelled(*measured)
    contents |= {
        name: replace(fill, value=scale) for name, fill in held.items() if trial.parameters[name].ndim < 3
    } if scale != 1.0 else {}  # fmt: skip
    contents[other] = replace(first, factor=shared * one)
    contents[sink] = replace(rest, factor=routed * one)
    found = constant_gain(trial, contents, trial.vector)
    if found is None or abs(found[0] - 1.0) > TOLERANCE:
        return None
    loss = loss_of(trial, contents, trial.vector)
    return Form(contents, sink, "norm", sink, routed, loss, units={other: shared})


def _weights(
    trial: InsertionTrial, contents: Mapping[str, Fill], carriers: Mapping[str, Fill]
) -> tuple[float, float] | None:
    """What each carrier alone adds of the vector, per unit of its sum of squares: they must add up for every token."""
    columns = []
    for name, fill in carriers.items():
        trial.set({**contents, name: fill}, trial.vector)
        shares = [(gained @ trial.vector).flatten() for gained in trial.gains(SCALES[1:])]
        columns.append(torch.cat(shares).double() / float(trial.vector @ trial.vector))
    matrix = torch.stack(columns, dim=1)
    if not bool(torch.isfinite(matrix).all()):
        return None
    solved = torch.linalg.lstsq(matrix, torch.ones(len(matrix), 1, dtype=torch.float64)).solution.flatten()
    off = float((matrix @ solved - 1.0).abs().max())
    if not off <= TOLERANCE or not bool((solved > 1e-6).all()):
        return None
    shared, routed = (1.0 / float(share) for share in solved)
    return shared, routed


def _levelled(shared: float, routed: float) -> tuple[float, float, float]:
    """What the shared rows are multiplied by, and both weights then: apart by a power of two where that can be held."""
    near = round(shared * 1024) / 1024
    shared = near if abs(near - shared) <= _NEAR * shared else shared
    mantissa, exponent = math.frexp(routed / shared)
    scale = round(mantissa * 256) / 128  # bf16 holds eight bits
    if abs(scale - 2 * mantissa) > _NEAR * scale:
        return 1.0, shared, routed
    return scale, shared * scale, shared * math.ldexp(scale, exponent - 1)
