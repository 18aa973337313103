"""Two blocks that carry a vector together, in classes whose block alone can neither do nothing nor add a constant.

A block of Gemma 3n hands on several residual streams (AltUp). With zeros in all that it can leave out, it adds to each
of them k (q a + B): a is the active stream, q a number of the class (1 / sqrt(2) - 1), B what the MLP's last norm makes
of a constant, and k is 1 plus an entry of a small matrix. With (1 + q k1) (1 + q k2) = 1 the terms in a of two such
blocks cancel, and every stream gains k2 (B2 - B1).

k is the same for every token where the router's sum is positive for all of them: B has equal entries, far above the
mean of a, and a large weight makes the router's tanh 1.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from patcher.architectures.analysis import Architecture
from patcher.architectures.model_class import on_meta
from patcher.architectures.residual import streams_first
from patcher.architectures.stand_in import FAILURES
from patcher.routes.carrier.choice import Block, Choice
from patcher.routes.carrier.fills import Fill
from patcher.routes.carrier.grown import grown_tensors
from patcher.routes.carrier.guard import block_kinds, require_neutral
from patcher.routes.carrier.insertion import CannotInsert, insert_blocks
from patcher.routes.carrier.probe import Form, quadratic
from patcher.routes.carrier.trial import InsertionTrial

TWIN = "twin"
"""The source of the constant of the first block, which holds no vector."""
_LEVEL, _STEEP, _LOUD = 8.0, 2.0**14, 2.0**10
"""What B is without the vector; the router's weights; what the MLP returns in front of its norm."""
BOUND = (
    f"the inserted blocks are exact while the mean of the active residual stream's entries is above -{_LEVEL:g} at "
    "every token, which was seen on the texts of the proof"
)
"""What users of such a copy must know: there both routers see the constant with its sign."""
_NEAR = 1e-4
_MOST_TYPES = 8


@dataclass(frozen=True)
class _Pair:
    first: Form
    second: Form


def choose_twins(architecture: Architecture, layers: Sequence[int]) -> Choice:
    """Two blocks after each layer, the second of which holds the vector.

    Raises:
        CannotInsert: the class is not of this kind, or no such pair is proven.
    """
    if not streams_first(architecture.config):
        raise CannotInsert("its blocks do not correct several residual streams")
    trust = architecture.trust_remote_code
    base = on_meta(architecture.config, trust_remote_code=trust)
    kinds = block_kinds(base, architecture.blocks)
    chosen: dict[int, tuple[int, _Pair]] = {}
    for layer in sorted(set(layers)):
        order = [layer, min(layer + 1, len(kinds) - 1), *(kinds.index(kind) for kind in dict.fromkeys(kinds))]
        why = ""
        by_kind = {kinds[block]: block for block in reversed(order)}
        for template in sorted(by_kind.values(), key=order.index)[:_MOST_TYPES]:
            try:
                insertion = insert_blocks(architecture.config, [layer], {layer: (template, template)})
                require_neutral(base, insertion, architecture.blocks, trust_remote_code=trust)
                chosen[layer] = template, _proven(architecture, layer, template)
                break
            except CannotInsert as finding:
                why = why or str(finding)
        else:
            raise CannotInsert(why)
    insertion = insert_blocks(
        architecture.config,
        list(chosen),
        {layer: (template, template) for layer, (template, _) in chosen.items()},
        carriers=dict.fromkeys(chosen, 1),
    )
    extended = require_neutral(base, insertion, architecture.blocks, trust_remote_code=trust)
    blocks = {}
    for layer, places in insertion.inserted.items():
        template, pair = chosen[layer]

        def trial(layer: int = layer, template: int = template) -> InsertionTrial:
            return _trial(architecture, layer, template)

        for place, form in zip(places, (pair.first, pair.second), strict=True):
            blocks[place] = Block(form, trial, ("twins", layer, template), template)
    forms = {layer: pair.second for layer, (_, pair) in chosen.items()}
    return Choice(
        insertion, forms, blocks, {}, base, extended, grown_tensors(base, extended, insertion, architecture.blocks)
    )


def _trial(architecture: Architecture, layer: int, template: int) -> InsertionTrial:
    return InsertionTrial(
        architecture.config, architecture.blocks, template, after=layer, types=(template, template), carrier=1
    )


