"""What an inserted block must hold to add one vector to every residual: found by trying, on a tiny stand-in.

Nothing here knows an architecture. A block of zeros must be the identity. Then each matrix that could be an output
projection is given v, with each source of a constant for its input, and what works is kept:

1. biases beside the projection (those of queries, keys and values; of an MLP's first half),
2. a norm's bias, with the norm's weight set to zero,
3. the sum of squares of a norm without bias (:mod:`patcher.routes.carrier.fills`).

Where a norm follows the projection, that norm's weight takes the vector, and the projection returns a constant.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch

from patcher.routes.carrier.epsilon import loss_of
from patcher.routes.carrier.fills import Fill, Right, gain
from patcher.routes.carrier.neutral import neutral_fills
from patcher.routes.carrier.trial import SCALES, InsertionTrial
from patcher.routes.constant import Loss

TOLERANCE = 1e-3
_QUIET = 0.1
_LOUD, _FAINT = 2.0**10, 2.0**-16
"""What a projection returns where a norm follows: far above the norm's epsilon, or so far below it that the epsilon
fixes the norm's output at a small value, beside which the 1 of a weight that is stored as 1 + w does not count."""


@dataclass(frozen=True)
class Form:
    """The content of an inserted block that works.

    Attributes:
        fills: name in the block -> its content; what is not named holds zeros.
        carrier: the name of what carries the vector.
        source: where the constant comes from: ``bias``, ``norm bias`` or ``norm``.
        sink: the output projection.
        unit: residual gain per unit of the carrier, divided by what the width gives (:func:`gain`).
        loss: what small residual streams lose of the vector.
        difference: max |difference in logits| between the whole stand-in and the base under a hook.
        effect: that hook's effect on the logits.
        units: the same as ``unit`` of further carriers, by name, which hold other coordinates.
        after: how many coordinates these hold in the real model.
    """

    fills: Mapping[str, Fill]
    carrier: str
    source: str
    sink: str
    unit: float
    loss: Loss = field(default_factory=Loss)
    difference: float = math.inf
    effect: float = 0.0
    units: Mapping[str, float] = field(default_factory=dict)
    after: int = 0

    @property
    def epsilon(self) -> float:
        """Of the norm whose sum of squares is the constant; 0 where it is none."""
        return self.loss.epsilon if self.loss.power == 1 else 0.0

    def factor(self, hidden: int, carrier: str = "") -> float:
        """Residual gain per unit of the carrier, or of this further one, in a model of this width."""
        right = self.fills[carrier if carrier in self.units else self.carrier].right
        return self.units.get(carrier, self.unit) * (gain(right, hidden) if right else 1.0)


def find_forms(
    trial: InsertionTrial, shapes: Mapping[str, tuple[int, ...]] | None = None, hidden: int = 0
) -> Iterator[Form]:
    """Every content of the inserted block that is proven on the stand-in, best first; see :func:`why_none`.

    Args:
        trial: the extended stand-in.
        shapes: of the real model's block, by name; what is too narrow there for the identity is left out.
        hidden: width of the real residual stream.
    """
    neutral = neutral_fills(trial)
    if neutral is None:
        return
    sinks = [name for name, tensor in reversed(trial.parameters.items()) if tensor.ndim in (2, 3)]
    for source in ("bias", "norm bias", "norm"):
        for sink in sinks:
            if source == "norm" and not trial.narrow and shapes is not None and _too_narrow(shapes, sink, hidden):
                continue
            for fills, right, transposed in _sources(trial, neutral, sink, source):
                form = _measured(trial, neutral, fills, sink, right, transposed, source)
                form = form and unclamped(trial, form, hidden)
                if form is not None and (held := proven(trial, form)) is not None:
                    yield held
                    break
    yield from _direct(trial, neutral)


def _too_narrow(shapes: Mapping[str, tuple[int, ...]], sink: str, hidden: int) -> bool:
    shape = shapes.get(sink, ())
    if len(shape) < 2 or hidden not in shape[-2:]:
        return True
    return (shape[-1] if shape[-2] == hidden else shape[-2]) < 2 * hidden


def why_none(trial: InsertionTrial) -> str:
    """Why a block type has no form, in words."""
    if neutral_fills(trial) is None:
        return "a block of zeros is not the identity"
    return "no content of the block makes its output constant"


def _parent(trial: InsertionTrial, sink: str) -> str:
    owner, _, leaf = sink.rpartition(".")
    return owner.rpartition(".")[0] if leaf == "weight" else owner


