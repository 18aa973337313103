"""The comparison: a reference run against a candidate run, check by check."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from patcher.architectures.residual import streams_of
from patcher.patched.route import Fit
from patcher.patched.stored import StoredLayer
from patcher.routes.plan import RESIDUAL_LIMIT, STORED_LIMIT
from patcher.verify.checks import Check, Comparison
from patcher.verify.image_comparison import IMAGE, causal_checks, image_checks
from patcher.verify.programs.stock_passes import OWN_DTYPE_PROBES, RESIDUAL_PROBES, UNSTEERED_PROBES

HARD_LIMIT = 1e-3
EFFECT_SHARE = 0.01
FP32_EPSILON = 1.2e-7
LOAD_KINDS = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs", "conversion_errors")
NOTHING_NEW = "no missing, no unexpected key beyond the base's"


@dataclass(frozen=True)
class Run:
    """What :mod:`patcher.verify.programs.stock_run` wrote."""

    tensors: Mapping[str, torch.Tensor]
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class FitLimits:
    """What a fitted route is held to, since it is not exact.

    Attributes:
        held_out_error: mean relative error of the added vector on held-out activations, as the build measured it.
        error: its limit, also for the residual stream on the probe texts.
        kl: largest KL(hook || fit) as a share of KL(hook || base).
    """

    held_out_error: float
    error: float
    kl: float

    @classmethod
    def of(cls, fit: Fit | None, error: float, kl: float) -> FitLimits:
        """From the manifest's ``route.fit``; a fit that was never measured is infinitely wrong."""
        measured = None if fit is None else fit.error_mean
        return cls(math.inf if measured is None else measured, error, kl)


def compare(
    reference: Run,
    candidate: Run,
    stored: Mapping[int, StoredLayer],
    *,
    architecture: str,
    tolerance: float,
    centred: bool = False,
    written: Sequence[str] = (),
    long_note: str = "",
    fit: FitLimits | None = None,
    quantised: str | None = None,
    images_needed: bool = False,
) -> Comparison:
    """Hold a candidate against the hook reference.

    Args:
        reference: the base under hooks.
        candidate: the finished folder, under none.
        stored: what the folder's tensors hold.
        architecture: the class that must have loaded the folder.
        tolerance: allowed difference of a log-probability; raised to 5x the noise floor, never above 1e-3.
        centred: the copy's residual stream is the base's without its mean over the hidden dimension.
        written: parameters that the folder gained; none of them may be unexpected to the loader.
        long_note: why no long prompt was run, if none was.
        fit: the limits of a fitted route; None for an exact one.
        quantised: the format of a quantised base.
        images_needed: whether a copy fails that could not be run with an image.
    """
    result = Comparison()
    add = result.checks.append
    worst = max(layer.rel_error for layer in stored.values())
    add(Check("stored vector", worst <= STORED_LIMIT, worst, STORED_LIMIT, "relative error of the vector in the file"))
    add(_loading(reference, candidate, architecture, written))
    same_ids = reference.facts["ids"] == candidate.facts["ids"]
    add(Check("tokenizer", same_ids, note="text to ids as the base does" if same_ids else "other ids than the base"))
    if not same_ids:
        return result
    add(_finite(candidate))

    count = len(reference.facts["ids"])
    result.noise_floor = noise_floor(reference, count)
    result.steering_effect = largest_difference(reference, "base", reference, "hook", count)
    result.max_abs_logprob_diff = largest_difference(reference, "hook", candidate, "candidate", count)
    result.tolerance = min(HARD_LIMIT, max(tolerance, 5 * result.noise_floor))
    limit = result.tolerance
    unsteered = largest_difference(reference, "base", candidate, "unsteered", min(UNSTEERED_PROBES, count))
    add(Check("without the vector", unsteered <= limit, unsteered, limit, "the copy minus what it holds, and the base"))
    if "shared" in candidate.facts:
        add(_shared_start(candidate, count, limit))
    residual = _residual_gain(reference, candidate, stored, centred=centred, fit=fit)
    result.vector_rel_error = residual.value if residual.value is not None else float("nan")
    if fit is not None:
        held_out = fit.held_out_error
        add(Check("constant", held_out <= fit.error, held_out, fit.error, "mean error on held-out activations"))
        result.kl_share = _kl_share(reference, candidate, count)
        add(Check("KL of the fit", result.kl_share <= fit.kl, result.kl_share, fit.kl, "share of KL(hook || base)"))
        add(residual)
        add(_own_dtype(reference, candidate, count, fitted=True))
        if reference.facts.get("image", {}).get("taken"):
            result.images = {
                "checked": False,
                "why": "the vector was fitted on text, and is not the hook's with an image",
            }
        return result
    add(Check("log-probabilities", result.max_abs_logprob_diff <= limit, result.max_abs_logprob_diff, limit))
    add(_share_of_effect(result, reference, candidate, count))
    add(residual)
    add(_measured("left padding", "left_padding", reference, candidate, limit))
    add(_greedy(reference, candidate, limit))
    if long_note:
        add(Check("long prompt", None, note=long_note))
    else:
        add(_measured("long prompt", "long_prompt", reference, candidate, limit))
    add(_own_dtype(reference, candidate, count))
    if quantised is not None:
        add(_quantised(quantised, reference, candidate))
    _with_images(result, reference, candidate, tolerance, count, needed=images_needed)
    return result


