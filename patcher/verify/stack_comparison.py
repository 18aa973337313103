"""The comparison of a folder in another stack with the hook reference of transformers, check by check.

A stack has an error of its own (another kernel, a table for GELU), whatever the folder. It is measured in the same run
on the base without any vector, and is what the tolerance gives way to; the share of the effect is not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from patcher.routes.plan import STORED_LIMIT
from patcher.verify.checks import Check, Comparison
from patcher.verify.comparison import EFFECT_SHARE, HARD_LIMIT
from patcher.verify.stack_jobs import StackRun

OWN_ERRORS = 4.0
LARGEST_SHARE = 0.1
GAIN_LIMIT = 0.05
LEAST_SEEN = 0.5


@dataclass(frozen=True)
class Expected:
    """What transformers computes in fp32.

    Attributes:
        plain: the base, log-probabilities [positions, vocabulary] of each prompt.
        steered: the base under the hook; of a fitted route, the folder itself.
        noise_floor: the same hook in two equivalent places.
        greedy: ids of the steered model's greedy continuation; empty where it was not run.
        greedy_logprobs: [steps, vocabulary] beside it.
        text_ids: what each text is in transformers, perhaps cut off; for stacks with a tokenizer of their own.
    """

    plain: Sequence[torch.Tensor]
    steered: Sequence[torch.Tensor]
    noise_floor: float = 0.0
    greedy: Sequence[int] = ()
    greedy_logprobs: torch.Tensor | None = None
    text_ids: Sequence[Sequence[int]] = ()


@dataclass
class StackComparison(Comparison):
    """A :class:`Comparison`, and what only other stacks have.

    Attributes:
        own_error: the stack on the base without any vector, against transformers; nan if it does not run the base.
        gain: what the stack gains by the folder's edit, as a multiple of what the hook adds: 1.
        positions: how many were compared.
        tokens: the fewest tokens that were compared at one of them.
        blind: why this run cannot tell a steered folder from another; empty where it can.
    """

    own_error: float = float("nan")
    gain: float = float("nan")
    positions: int = 0
    tokens: int = 0
    blind: str = ""

    def as_json(self) -> dict[str, Any]:
        found = super().as_json()
        del found["blind"]
        return found


def compare_in_stack(
    copy: StackRun, base: StackRun | None, expected: Expected, *, tolerance: float = 1e-4, stored_error: float = 0.0
) -> StackComparison:
    """Hold a folder's run in a stack against what it should compute.

    Args:
        copy: the finished folder in the stack.
        base: the base in the same stack; None if it was not run.
        expected: both in transformers.
        tolerance: allowed difference of a log-probability; raised to 5x the noise floor (never above 1e-3), and to 4x
            the stack's own error on the base.
        stored_error: relative error of the vector in the file, which is what the hook adds.

    Returns:
        The checks: stored vector, loading, finite, tokenizer (where the stack has its own), log-probabilities, share of
        the effect, gain, greedy decoding.
    """
    result = StackComparison(noise_floor=expected.noise_floor)
    add = result.checks.append
    note = "relative error of the vector in the file"
    add(Check("stored vector", stored_error <= STORED_LIMIT, stored_error, STORED_LIMIT, note))
    result.steering_effect = max(
        _largest(steered - plain) for steered, plain in zip(expected.steered, expected.plain, strict=True)
    )
    if copy.error is not None:
        add(Check("loading", False, note=copy.error))
        return result
    add(Check("loading", True, note=f"read by {copy.facts.get('class', 'it')}"))
    steered = _seen(copy, expected.steered)
    plain = None if base is None or base.error is not None else _seen(base, expected.plain)
    if isinstance(steered, str) and isinstance(plain, str):
        result.blind = f"it does not run the base either: {plain}"
        add(Check("finite", None, note=result.blind))
        return result
    if isinstance(steered, str):
        add(Check("finite", False, note=steered))
        return result
    add(Check("finite", True))
    if copy.facts.get("tokenised"):
        add(_tokenizer(copy, base, expected))
    result.positions = sum(len(rows) for rows in steered)
    result.tokens = min(int((~rows.isnan()).sum(dim=-1).min()) for rows in steered)
    if isinstance(plain, list):
        result.own_error = max(_largest(left - right) for left, right in zip(plain, expected.plain, strict=True))
    own = 0.0 if math.isnan(result.own_error) else OWN_ERRORS * result.own_error

    difference = max(_largest(left - right) for left, right in zip(steered, expected.steered, strict=True))
    result.max_abs_logprob_diff = difference
    result.tolerance = limit = max(min(HARD_LIMIT, max(tolerance, 5 * expected.noise_floor)), own)
    add(Check("log-probabilities", difference <= limit, difference, limit, _about(result)))
    share = max(EFFECT_SHARE * result.steering_effect, own)
    if own > LARGEST_SHARE * result.steering_effect:
        result.blind = (
            f"the effect ({result.steering_effect:.2g}) is small beside the stack's own error on the base "
            f"({result.own_error:.2g})"
        )
        add(Check("share of the effect", None, difference, note=result.blind))
    else:
        add(Check("share of the effect", difference <= share, difference, share))
    add(_gain(result, steered, plain if isinstance(plain, list) else None, expected))
    add(_greedy(copy, expected, limit))
    return result


def _about(result: StackComparison) -> str:
    own = "not known" if math.isnan(result.own_error) else f"{result.own_error:.2g}"
    return (
        f"at {result.positions} positions, the likeliest {result.tokens} tokens or more; "
        f"the stack's own error on the base: {own}"
    )


def _seen(run: StackRun, like: Sequence[torch.Tensor]) -> list[torch.Tensor] | str:
    """[positions, vocabulary] of each prompt, nan where the stack does not tell; or what is wrong with the run."""
    found = []
    for number, rows in enumerate(like):
        tokens, values = run.tensors.get(f"tokens/{number}"), run.tensors.get(f"logprobs/{number}")
        if tokens is None or values is None or tokens.shape != values.shape or len(tokens) != len(rows):
            return f"another number of positions in prompt {number}"
        told = (tokens >= 0) & ~values.isneginf()
        if not bool(values[told].isfinite().all()):
            return f"not a number in prompt {number}"
        if int(tokens.max()) >= rows.shape[-1]:
            return f"token {int(tokens.max())} in prompt {number}, beyond the vocabulary of {rows.shape[-1]}"
        if float((values.exp() * told).sum(dim=-1).min()) < LEAST_SEEN:
            return f"too little of the distribution is told in prompt {number}"
        dense = torch.full((len(rows), rows.shape[-1] + 1), float("nan"))
        dense.scatter_(1, torch.where(told, tokens, rows.shape[-1]).long(), values)
        found.append(dense[:, :-1])
    return found


def _largest(difference: torch.Tensor) -> float:
    """max |difference| over what the stack tells."""
    return float(difference.abs().nan_to_num(0.0, posinf=float("inf")).max())


def _gain(
    result: StackComparison, steered: list[torch.Tensor], plain: list[torch.Tensor] | None, expected: Expected
) -> Check:
    """The regression of what the stack gains on what the hook adds: 0 without the vector, 1/2 with half of it."""
    product, square = 0.0, 0.0
    for number, hooked in enumerate(expected.steered):
        added = (hooked - expected.plain[number]).double()
        # The stack's own base cancels its own error, where it runs.
        gained = (steered[number] - (expected.plain if plain is None else plain)[number]).double()
        both = added.isfinite() & gained.isfinite()
        product += float((added * gained)[both].sum())
        square += float((added * added)[both].sum())
    result.gain = product / square if square > 0 else float("nan")
    off = abs(result.gain - 1)
    note = f"what the stack gains is {result.gain:.4g} times what the hook adds"
    return Check("gain", bool(off <= GAIN_LIMIT), off, GAIN_LIMIT, note)


def _tokenizer(copy: StackRun, base: StackRun | None, expected: Expected) -> Check:
    """A tokenizer of the stack's own must make of a text what it makes with the base."""
    found = copy.facts["tokenised"]
    others = sum(
        list(ids[: len(wanted)]) != list(wanted) for ids, wanted in zip(found, expected.text_ids, strict=False)
    )
    note = f"other ids than transformers for {others} of {len(found)} texts" if others else "ids as in transformers"
    if base is None or base.error is not None:
        return Check("tokenizer", None if others else True, note=note)
    same = found == base.facts.get("tokenised")
    return Check("tokenizer", same, note=f"{note}, as with the base" if same else "other ids than with the base")


def _greedy(copy: StackRun, expected: Expected, limit: float) -> Check:
    """Same tokens as the hook's, as far as both go; at the first that differs the two must be about as likely."""
    name, found = "greedy decoding with a cache", [int(token) for token in copy.facts.get("greedy") or ()]
    if not expected.greedy or expected.greedy_logprobs is None:
        return Check(name, None, note="transformers could not run it")
    for step, (wanted, token) in enumerate(zip(expected.greedy, found, strict=False)):
        if wanted != token:
            row = expected.greedy_logprobs[step]
            gap = float(row[wanted] - row[token])
            return Check(name, gap <= 2 * limit, gap, 2 * limit, f"{step} tokens agree, then another one")
    steps = min(len(expected.greedy), len(found))
    return Check(name, True if steps else None, note=f"{steps} tokens agree" if steps else "it ends at once")