def _sources(
    trial: InsertionTrial, neutral: Mapping[str, Fill], sink: str, source: str
) -> Iterator[tuple[dict[str, Fill], Right, bool]]:
    """Contents of all but ``sink`` that may make its input constant, with what is to be read of it."""
    shape = tuple(trial.parameters[sink].shape)
    hidden, parent = trial.hidden, _parent(trial, sink)
    beside = [name for name in trial.parameters if name.startswith(parent + ".") and name != sink] if parent else []
    for transposed in (False, True):
        if shape[-1 if transposed else -2] != hidden:
            continue
        inner = shape[-2 if transposed else -1]
        if source == "norm":
            yield from ((fills, right, transposed) for fills, right in quadratic(trial, beside, inner))
            continue
        own = sink.removesuffix("weight") + "bias"
        if source == "bias":
            biases = [name for name in beside if name.endswith("bias") and name != own]
            if biases:
                yield dict.fromkeys(biases, Fill("constant", 1.0)), "first", transposed
            continue
        norms = [name for name in neutral if name.removesuffix("weight") + "bias" in trial.parameters]
        if norms:
            fills = dict.fromkeys(norms, Fill("constant", 0.0))
            fills |= {name.removesuffix("weight") + "bias": Fill("constant", 1.0) for name in norms}
            for name in beside:
                tensor = trial.parameters[name]
                if tensor.ndim in (2, 3) and hidden in tensor.shape[-2:]:
                    fills[name] = Fill("column", 1.0, transposed=tensor.shape[-1] != hidden)
            yield fills, "first", transposed


def quadratic(trial: InsertionTrial, beside: list[str], inner: int) -> Iterator[tuple[dict[str, Fill], Right]]:
    """Contents of the matrices ``beside`` an output projection of ``inner`` neurons that give it squares."""
    single: list[tuple[str, bool]] = []
    double: list[tuple[str, bool]] = []
    for name in beside:
        shape = tuple(trial.parameters[name].shape)
        if len(shape) < 2 or trial.hidden not in shape[-2:]:
            continue
        transposed = shape[-1] != trial.hidden
        rows = shape[-1] if transposed else shape[-2]
        if rows in (inner, 2 * inner):
            (single if rows == inner else double).append((name, transposed))
    if len(double) == 1:
        name, transposed = double[0]
        for parts in (("gate", "up"), ("up", "gate")):
            for interleaved in (False, True):
                fill = Fill("pairs", parts=parts, interleaved=interleaved, transposed=transposed)
                yield {name: fill}, "gated"
    elif len(single) == 2:
        for parts in (("gate", "up"), ("up", "gate")):
            yield {
                name: Fill("pairs", parts=(part,), transposed=transposed)
                for (name, transposed), part in zip(single, parts, strict=True)
            }, "gated"  # fmt: skip
    elif len(single) == 1:
        name, transposed = single[0]
        yield {name: Fill("pairs", parts=("gate",), transposed=transposed)}, "mirrored"


def _measured(
    trial: InsertionTrial,
    neutral: Mapping[str, Fill],
    fills: Mapping[str, Fill],
    sink: str,
    right: Right,
    transposed: bool,
    source: str,
) -> Form | None:
    base = {**neutral, **fills}
    plain = Fill("carrier", right=right, transposed=transposed, factor=gain(right, trial.hidden))
    form = form_of(trial, base, sink, plain, source, sink)
    if form is not None:
        return form
    if not _moves(trial, {**base, sink: plain}):
        return None
    for norm, fill in neutral.items():
        if fill.kind != "constant" or tuple(trial.parameters[norm].shape) != (trial.hidden,) or norm in fills:
            continue
        for value in (_LOUD, _FAINT) if fill.value == 0.0 else (_LOUD,):
            flat = {**base, sink: Fill("flat", value, right=right, transposed=transposed)}
            carrier = Fill("carrier", offset=-1.0 if fill.value == 0.0 else 0.0)
            form = form_of(trial, flat, norm, carrier, source, sink)
            if form is not None and (fill.value == 1.0 or value == _FAINT):
                return form
            if form is None:
                break
    return None


def form_of(
    trial: InsertionTrial, fills: Mapping[str, Fill], carrier: str, fill: Fill, source: str, sink: str
) -> Form | None:
    """The form in which ``carrier`` holds the vector, if the block then adds a multiple of it to everything."""
    found = constant_gain(trial, {**fills, carrier: fill}, trial.vector)
    if found is None:
        return None
    unit, _ = found
    held = replace(fill, factor=unit * fill.factor)
    loss = loss_of(trial, {**fills, carrier: fill}, trial.vector)
    return Form({**fills, carrier: held}, carrier, source, sink, unit, loss)