def _with_images(
    result: Comparison, reference: Run, candidate: Run, tolerance: float, count: int, *, needed: bool
) -> None:
    """What holds of a class that takes images; nothing is added for another."""
    limits = {"tolerance": tolerance, "hard_limit": HARD_LIMIT, "share": EFFECT_SHARE}
    checks, result.images = image_checks(reference, candidate, largest=largest, needed=needed, **limits)
    if result.images is not None and "tolerance" in result.images:
        limit, places = result.images["tolerance"], (f"{IMAGE}left_padding", f"{IMAGE}greedy")
        checks.append(_measured(f"{IMAGE}left padding", places[0], reference, candidate, limit))
        checks.append(_greedy(reference, candidate, limit, f"{IMAGE}greedy decoding with a cache", places[1]))
    result.checks += checks
    checks, result.causal_lm = causal_checks(reference, candidate, count=count, limit=result.tolerance, largest=largest)
    result.checks += checks


def _kl_share(reference: Run, candidate: Run, count: int) -> float:
    """KL(hook || candidate) over KL(hook || base), both means over every position of the probe texts."""
    suffix = "_amplified" if float(reference.facts["amplify"]) > 1 else ""
    apart, effect = 0.0, 0.0
    for number in range(count):
        hook = reference.tensors[f"hook{suffix}/{number}"].double()
        weight = hook.exp()
        apart += float((weight * (hook - candidate.tensors[f"candidate{suffix}/{number}"].double())).sum())
        effect += float((weight * (hook - reference.tensors[f"base/{number}"].double())).sum())
    share = apart / effect if effect > 0 else float("inf")
    return share if share == share else float("inf")


def noise_floor(reference: Run, count: int) -> float:
    """How far the same hook in two places is apart, on the probes that were run under both."""
    probes = [number for number in range(count) if f"hook_again/{number}" in reference.tensors]
    return max(largest(reference.tensors[f"hook/{one}"], reference.tensors[f"hook_again/{one}"]) for one in probes)


def _shared_start(candidate: Run, count: int, limit: float) -> Check:
    """Whether the copy from ids to logits is what it is from the base's residual stream on."""
    probes = [number for number in range(count) if f"candidate_whole/{number}" in candidate.tensors]
    found = candidate.tensors
    apart = max(
        (largest(found[f"candidate/{one}"], found[f"candidate_whole/{one}"]) for one in probes), default=math.inf
    )
    block = candidate.facts["shared"]
    note = f"all before block {block} is the base's, bit by bit; a probe that ran through it, and one that did not"
    return Check("shared start", apart <= limit, apart, limit, note)


