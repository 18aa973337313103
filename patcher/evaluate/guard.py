"""The guard: how much damage on neutral text is accepted."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from patcher.capture.logits import LogitsSource
from patcher.evaluate.contributions import Contributions
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
    recipe: Recipe,
    source: LogitsSource,
    neutral: NeutralText,
    texts: int,
    name: str,
    vectors: Mapping[int, torch.Tensor],
    contributions: Contributions,
) -> dict[str, Any]:
    """`evaluation.guard`: the damage of the whole edit on the first ``texts`` texts, and whether it is accepted.

    Args:
        name: what the texts are.
        contributions: filled with the tokens that make up the divergence.
    """
    base, steered = neutral.damage(source, [{}, vectors], texts, contributions)
    tokens, compared = sum(map(len, neutral.texts[:texts])), neutral.compared(texts)
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
        "text": f"{texts} {name}, {tokens} tokens" + (f", {compared} of them compared" if compared < tokens else ""),
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
