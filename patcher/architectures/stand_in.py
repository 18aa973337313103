"""A tiny random model that stands for a real one: built, given weights that hide nothing, and run under a hook."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from patcher.architectures.model_class import causal_lm_from_config, on_meta, quiet_transformers
from patcher.architectures.residual import gained, residual_hook, stream_width, streams_of
from patcher.architectures.towers import left_on_meta, places_without, towers_of
from patcher.errors import InputError
from patcher.errors.causes import cause_of

MAX_PARAMETERS = 200_000_000
FAILURES = (
    RuntimeError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, InputError, StrictDataclassError,
)  # fmt: skip
"""What classes raise on a stand-in that they were not made for; that is a finding, not a failure of ours."""


@dataclass(frozen=True)
class RandomStandIn:
    """A tiny random model, and a prompt for it.

    Attributes:
        model: in fp32, with the same weights each time.
        ids: [2, 11] int64.
        generator: what is drawn next is the same each time as well.
    """

    model: nn.Module
    ids: torch.Tensor
    generator: torch.Generator

    @classmethod
    def of(cls, tiny_config: Any, *, trust_remote_code: bool) -> RandomStandIn:
        """The stand-in under a config from :func:`patcher.architectures.shrink.shrink_config`.

        Raises:
            InputError: it would not be tiny, or the class cannot be built.
        """
        generator = torch.Generator().manual_seed(0)
        model = build_stand_in(tiny_config, trust_remote_code=trust_remote_code)
        randomise(model, generator)
        ids = torch.randint(3, int(tiny_config.vocab_size), (2, 11), generator=generator)
        return cls(model, ids, generator)

    def random(self, *shape: int) -> torch.Tensor:
        """Normally distributed numbers of this shape, fp32."""
        return torch.randn(*shape, generator=self.generator)


def build_stand_in(tiny_config: Any, *, trust_remote_code: bool) -> nn.Module:
    """A tiny model in fp32, with the same initial weights each time.

    Raises:
        InputError: it would not be tiny, or the class cannot be built.
    """
    meta = on_meta(tiny_config, trust_remote_code=trust_remote_code)
    towers = towers_of(meta)
    outside = tuple(f"{tower}." for tower in towers)
    size = sum(parameter.numel() for name, parameter in meta.named_parameters() if not name.startswith(outside))
    if size > MAX_PARAMETERS:
        raise InputError(f"the stand-in has {size:,} parameters: sizes that it keeps elsewhere were not made small")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if towers:
            return _without_towers(meta, towers).eval()
        return causal_lm_from_config(tiny_config, trust_remote_code=trust_remote_code).float().eval()


def _without_towers(meta: Any, towers: tuple[str, ...]) -> nn.Module:
    """A wrapper with random weights in all but its towers: they stay on meta, since no text passes through them."""
    devices = places_without(meta, towers, "cpu")
    with quiet_transformers(), left_on_meta():
        model: nn.Module = type(meta).from_pretrained(
            None, config=meta.config, state_dict={}, dtype=torch.float32, device_map=devices, local_files_only=True
        )
    # What was not loaded by any conversion would be saved by none.
    vars(model).pop("_weight_conversions", None)
    return model


def randomise(model: nn.Module, generator: torch.Generator) -> None:
    """Norms and scales of one and biases of zero would hide what a slot goes through.

    A factor that is a weight differs from model to model, so no rule over the config can state it; here it shows.
    """
    with torch.no_grad():
        stored = model.state_dict()
        buffers = [(name, buffer) for name, buffer in model.named_buffers() if name in stored]
        for name, tensor in (*model.named_parameters(), *buffers):
            if tensor.is_meta or not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("bias"):
                tensor.add_(0.1 * noise)
            elif tensor.ndim <= 1:
                tensor.add_(0.2 * noise)
            else:
                tensor.mul_(2.0)


def logits_of(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """[batch, position, vocabulary] fp32, computed without a cache.

    Args:
        ids: [batch, position].
        mask: [batch, position], 0 where a row is filled up on its left.
    """
    call: Callable[..., Any] = model
    places = {} if mask is None else {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    mask = torch.ones_like(ids) if mask is None else mask
    logits: torch.Tensor = call(input_ids=ids, attention_mask=mask, use_cache=False, **places).logits
    return logits.float()


def why_it_does_not_run(tiny_config: Any, *, trust_remote_code: bool) -> str | None:
    """What the stock class raises on a prompt of text, unchanged as it is; None where it runs, or is not built here."""
    try:
        stand_in = RandomStandIn.of(tiny_config, trust_remote_code=trust_remote_code)
    except FAILURES:
        return None
    try:
        logits_of(stand_in.model, stand_in.ids)
    except FAILURES as error:
        # A tower without weights is this package's doing, not the class's.
        return None if "meta" in str(error) else f"{type(error).__name__}: {cause_of(error)}"
    return None


def run_on(
    model: nn.Module,
    block: nn.Module,
    ids: torch.Tensor,
    add: torch.Tensor | None = None,
    *,
    mask: torch.Tensor | None = None,
    entering: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The residual stream after ``block`` ([batch, position, hidden] fp32), and the logits.

    Of several streams it is [batch, position, streams, hidden]. Of a block that is run several times, it is what the
    first run gives: what later ones get is changed by the earlier.

    Args:
        ids, mask: see :func:`logits_of`.
        add: what the residual stream gains there, [hidden] or of its own shape.
        entering: look at (and add to) the residual stream before the block instead.
    """
    seen: list[torch.Tensor] = []

    def changed(hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden if add is None else gained(hidden, add)
        seen.append(streams_of(hidden.detach().clone().float(), stream_width(model)))
        return hidden

    with residual_hook(block, changed, entering=entering):
        logits = logits_of(model, ids, mask)
    return seen[0], logits


def apart(logits: torch.Tensor, hooked: torch.Tensor) -> float:
    """The largest difference, in units of the largest of the second (at least 1); NaN if there is any."""
    return float((logits - hooked).abs().max()) / max(1.0, float(hooked.abs().max()))
