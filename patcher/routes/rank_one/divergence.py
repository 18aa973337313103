"""What a fitted plan is off by, in the model's own words: KL divergences on held-out text, in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from patcher.capture.forward import forward, steering_hooks
from patcher.checkpoint.safetensors_file import DTYPES
from patcher.routes.apply import slot_content
from patcher.routes.plan import Plan

KL_TOKENS = 4096
"""Held-out tokens on which the distributions are compared."""
_GROUP_TOKENS = 512


@contextmanager
def edited(model: nn.Module, plan: Plan, vectors: Mapping[int, torch.Tensor]) -> Iterator[None]:
    """While open, the model's own weights hold what the plan adds, rounded as it will be stored.

    Args:
        plan: a fitted plan; every tensor of it is added to what the base stores.
        vectors: layer -> [hidden] fp32.
    """
    saved: list[tuple[torch.Tensor, torch.Tensor]] = []
    try:
        with torch.no_grad():
            for write in plan.carriers:
                assert write.layer is not None
                parameter = model.get_parameter(write.parameter).data
                part = parameter if write.index is None else parameter[write.index]
                saved.append((part, part.clone()))
                slot = slot_content(write, plan.in_copy(vectors[write.layer].cpu()))
                part.copy_((part.float() + slot.to(part.device)).to(DTYPES[write.dtype]))
        yield
    finally:
        for part, before in reversed(saved):
            part.copy_(before)


def kl_report(
    plan: Plan,
    model: nn.Module,
    vectors: Mapping[int, torch.Tensor],
    held_out: Sequence[Sequence[int]],
    *,
    progress: Callable[[str], None] = lambda _line: None,
) -> dict[str, Any]:
    """KL(hook || fit) and KL(hook || base), means over held-out tokens in nats, and their ratio.

    Returns:
        ``kl_hook_fit``, ``kl_hook_base``, ``ratio`` and ``kl_tokens``; the first three are None where the weights are
        offloaded and cannot be edited here (the verification of the finished folder measures them all the same).
    """
    nothing = {"kl_hook_fit": None, "kl_hook_base": None, "ratio": None, "kl_tokens": 0}
    if any(model.get_parameter(write.parameter).device.type == "meta" for write in plan.carriers):
        return nothing
    groups, count = _groups(held_out)
    progress(f"comparing the fit with the hook on {count:,} held-out tokens")
    plain = fitted = 0.0
    for rows in groups:
        with steering_hooks(model, plan.blocks, vectors):
            hooked = [_log_probs(model, row) for row in rows]
        plain += sum(_divergence(there, _log_probs(model, row)) for there, row in zip(hooked, rows, strict=True))
        with edited(model, plan, vectors):
            fitted += sum(_divergence(there, _log_probs(model, row)) for there, row in zip(hooked, rows, strict=True))
    if not count or not plain > 0:
        return {**nothing, "kl_tokens": count}
    return {
        "kl_hook_fit": fitted / count,
        "kl_hook_base": plain / count,
        "ratio": fitted / plain,
        "kl_tokens": count,
    }


def _groups(held_out: Sequence[Sequence[int]]) -> tuple[list[list[Sequence[int]]], int]:
    """Rows of at most ``KL_TOKENS`` in all, in groups whose distributions fit in memory together."""
    groups: list[list[Sequence[int]]] = [[]]
    count, inside = 0, 0
    for row in held_out:
        if count >= KL_TOKENS:
            break
        if inside and inside + len(row) > _GROUP_TOKENS:
            groups.append([])
            inside = 0
        groups[-1].append(row)
        count, inside = count + len(row), inside + len(row)
    return groups, count


def _log_probs(model: nn.Module, row: Sequence[int]) -> torch.Tensor:
    inputs = {"input_ids": torch.tensor([list(row)]), "attention_mask": torch.ones(1, len(row), dtype=torch.long)}
    logits = forward(model, inputs, logits_to_keep=0).logits[0]
    return torch.log_softmax(logits.float(), dim=-1).cpu()


def _divergence(there: torch.Tensor, here: torch.Tensor) -> float:
    return float((there.exp() * (there - here)).sum(dim=-1).double().sum())
