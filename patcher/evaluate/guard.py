"""The guard: how much damage on neutral text is accepted."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from patcher.capture.logits import LogitsSource
from patcher.evaluate.damage import NeutralText
from patcher.evaluate.statistics import bootstrap_interval
from patcher.patched.evaluation import Guard
from patcher.recipe.evaluate import GuardSpec
from patcher.recipe.schema import Recipe


def within_guard(guard: GuardSpec, base_perplexity: float, kl: float, perplexity: float) -> bool:
    """Whether a damage is accepted; one that is not a number never is."""
    if math.isnan(kl) or math.isnan(perplexity):
        return False
    if guard.kl is not None and not kl <= guard.kl:
        return False
    return guard.perplexity is None or perplexity <= guard.perplexity * base_perplexity


def guard_of(
    recipe: Recipe, source: LogitsSource, texts: Sequence[Sequence[int]], name: str, vectors: Mapping[int, torch.Tensor]
) -> dict[str, Any]:
    """`evaluation.guard`: the damage of the whole edit, and whether it is accepted."""
    chosen = texts[: recipe.evaluate.neutral_limit]
    base, steered = NeutralText(chosen).damage(source, [{}, vectors])
    guard = recipe.evaluate.guard
    low, high = bootstrap_interval(steered.kl, recipe.seed, weights=steered.tokens)
    return {
        "kl": steered.mean_kl,
        "kl_low": low,
        "kl_high": high,
        "kl_limit": guard.kl,
        "perplexity": {"base": base.perplexity, "steered": steered.perplexity},
        "perplexity_limit": guard.perplexity,
        "within": within_guard(guard, base.perplexity, steered.mean_kl, steered.perplexity),
        "text": f"{len(chosen)} {name}, {sum(map(len, chosen))} tokens",
    }


def beyond_guard(guard: Guard) -> str:
    """A guard that does not hold, in words."""
    limits = []
    if guard.kl_limit is not None:
        limits.append(f"KL divergence {guard.kl:.3g} nats a token (guard {guard.kl_limit:g})")
    if guard.perplexity_limit is not None and guard.perplexity.base and guard.perplexity.steered:
        times = guard.perplexity.steered / guard.perplexity.base
        limits.append(f"perplexity {times:.3g} times the base's (guard {guard.perplexity_limit:g})")
    return "the damage on neutral text is beyond the guard: " + ", ".join(limits)
