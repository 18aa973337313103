"""The comparison on a prompt with an image, and what ``AutoModelForCausalLM`` makes of a multimodal copy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from patcher.verify.checks import Check

IMAGE = "image "
GIVEN = f"{IMAGE}given/"
Largest = Callable[[torch.Tensor, torch.Tensor], float]


def image_checks(
    reference: Any,
    candidate: Any,
    *,
    tolerance: float,
    hard_limit: float,
    share: float,
    largest: Largest,
    needed: bool = False,
) -> tuple[list[Check], dict[str, Any] | None]:
    """Hold the copy against the hook on a text, an image and a text.

    Args:
        reference: the run of the base.
        candidate: the run of the copy.
        tolerance: of a log-probability, before it is raised to 5x the noise floor on this prompt.
        hard_limit: what it is never above.
        share: the largest difference as a share of the steering effect.
        largest: the largest difference of two tensors.
        needed: whether a copy fails that could not be run with an image: the edit is in what makes features of one.

    Returns:
        The checks, and ``images`` of an entry of ``verification``; no check and None where the class takes none.
    """
    facts, ours = reference.facts.get("image", {}), candidate.facts.get("image", {})
    if not facts.get("taken"):
        return [], None
    name = f"{IMAGE}prompt"
    if "by" not in facts:
        why = str(facts.get("why", "not run"))
        passed = False if needed else None
        return [Check(name, passed, note=why)], {"checked": False, "why": why}
    record: dict[str, Any] = {"checked": True, "by": facts["by"], "why": facts["why"], "positions": facts["positions"]}
    if "by" not in ours:
        return [Check(name, False, note=f"the copy runs none: {ours.get('why', 'not run')}")], record
    problem = _other_inputs(reference, candidate)
    checks = [Check(name, not problem, note=problem or f"{facts['positions']} tokens; the image by {facts['by']}")]
    if problem:
        return checks, record
    found, copy = reference.tensors, candidate.tensors

    def apart(first: str, second: str) -> float:
        return largest(found[f"{IMAGE}{first}/0"], {**found, **copy}[f"{IMAGE}{second}/0"])

    limit = min(hard_limit, max(tolerance, 5 * apart("hook", "hook_again")))
    difference, effect = apart("hook", "candidate"), apart("base", "hook")
    record |= {"max_abs_logprob_diff": difference, "steering_effect": effect, "tolerance": limit}
    checks.append(Check(f"{IMAGE}log-probabilities", difference <= limit, difference, limit))
    name = f"{IMAGE}share of the effect"
    if float(reference.facts["amplify"]) > 1:
        if f"{IMAGE}hook_amplified/0" not in found:
            note = "the effect is small, and a prompt with an image was not run with a larger one"
            return [*checks, Check(name, None, note=note)], record
        difference, effect = apart("hook_amplified", "candidate_amplified"), apart("base", "hook_amplified")
    checks.append(Check(name, difference <= share * effect, difference, share * effect))
    return checks, record


def _other_inputs(reference: Any, candidate: Any) -> str:
    """Why the copy's prompt is another than the base's; empty where it is the same."""
    ours, theirs = candidate.facts["image"], reference.facts["image"]
    if ours["by"] != theirs["by"]:
        return f"the image of the copy is made by {ours['by']}, that of the base by {theirs['by']}"
    if ours["ids"] != theirs["ids"]:
        return "the copy's processor makes other tokens of the same prompt"
    names = [{key for key in run.tensors if key.startswith(GIVEN)} for run in (reference, candidate)]
    same = names[0] == names[1] and all(torch.equal(reference.tensors[key], candidate.tensors[key]) for key in names[0])
    return "" if same else "the copy's processor makes other pixel values of the same image"


def causal_checks(
    reference: Any, candidate: Any, *, count: int, limit: float, largest: Largest
) -> tuple[list[Check], dict[str, Any] | None]:
    """What ``AutoModelForCausalLM`` does: the check of the text part where it loads that alone, and ``causal_lm``."""
    facts = candidate.facts.get("causal_lm")
    if facts is None:
        return [], None
    record = {"does": facts["does"], "architecture": None if facts["does"] == "refuses" else facts["said"]}
    if facts["does"] != "text":
        return [], record
    name = f"text part alone ({facts['said']})"
    if "causal_lm/0" not in candidate.tensors:
        return [Check(name, None, note=candidate.facts["skipped"].get("causal_lm", "not run"))], record
    apart = max(
        largest(reference.tensors[f"hook/{one}"], candidate.tensors[f"causal_lm/{one}"]) for one in range(count)
    )
    return [Check(name, apart <= limit, apart, limit, "loaded by AutoModelForCausalLM")], record