def _direct(trial: InsertionTrial, neutral: Mapping[str, Fill]) -> Iterator[Form]:
    """Biases of the residual's width that reach it as they are."""
    for name in reversed(trial.parameters):
        if not name.endswith("bias") or tuple(trial.parameters[name].shape) != (trial.hidden,):
            continue
        form = form_of(trial, neutral, name, Fill("carrier"), "bias", name)
        if form is not None and (held := proven(trial, form)) is not None:
            yield held


def _moves(trial: InsertionTrial, fills: Mapping[str, Fill]) -> bool:
    trial.set(fills, trial.vector)
    gains = trial.gains(SCALES[1:2])
    return bool(torch.isfinite(gains[0]).all()) and float(gains[0].abs().max()) > 1e-6


def unclamped(trial: InsertionTrial, form: Form, hidden: int) -> Form:
    """The form with rows that stay below a limit of the activation, where the block has one.

    A token whose residual lies in one coordinate has sqrt(hidden) there behind the norm. Of a gate that is cut off at
    10 no more than 10 would be seen.

    Args:
        hidden: width of the real residual stream.
    """
    gates = [name for name, fill in form.fills.items() if fill.kind == "pairs" and "gate" in fill.parts]
    if form.source != "norm" or form.carrier != form.sink or not hidden or not gates:
        return form
    largest = math.sqrt(max(hidden / trial.hidden, 1.0))

    def with_slope(slope: float) -> dict[str, Fill]:
        return {name: replace(fill, slope=slope) if name in gates else fill for name, fill in form.fills.items()}

    for slope in (2.0**-halves for halves in range(9)):
        loud = with_slope(slope * largest)
        spread, peaked = (constant_gain(trial, loud, trial.vector, peaked=one) for one in (False, True))
        if spread is None or peaked is None or abs(peaked[0] - spread[0]) > TOLERANCE * abs(spread[0]):
            continue
        if slope == 1.0:
            return form
        fills, held = with_slope(slope), form.fills[form.carrier]
        plain = replace(held, factor=gain(held.right or "first", trial.hidden))
        return form_of(trial, fills, form.carrier, plain, form.source, form.sink) or form
    return form


def constant_gain(
    trial: InsertionTrial, fills: Mapping[str, Fill], vector: torch.Tensor, *, peaked: bool = False
) -> tuple[float, float] | None:
    """Gain per unit and deviation where the block adds a multiple of the vector, else None.

    Args:
        peaked: to residuals that lie in one coordinate, nearly all of each.
    """
    found = _shares(trial, fills, vector, peaked=peaked)
    if found is not None and abs(found[0]) < _QUIET:
        # So little is lost in what fp32 rounds off a large residual.
        vector = vector / abs(found[0])
        found = _shares(trial, fills, vector, peaked=peaked)
    if found is None:
        return None
    unit, gains = found
    scale = abs(unit) * float(vector.abs().max())
    deviation = max(float((gained - unit * vector).abs().max()) / scale for gained in gains)
    # A norm behind the projection would return the same for a vector of any length.
    other = vector.flip(0) * 3.0
    trial.set(fills, other)
    (again,) = trial.gains(SCALES[1:2], peaked=peaked)
    deviation = max(deviation, float((again - unit * other).abs().max()) / (3.0 * scale))
    if not deviation <= TOLERANCE:
        return None
    near = min((1.0, 0.5, 2.0, float(round(unit)) or 1.0), key=lambda simple: abs(simple - unit))
    exact = near if abs(near - unit) <= 2e-6 * abs(unit) else unit
    return exact, deviation


def _shares(
    trial: InsertionTrial, fills: Mapping[str, Fill], vector: torch.Tensor, *, peaked: bool
) -> tuple[float, list[torch.Tensor]] | None:
    """The gain per unit, and what is gained at each scale; None where it is nothing, or not finite."""
    trial.set(fills, vector)
    gains = trial.gains(SCALES[:2] if peaked else SCALES, peaked=peaked)
    if not all(bool(torch.isfinite(gained).all()) for gained in gains):
        return None
    unit = float(((gains[-2].double() @ vector.double()) / float(vector @ vector)).mean())
    return None if abs(unit) < 1e-6 else (unit, gains)


def proven(trial: InsertionTrial, form: Form) -> Form | None:
    """The form with what the whole stand-in computes, or None where that is not what the hook computes."""
    difference, effect, largest = trial.prove(form.fills)
    if not difference <= 1e-4 * max(1.0, largest) or not difference <= 1e-3 * effect:
        return None
    return replace(form, difference=difference, effect=effect)