def largest_difference(first: Run, first_pass: str, second: Run, second_pass: str, count: int) -> float:
    """The largest difference of a log-probability in two passes over the same ``count`` prompts."""
    return max(
        largest(first.tensors[f"{first_pass}/{number}"], second.tensors[f"{second_pass}/{number}"])
        for number in range(count)
    )


def largest(first: torch.Tensor, second: torch.Tensor) -> float:
    """max |first - second|; not-a-number, or another shape, counts as infinitely far apart."""
    if first.shape != second.shape:
        return float("inf")
    difference = torch.where(first == second, torch.zeros_like(first), (first - second).abs())
    return float(difference.nan_to_num(float("inf")).max())


def load_problems(base: Mapping[str, Any], copy: Mapping[str, Any], architecture: str) -> list[str]:
    """What the stock loader says of the copy and not of the base; each has ``loading`` (kind -> keys) and ``class``."""
    problems = []
    for kind in LOAD_KINDS:
        new = sorted(set(copy["loading"].get(kind, [])) - set(base["loading"].get(kind, [])))
        if new:
            problems.append(f"{kind.replace('_', ' ')}: {', '.join(new[:3])}{' ...' if len(new) > 3 else ''}")
    if copy["class"] != architecture:
        problems.append(f"loaded as {copy['class']}, not as {architecture}")
    return problems


def _loading(reference: Run, candidate: Run, architecture: str, written: Sequence[str]) -> Check:
    problems = load_problems(reference.facts, candidate.facts, architecture)
    dropped = [name for name in written if name in candidate.facts["loading"].get("unexpected_keys", [])]
    if dropped:
        problems.append(f"dropped by the loader: {dropped[0]}")
    return Check("loading", not problems, note="; ".join(problems) or NOTHING_NEW)


def _finite(candidate: Run) -> Check:
    bad = [name for name, tensor in candidate.tensors.items() if torch.isnan(tensor).any()]
    return Check("finite", not bad, note=f"not a number in {bad[0]}" if bad else "")


def _share_of_effect(result: Comparison, reference: Run, candidate: Run, count: int) -> Check:
    apart, effect, note = result.max_abs_logprob_diff, result.steering_effect, ""
    factor = float(reference.facts["amplify"])
    if factor > 1:
        apart = largest_difference(reference, "hook_amplified", candidate, "candidate_amplified", count)
        effect = largest_difference(reference, "base", reference, "hook_amplified", count)
        note = f"the effect is small, so it is probed at {factor:g} times the vector (effect {effect:.3g})"
    limit = EFFECT_SHARE * effect
    return Check("share of the effect", apart <= limit, apart, limit, note)


def _residual_gain(
    reference: Run, candidate: Run, stored: Mapping[int, StoredLayer], *, centred: bool, fit: FitLimits | None
) -> Check:
    factor = float(reference.facts["amplify"])
    suffix = "_amplified" if factor > 1 else ""
    error, passed = 0.0, True
    allowed = RESIDUAL_LIMIT if fit is None else fit.error
    for layer, held in stored.items():
        vector = held.stored * factor
        # Nothing is added before the first edited block, so nothing is amplified there.
        louder = suffix if layer != min(stored) else ""
        for number in range(min(RESIDUAL_PROBES, len(reference.facts["ids"]))):
            before = reference.tensors[f"residual/base{louder}/layer.{layer}/{number}"]
            after = candidate.tensors[f"residual/candidate{suffix}/layer.{layer}/{number}"]
            if before.shape != after.shape:
                return Check("residual stream", False, note="another shape")
            # Several streams, each of which gains the vector, may lie side by side.
            before, after = (streams_of(states[None], len(vector))[0] for states in (before, after))
            if centred:
                before = before - before.mean(dim=-1, keepdim=True)
            distance = (after - before - vector).double().norm(dim=-1)
            relative = (distance / vector.double().norm()).nan_to_num(float("inf"))
            # A position whose residual is huge beside the vector cannot show it better than fp32 resolves.
            resolution = 8 * FP32_EPSILON * before.double().norm(dim=-1) / vector.double().norm()
            if fit is None:
                passed = passed and bool((relative <= RESIDUAL_LIMIT + resolution).all())
                error = max(error, float(relative.median()))
            else:
                error = max(error, float(relative.mean()))
                passed = error <= fit.error
    read = candidate.facts.get("residual_read", "")
    return Check("residual stream", passed, error, allowed, f"gain after the block against the vector; by {read}")


