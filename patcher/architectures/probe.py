"""Is a bias slot a constant shift of the residual stream? Measured, not believed.

On a tiny random model of the same structure, a random vector is put into the slot. The slot is usable when the
residual after its block gains the same multiple of that vector at every position of every prompt, and when the
model then computes what it computes under a hook that adds this multiple to the block's output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from patcher.architectures.model_class import causal_lm_from_config, on_meta, quiet_transformers, submodule, with_flags
from patcher.errors import InputError

TOLERANCE = 1e-3
MAX_PARAMETERS = 200_000_000
_AMPLITUDES = (1.0, 6.0)


@dataclass(frozen=True)
class ProbeResult:
    """What a slot does.

    Attributes:
        constant: whether the residual gains ``factor`` times the slot's content, everywhere.
        factor: residual gain per unit of the slot (1 for a plain bias, ``residual_multiplier`` for Granite ...).
        deviation: largest deviation from that, relative to the shift.
        reason: why not, in words.
    """

    constant: bool
    factor: float
    deviation: float
    reason: str | None = None


def probe_slot(tiny_config: Any, blocks: str, slot: str, layer: int, *, trust_remote_code: bool = False) -> ProbeResult:
    """Measure what ``slot`` of block ``layer`` adds to the residual stream.

    Args:
        tiny_config: from :func:`patcher.architectures.shrink.shrink_config`, with the route's flags set.
        blocks: path of the list of decoder blocks, such as ``model.layers``.
        slot: the parameter inside a block, such as ``mlp.down_proj.bias``; [hidden] or [experts, hidden].
        layer: 0-based index in the tiny model.
    """
    generator = torch.Generator().manual_seed(0)
    model = build_stand_in(tiny_config, trust_remote_code=trust_remote_code)
    randomise(model, generator)
    block = submodule(model, f"{blocks}.{layer}")
    parameter = dict(block.named_parameters()).get(slot)
    if parameter is None:
        return ProbeResult(False, 0.0, float("inf"), f"the class creates no `{slot}` in this block")
    width = parameter.shape[-1]
    ids = torch.randint(3, int(tiny_config.vocab_size), (2, 11), generator=generator)
    vector = torch.randn(width, generator=generator)
    with torch.no_grad(), quiet_transformers():
        parameter.zero_()
        still, _ = run_on(model, block, ids)
        if still.shape[-1] != width:
            return ProbeResult(False, 0.0, float("inf"), "the slot's width is not the residual's")
        factor, deviation = 0.0, 0.0
        for amplitude in _AMPLITUDES:
            parameter.copy_((amplitude * vector).expand_as(parameter))
            shifted, logits = run_on(model, block, ids)
            gain = (shifted - still) / amplitude
            if amplitude == _AMPLITUDES[0]:
                factor = float((gain * vector).sum() / (vector * vector).sum() / gain[..., 0].numel())
            scale = max(abs(factor) * float(vector.abs().max()), 1e-12)
            deviation = max(deviation, float((gain - factor * vector).abs().max()) / scale)
            parameter.zero_()
            _, hooked = run_on(model, block, ids, add=amplitude * factor * vector)
            downstream = float((logits - hooked).abs().max())
            # Comparisons with NaN are false, so none of the limits below would be broken by it.
            if not all(bool(torch.isfinite(seen).all()) for seen in (still, shifted, logits, hooked)):
                return ProbeResult(False, factor, float("inf"), "the tiny stand-in does not compute finite numbers")
            if abs(factor) < 1e-6:
                return ProbeResult(False, factor, deviation, "the slot does not reach the residual stream")
            if deviation > TOLERANCE:
                reason = f"a norm follows it: its effect depends on the token (off by {deviation:.0%} of the vector)"
                return ProbeResult(False, factor, deviation, reason)
            if downstream > 1e-3 * max(1.0, float(hooked.abs().max())):
                return ProbeResult(False, factor, downstream, "later blocks see another change than the residual's")
        if _looks_ahead(model, block, ids):
            return ProbeResult(False, factor, deviation, "with this config the model is not causal (an encoder)")
    return ProbeResult(True, factor, deviation)


def flags_change_nothing(tiny_config: Any, flags: Mapping[str, Any], *, trust_remote_code: bool = False) -> bool:
    """Whether the class under ``flags``, with zeros in all that they create, computes what it computes without them.

    Args:
        tiny_config: from :func:`patcher.architectures.shrink.shrink_config`, without the flags.
        flags: config keys of a route.
    """
    generator = torch.Generator().manual_seed(0)
    plain = build_stand_in(tiny_config, trust_remote_code=trust_remote_code)
    flagged = build_stand_in(with_flags(tiny_config, flags), trust_remote_code=trust_remote_code)
    randomise(plain, generator)
    try:
        missing = flagged.load_state_dict(plain.state_dict(), strict=False).missing_keys
    except RuntimeError:
        return False  # shapes changed
    ids = torch.randint(3, int(tiny_config.vocab_size), (2, 11), generator=generator)
    with torch.no_grad(), quiet_transformers():
        for name in missing:
            flagged.state_dict()[name].zero_()
        before, after = logits_of(plain, ids), logits_of(flagged, ids)
    return bool((before - after).abs().max() <= 1e-5 * max(1.0, float(before.abs().max())))


def build_stand_in(tiny_config: Any, *, trust_remote_code: bool) -> nn.Module:
    """A tiny model in fp32, with the same initial weights each time.

    Raises:
        InputError: it would not be tiny, or the class cannot be built.
    """
    size = sum(
        parameter.numel() for parameter in on_meta(tiny_config, trust_remote_code=trust_remote_code).parameters()
    )
    if size > MAX_PARAMETERS:
        raise InputError(f"the stand-in has {size:,} parameters: sizes that it keeps elsewhere were not made small")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return causal_lm_from_config(tiny_config, trust_remote_code=trust_remote_code).float().eval()


def _looks_ahead(model: nn.Module, block: nn.Module, ids: torch.Tensor) -> bool:
    changed = ids.clone()
    changed[:, -1] = 3 + (changed[:, -1] + 1) % (int(ids.max()) - 2)
    before, after = run_on(model, block, ids)[1], run_on(model, block, changed)[1]
    return float((before - after)[:, :-1].abs().max()) > 1e-3 * max(1.0, float(before.abs().max()))


def run_on(
    model: nn.Module, block: nn.Module, ids: torch.Tensor, add: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What ``block`` returns ([batch, position, hidden]) and the logits, with ``add`` added to what it returns."""
    seen: list[torch.Tensor] = []

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        hidden = output if isinstance(output, torch.Tensor) else output[0]
        if add is not None:
            hidden = hidden + add
        seen.append(hidden.detach().clone())
        return hidden if isinstance(output, torch.Tensor) else (hidden, *output[1:])

    handle = block.register_forward_hook(hook)
    try:
        logits = logits_of(model, ids)
    finally:
        handle.remove()
    return seen[-1].float(), logits


def logits_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """[batch, position, vocabulary] fp32, computed without a cache."""
    call: Callable[..., Any] = model
    logits: torch.Tensor = call(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    return logits.float()


def randomise(model: nn.Module, generator: torch.Generator) -> None:
    """Norms and scales of one and biases of zero would hide what a slot goes through.

    A factor that is a weight differs from model to model, so no rule over the config can state it; here it shows.
    """
    with torch.no_grad():
        stored = model.state_dict()
        buffers = [(name, buffer) for name, buffer in model.named_buffers() if name in stored]
        for name, tensor in (*model.named_parameters(), *buffers):
            if not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("bias"):
                tensor.add_(0.1 * noise)
            elif tensor.ndim <= 1:
                tensor.add_(0.2 * noise)
            else:
                tensor.mul_(2.0)
