"""Is a bias slot a constant shift of the residual stream? Measured, not believed.

On a tiny random model of the same structure, a random vector is put into the slot. The slot is usable when two things
hold. The residual after its block gains the same multiple of that vector at every position of every prompt. And the
model then computes what it computes under a hook that adds this multiple to the block's output.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from patcher.architectures.model_class import quiet_transformers, submodule, with_flags
from patcher.architectures.stand_in import RandomStandIn, apart, build_stand_in, logits_of, run_on

TOLERANCE = 1e-3
_AMPLITUDES = (1.0, 6.0)


@dataclass(frozen=True)
class ProbeResult:
    """What a slot does.

    Attributes:
        constant: whether the residual gains ``factor`` times the slot's content, everywhere.
        factor: residual gain per unit of the slot (1 for a plain bias, ``residual_multiplier`` for Granite ...).
        deviation: largest deviation from that, relative to the shift.
        reason: why not, in words.
        times: the parameter of the same module whose entries multiply the slot's one by one, before ``factor``.
    """

    constant: bool
    factor: float
    deviation: float
    reason: str | None = None
    times: str | None = None

    @classmethod
    def refused(cls, reason: str, factor: float = 0.0, deviation: float = math.inf) -> ProbeResult:
        """What a slot is that cannot be used."""
        return cls(False, factor, deviation, reason)


def probe_slot(tiny_config: Any, blocks: str, slot: str, layer: int, *, trust_remote_code: bool = False) -> ProbeResult:
    """Measure what ``slot`` of block ``layer`` adds to the residual stream.

    Args:
        tiny_config: from :func:`patcher.architectures.shrink.shrink_config`, with the flags set that create the slot.
        blocks: path of the list of decoder blocks, such as ``model.layers``.
        slot: the parameter inside a block, such as ``mlp.down_proj.bias``; [hidden] or [experts, hidden].
        layer: 0-based index in the tiny model.
    """
    stand_in = RandomStandIn.of(tiny_config, trust_remote_code=trust_remote_code)
    model, ids = stand_in.model, stand_in.ids
    block = submodule(model, f"{blocks}.{layer}")
    parameter = dict(block.named_parameters()).get(slot)
    if parameter is None:
        return ProbeResult.refused(f"the class creates no `{slot}` in this block")
    vector = stand_in.random(parameter.shape[-1])
    with torch.no_grad(), quiet_transformers():
        parameter.zero_()
        still, _ = run_on(model, block, ids)
        if still.shape[-1] != len(vector):
            return ProbeResult.refused("the slot's width is not the residual's")
        factor, deviation = 0.0, 0.0
        times, weight = None, torch.ones(len(vector))
        for amplitude in _AMPLITUDES:
            parameter.copy_((amplitude * vector).expand_as(parameter))
            shifted, logits = run_on(model, block, ids)
            gain = (shifted - still) / amplitude
            if amplitude == _AMPLITUDES[0]:
                times, weight = _multiplier(block, slot, gain, vector)
                factor = float((gain * vector * weight).sum() / (vector * weight).square().sum() / gain[..., 0].numel())
            wanted = factor * weight * vector
            scale = max(float(wanted.abs().max()), 1e-12)
            deviation = max(deviation, float((gain - wanted).abs().max()) / scale)
            parameter.zero_()
            _, hooked = run_on(model, block, ids, add=amplitude * wanted)
            # Comparisons with NaN are false, so none of the limits below would be broken by it.
            if not all(bool(torch.isfinite(seen).all()) for seen in (still, shifted, logits, hooked)):
                return ProbeResult.refused("the tiny stand-in does not compute finite numbers", factor)
            if abs(factor) < 1e-6:
                return ProbeResult.refused("the slot does not reach the residual stream", factor, deviation)
            if deviation > TOLERANCE:
                follows = "a norm follows" if still.ndim == 3 else f"the gates of {still.shape[2]} streams follow"
                reason = f"{follows} it: its effect depends on the token (off by {deviation:.0%} of the vector)"
                return ProbeResult.refused(reason, factor, deviation)
            if (downstream := apart(logits, hooked)) > 1e-3:
                reason = "later blocks see another change than the residual's"
                return ProbeResult.refused(reason, factor, downstream)
        if _looks_ahead(model, ids):
            reason = "with this config the model is not causal (an encoder)"
            return ProbeResult.refused(reason, factor, deviation)
    return ProbeResult(True, factor, deviation, times=times)


def _multiplier(
    block: nn.Module, slot: str, gain: torch.Tensor, vector: torch.Tensor
) -> tuple[str | None, torch.Tensor]:
    """The parameter beside the slot that each entry is multiplied by, and its content; None and ones where none is.

    Args:
        gain: [..., hidden]; what the residual gains by ``vector`` [hidden] in the slot.
    """
    module, _, own = slot.rpartition(".")
    for name, other in block.get_submodule(module).named_parameters(recurse=False):
        if name == own or other.shape != vector.shape or float(other.std()) < TOLERANCE:
            continue
        if float((gain - other * vector).abs().max()) < TOLERANCE * float(vector.abs().max()):
            return f"{module}.{name}", other.detach().clone()
    return None, torch.ones(len(vector))


def flags_change_nothing(tiny_config: Any, flags: Mapping[str, Any], *, trust_remote_code: bool = False) -> bool:
    """Whether the class under ``flags``, with zeros in all that they create, computes what it computes without them.

    Args:
        tiny_config: from :func:`patcher.architectures.shrink.shrink_config`, without the flags.
        flags: config keys that create a slot.
    """
    plain = RandomStandIn.of(tiny_config, trust_remote_code=trust_remote_code)
    flagged = build_stand_in(with_flags(tiny_config, flags), trust_remote_code=trust_remote_code)
    try:
        missing = flagged.load_state_dict(plain.model.state_dict(), strict=False).missing_keys
    except RuntimeError:
        return False  # shapes changed
    with torch.no_grad(), quiet_transformers():
        for name in missing:
            flagged.state_dict()[name].zero_()
        return apart(logits_of(flagged, plain.ids), logits_of(plain.model, plain.ids)) <= 1e-5


def _looks_ahead(model: nn.Module, ids: torch.Tensor) -> bool:
    changed = ids.clone()
    changed[:, -1] = 3 + (changed[:, -1] + 1) % (int(ids.max()) - 2)
    before, after = logits_of(model, ids), logits_of(model, changed)
    return float((before - after)[:, :-1].abs().max()) > 1e-3 * max(1.0, float(before.abs().max()))