def _proven(architecture: Architecture, layer: int, template: int) -> _Pair:
    try:
        trial = _trial(architecture, layer, template)
        pair = _pair(trial)
        trial.set_beside(0, pair.first.fills)
        difference, effect, largest = trial.prove(pair.second.fills)
    except FAILURES as error:
        raise CannotInsert(f"a stand-in of two blocks does not run ({error})") from None
    if not difference <= 1e-4 * max(1.0, largest) or not difference <= 2e-3 * effect:
        raise CannotInsert(f"with two blocks the model differs from the hook by {difference:.1g} of {effect:.2g}")
    return replace(pair, second=replace(pair.second, difference=difference, effect=effect))


def _pair(trial: InsertionTrial) -> _Pair:
    """The contents of both blocks, found on the second one."""
    parameters, hidden = trial.parameters, trial.hidden
    noise = [trial.noise(scale) for scale in (1.0, 3.0)]
    streams = noise[0].shape[0]
    if noise[0].ndim != 4 or noise[0].shape[1:3] != trial.ids.shape:
        raise CannotInsert("its residual streams do not come one after the other")
    mixing = [name for name, tensor in parameters.items() if tuple(tensor.shape) == (streams, streams)]
    routers = [name for name, tensor in parameters.items() if tuple(tensor.shape) == (streams, hidden)]
    norms = [name for name, tensor in parameters.items() if tuple(tensor.shape) == (hidden,) and "norm" in name]
    if len(mixing) != 1 or len(routers) != 1:
        raise CannotInsert("no small matrix corrects its residual streams")
    trial.set({})
    quotients = [
        float((gain * state[:1]).sum() / (streams * state[:1].square().sum()))
        for gain, state in zip(trial.gains((1.0, 3.0)), noise, strict=True)
    ]
    q = quotients[0]
    if not all(
        float((gain - q * state[:1]).abs().max()) <= _NEAR * float(state.abs().max())
        for gain, state in zip(trial.gains((1.0, 3.0)), noise, strict=True)
    ):
        raise CannotInsert("without any content the block does not keep a share of the active stream")
    beside = routers[0].rpartition(".")[0].rpartition(".")[0]
    common = {name: Fill("constant", 1.0) for name in norms if beside and name.startswith(beside + ".")}
    common[routers[0]] = Fill("constant", _STEEP)
    free = [name for name in norms if name not in common]
    first, second, rest = _factors(q)
    for sink, before, behind in itertools.product(reversed(parameters), free, free):
        shape, parent = tuple(parameters[sink].shape), sink.rpartition(".")[0].rpartition(".")[0]
        if len(shape) != 2 or shape[0] != hidden or before == behind or not parent:
            continue
        others = [name for name in parameters if name.startswith(parent + ".") and name != sink]
        for fills, right in quadratic(trial, others, shape[1]):
            whole = {**common, **fills, before: Fill("constant", 1.0), sink: Fill("flat", _LOUD, right=right)}
            trial.set({**whole, behind: Fill("constant", _LEVEL)})
            gains = trial.gains((1.0, 3.0))
            if all(
                float((gain - q * state[:1] - _LEVEL).abs().max()) <= _NEAR * _LEVEL
                for gain, state in zip(gains, noise, strict=True)
            ):
                level, held = Fill("constant", _LEVEL), Fill("carrier", factor=second, offset=_LEVEL)
                one = {**whole, behind: level, mixing[0]: Fill("column", first - 1.0)}
                two = {**whole, behind: held, mixing[0]: Fill("column", second - 1.0, second=rest)}
                return _Pair(Form(one, "", TWIN, "", 1.0), Form(two, behind, "norm", sink, second))
    raise CannotInsert("nothing behind a norm of it is a constant")


def _factors(q: float) -> tuple[float, float, float]:
    """k1 and k2 with (1 + q k1) (1 + q k2) nearest to 1, of those for which bfloat16 holds k - 1; and what k2 lacks."""
    grid = torch.cat([torch.arange(-255, 256) / 128, torch.arange(128, 256) / 64, torch.arange(-255, -127) / 64])
    k = (grid.double() + 1.0)[(grid + 1.0).abs() > 0.25]
    left = 1.0 + q * k
    missed = (left[:, None] * left[None, :] - 1.0).abs()
    missed[left.abs() < 0.25] = 1.0
    place = int(missed.argmin())
    # With the positive one first, both routers see the constant with its sign.
    first, second = sorted((float(k[place // len(k)]), float(k[place % len(k)])), reverse=True)
    return first, second, -first / (1.0 + q * first) - second