def _measured(name: str, key: str, reference: Run, candidate: Run, limit: float) -> Check:
    if key not in reference.tensors:
        return Check(name, None, note=reference.facts["skipped"].get(key, "not run"))
    if key not in candidate.tensors:
        return Check(name, False, note=candidate.facts["skipped"].get(key, "the candidate could not run it"))
    difference = largest(reference.tensors[key], candidate.tensors[key])
    return Check(name, difference <= limit, difference, limit)


def _greedy(
    reference: Run,
    candidate: Run,
    limit: float,
    name: str = "greedy decoding with a cache",
    key: str = "greedy",
) -> Check:
    if key not in reference.tensors or key not in candidate.tensors:
        return _measured(name, key, reference, candidate, limit)
    expected, found = reference.facts[key], candidate.facts[key]
    same = 0
    while same < min(len(expected), len(found)) and expected[same] == found[same]:
        same += 1
    steps = min(same + 1, len(reference.tensors[key]), len(candidate.tensors[key]))
    difference = largest(reference.tensors[key][:steps], candidate.tensors[key][:steps])
    # Up to the first token that differs the two have seen the same text; a tie may fall either way.
    note = "" if expected == found else f"{same} tokens agree, then a tie within the tolerance"
    if "reads" in reference.facts:
        note = f"{len(expected)} tokens, since each more would read the model from the disk again" + (
            note and f"; {note}"
        )
    return Check(name, difference <= limit, difference, limit, note)


def _quantised(method: str, reference: Run, candidate: Run) -> Check:
    """Whether the own dtype was computed with the weights as they are stored."""
    name = f"quantised weights ({method})"
    if "own_dtype/0" not in reference.tensors or "own_dtype/0" not in candidate.tensors:
        return Check(name, None, note=reference.facts["skipped"].get("own_dtype", "not run as they are stored"))
    if not reference.facts["quantised"]:
        return Check(
            name, None, note="transformers dequantises them on this machine; its kernels for them were not run"
        )
    return Check(name, True, note="run as they are stored, in the own dtype")


def _own_dtype(reference: Run, candidate: Run, count: int, *, fitted: bool = False) -> Check:
    dtype = str(reference.facts.get("own_dtype", ""))
    name = f"own dtype ({dtype})" if dtype else "own dtype"
    if "own_dtype/0" not in reference.tensors or "own_dtype/0" not in candidate.tensors:
        if "own_dtype/0" in reference.tensors:
            return Check(name, False, note=candidate.facts["skipped"].get("own_dtype", "could not run"))
        note = reference.facts["skipped"].get("own_dtype", "the checkpoint is fp32, in which all else was checked")
        return Check(name, None, note=note)
    errors = []
    # A fitted copy is another function than the hook's, so its rounding is measured against itself in fp32.
    truths = (reference, "hook"), (candidate, "candidate") if fitted else (reference, "hook")
    for run, (truth, label) in zip((reference, candidate), truths, strict=True):
        apart = [
            (run.tensors[f"own_dtype/{number}"] - truth.tensors[f"{label}/{number}"]).abs().mean()
            for number in range(min(OWN_DTYPE_PROBES, count))
        ]
        errors.append(float(torch.stack(apart).mean()))
    limit = 1.5 * errors[0] + 1e-3
    return Check(
        name, errors[1] <= limit, errors[1], limit, "mean distance from the fp32 truth; limit: 1.5x the hook's own"
    )
