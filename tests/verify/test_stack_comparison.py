"""Each check of the comparison with another stack, alone, on made-up runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from patcher.verify.stack_comparison import Expected, StackComparison, compare_in_stack
from patcher.verify.stack_jobs import StackRun

VOCABULARY = 13


def logprobs(*shape: int, seed: int) -> torch.Tensor:
    return torch.log_softmax(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


PLAIN = [logprobs(5, VOCABULARY, seed=1), logprobs(3, VOCABULARY, seed=2)]
HOOKED = [torch.log_softmax(rows + logprobs(*rows.shape, seed=3), dim=-1) for rows in PLAIN]
GREEDY = logprobs(4, VOCABULARY, seed=4)
TOKENS = [int(row.argmax()) for row in GREEDY]
EXPECTED = Expected(PLAIN, HOOKED, 1e-7, TOKENS, GREEDY, [[1, 2, 3]])


def run(rows: list[torch.Tensor], top: int = VOCABULARY, **facts: Any) -> StackRun:
    """What a stack that tells the ``top`` likeliest tokens writes."""
    tensors = {}
    for number, values in enumerate(rows):
        best = values.topk(top, dim=-1)
        tensors[f"logprobs/{number}"], tensors[f"tokens/{number}"] = best.values, best.indices.int()
    return StackRun(None, tensors=tensors, facts={"class": "C", "greedy": TOKENS, **facts}, version="1")


def outcome(result: StackComparison) -> set[str]:
    return {check.name for check in result.checks if check.passed is False}


def mixed(share: float) -> list[torch.Tensor]:
    """The base with a share of the steering."""
    return [plain + share * (hooked - plain) for plain, hooked in zip(PLAIN, HOOKED, strict=True)]


@pytest.mark.parametrize("top", [VOCABULARY, 8])
def test_a_run_that_agrees_passes(top: int) -> None:
    result = compare_in_stack(run(HOOKED, top), run(PLAIN, top), EXPECTED)
    assert result.passed and not result.blind
    assert result.max_abs_logprob_diff == 0 and result.own_error == 0
    assert result.gain == pytest.approx(1) and result.positions == 8 and result.tokens == top
    assert result.tolerance == 1e-4 and result.steering_effect > 0.5


@pytest.mark.parametrize(("share", "gain"), [(0.0, 0.0), (0.5, 0.5), (-1.0, -1.0), (2.0, 2.0), (0.9, 0.9)])
def test_another_share_of_the_vector_fails(share: float, gain: float) -> None:
    result = compare_in_stack(run(mixed(share)), run(PLAIN), EXPECTED)
    assert {"log-probabilities", "share of the effect", "gain"} <= outcome(result)
    assert result.gain == pytest.approx(gain, abs=1e-5)


def test_the_stacks_own_error_is_allowed_for_but_not_the_loss_of_the_vector() -> None:
    def noisy(rows: list[torch.Tensor], seed: int) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [values + 4e-3 * torch.randn(values.shape, generator=generator).clamp(-1, 1) for values in rows]

    good = compare_in_stack(run(noisy(HOOKED, 5)), run(noisy(PLAIN, 6)), EXPECTED)
    assert good.passed and good.tolerance == pytest.approx(4 * good.own_error)
    assert not compare_in_stack(run(noisy(HOOKED, 5)), run(PLAIN), EXPECTED).passed
    for share in (0.0, 0.5):
        bad = compare_in_stack(run(noisy(mixed(share), 5)), run(noisy(PLAIN, 6)), EXPECTED)
        assert {"log-probabilities", "share of the effect", "gain"} <= outcome(bad)


def test_an_error_as_large_as_the_effect_is_no_pass() -> None:
    off = [values + 0.3 for values in PLAIN]
    result = compare_in_stack(run(HOOKED), run(off), EXPECTED)
    assert "small beside the stack's own error" in result.blind


def test_without_the_base_there_is_no_allowance() -> None:
    near = [values + 5e-4 for values in HOOKED]
    for base in (None, StackRun("no such model")):
        result = compare_in_stack(run(near), base, EXPECTED)
        assert outcome(result) == {"log-probabilities"} and result.own_error != result.own_error
    assert compare_in_stack(run(HOOKED), None, EXPECTED).passed


def test_a_vector_that_the_file_does_not_hold_fails() -> None:
    """The hook adds what the file stores, so only this tells a file with half of the vector."""
    result = compare_in_stack(run(HOOKED), run(PLAIN), EXPECTED, stored_error=0.5)
    assert outcome(result) == {"stored vector"}


def test_a_folder_that_does_not_run_fails() -> None:
    result = compare_in_stack(StackRun("wrong number of tensors"), run(PLAIN), EXPECTED)
    assert outcome(result) == {"loading"} and "wrong number of tensors" in result.checks[-1].note


@pytest.mark.parametrize(
    ("spoil", "found"),
    [
        (lambda t: t["logprobs/0"].fill_(float("nan")), "not a number"),
        (lambda t: t["tokens/1"].fill_(VOCABULARY), "beyond the vocabulary"),
        (lambda t: t.pop("tokens/1"), "another number of positions"),
        (lambda t: t.update({"logprobs/0": t["logprobs/0"][:2], "tokens/0": t["tokens/0"][:2]}), "another number"),
        (lambda t: t["tokens/0"].fill_(-1), "too little of the distribution"),
    ],
)
def test_what_cannot_be_read_fails(spoil: Any, found: str) -> None:
    candidate = run(HOOKED)
    spoil(candidate.tensors)
    result = compare_in_stack(candidate, run(PLAIN), EXPECTED)
    assert outcome(result) == {"finite"} and found in result.checks[-1].note


def test_a_stack_that_makes_nothing_of_the_base_either_is_blind() -> None:
    broken, base = run(HOOKED), run(PLAIN)
    for one in (broken, base):
        one.tensors["logprobs/0"].fill_(float("nan"))
    result = compare_in_stack(broken, base, EXPECTED)
    assert not outcome(result) and "does not run the base either: not a number" in result.blind


def test_a_row_may_be_filled_up_and_zero_probability_is_left_out() -> None:
    candidate = run(HOOKED)
    candidate.tensors["tokens/0"][0, -2:] = -1
    candidate.tensors["logprobs/0"][0, -2:] = 0.0
    candidate.tensors["logprobs/1"][0, -1] = float("-inf")
    result = compare_in_stack(candidate, run(PLAIN), EXPECTED)
    assert result.passed and result.tokens == VOCABULARY - 2


def test_greedy_tokens_may_differ_only_at_a_tie() -> None:
    second = int(GREEDY[1].topk(2).indices[1])
    result = compare_in_stack(run(HOOKED, greedy=[TOKENS[0], second, 0]), run(PLAIN), EXPECTED)
    assert outcome(result) == {"greedy decoding with a cache"}
    near = GREEDY.clone()
    near[1, second] = near[1, TOKENS[1]] - 1e-5
    tie = Expected(PLAIN, HOOKED, 1e-7, TOKENS, near)
    assert compare_in_stack(run(HOOKED, greedy=[TOKENS[0], second, 0]), run(PLAIN), tie).passed
    early = compare_in_stack(run(HOOKED, greedy=TOKENS[:2]), run(PLAIN), EXPECTED)
    assert early.passed and "2 tokens agree" in early.checks[-1].note


def test_a_tokenizer_of_the_stacks_own_must_be_the_bases() -> None:
    same = compare_in_stack(run(HOOKED, tokenised=[[1, 2, 3]]), run(PLAIN, tokenised=[[1, 2, 3]]), EXPECTED)
    assert same.passed
    as_base = compare_in_stack(run(HOOKED, tokenised=[[9]]), run(PLAIN, tokenised=[[9]]), EXPECTED)
    (check,) = [check for check in as_base.checks if check.name == "tokenizer"]
    assert as_base.passed and "other ids than transformers for 1 of 1 texts" in check.note
    other = compare_in_stack(run(HOOKED, tokenised=[[1, 3]]), run(PLAIN, tokenised=[[1, 2, 3]]), EXPECTED)
    assert outcome(other) == {"tokenizer"}
