"""Divergence, contributions, shifts, changes and perplexity against what the stock class says of each text alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from support.divergence import next_token_divergence
from support.measured_models import MODELS, PASSAGES, Measured, measured

from patcher.capture.logits import LogitsJob
from patcher.evaluate.held_out import Option, Question, answer_probability
from patcher.evaluate.moved_tokens import most_shifted_tokens, token_changes, top_contributing_tokens
from patcher.evaluate.perplexity import sentence_perplexities
from patcher.evaluate.texts import encode_texts

TOLERANCE = 2e-5


@pytest.fixture(scope="module", params=list(MODELS))
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    return measured(tmp_path_factory.mktemp("tiny"), request.param)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    return measured(tmp_path_factory.mktemp("llama"), "meta-llama--Llama-3.2-1B")


def texts(tiny: Measured) -> list[tuple[int, ...]]:
    return encode_texts(PASSAGES, tiny.tokenizer)


def close(found: Any, expected: Any, effect: Any = None) -> None:
    """Equal, where what is measured is far larger than the tolerance."""
    found, expected = torch.as_tensor(found).double(), torch.as_tensor(expected).double()
    assert (found - expected).abs().max() <= TOLERANCE
    assert (expected if effect is None else torch.as_tensor(effect)).abs().max() > 50 * TOLERANCE


def kl(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    return (first.exp() * (first - second)).sum(dim=-1)


class Recorded:
    """A source that remembers what it was asked."""

    def __init__(self, tiny: Measured) -> None:
        self.source, self.jobs = tiny.source, list[LogitsJob]()

    def logits(self, jobs: Sequence[LogitsJob], use: Callable[[int, torch.Tensor], None]) -> None:
        self.jobs += jobs
        self.source.logits(jobs, use)


def test_divergence(tiny: Measured) -> None:
    variants = [{}, tiny.vectors(), tiny.vectors(20.0, seed=1)]
    found = next_token_divergence(tiny.source, texts(tiny), variants, 3)
    expected = torch.tensor(
        [
            [float(kl(tiny.log_probs(ids, {}), tiny.log_probs(ids, vectors)).mean()) for ids in texts(tiny)]
            for vectors in variants
        ]
    )
    close(found.means, expected)
    assert not found.means[0].any()
    assert found.tokens.tolist() == [len(ids) for ids in texts(tiny)]
    everywhere = torch.cat([kl(tiny.log_probs(ids, {}), tiny.log_probs(ids, variants[1])) for ids in texts(tiny)])
    close(found.overall()[1], everywhere.mean())
    swapped = next_token_divergence(tiny.source, texts(tiny), variants[1::-1], 3)
    assert abs(float(swapped.overall()[1] - found.overall()[1])) > 10 * TOLERANCE  # the direction counts


def test_contributions_are_the_posts_table(tiny: Measured) -> None:
    vectors = tiny.vectors()
    found = top_contributing_tokens(tiny.source, texts(tiny), {}, vectors, 2, count=7)
    base = torch.cat([tiny.log_probs(ids, {}) for ids in texts(tiny)])
    steered = torch.cat([tiny.log_probs(ids, vectors) for ids in texts(tiny)])
    terms = (steered.exp() * (steered - base)).mean(dim=0)
    close(found.divergence, terms.sum())
    assert [item.token for item in found.tokens] == terms.topk(7).indices.tolist()
    close([item.contribution for item in found.tokens], terms.topk(7).values)
    close([item.base for item in found.tokens], base.exp().mean(dim=0)[terms.topk(7).indices])
    close([item.steered for item in found.tokens], steered.exp().mean(dim=0)[terms.topk(7).indices])
    every = top_contributing_tokens(tiny.source, texts(tiny), {}, vectors, 2, count=10**6).tokens
    assert sum(item.contribution for item in every) == pytest.approx(found.divergence)


def test_contributions_after_a_prompt(llama: Measured) -> None:
    vectors, prompt = llama.vectors(), texts(llama)[0]
    found = top_contributing_tokens(llama.source, [prompt], {}, vectors, 2, count=3, last_only=True)
    base, steered = llama.log_probs(prompt, {})[-1], llama.log_probs(prompt, vectors)[-1]
    close(found.divergence, kl(steered, base))
    assert found.tokens[0].steered > found.tokens[0].base


def test_shifted_tokens(tiny: Measured) -> None:
    variants = [{}, tiny.vectors(), tiny.vectors(20.0, seed=1)]
    found = most_shifted_tokens(tiny.source, texts(tiny), variants, 2, count=4)
    assert len(found) == 2
    for vectors, prompts in zip(variants[1:], found, strict=True):
        for ids, shifts in zip(texts(tiny), prompts, strict=True):
            base, steered = tiny.log_probs(ids, {})[-1], tiny.log_probs(ids, vectors)[-1]
            likely = {*base.topk(4).indices.tolist(), *steered.topk(4).indices.tolist()}
            expected = sorted(likely, key=lambda token: float(base[token] - steered[token]))
            assert [shift.token for shift in shifts.by_log_ratio] == expected
            close([shift.log_ratio for shift in shifts.by_log_ratio], (steered - base)[expected])
            differences = steered.exp() - base.exp()
            largest = differences.abs().topk(4).indices.tolist()
            assert [shift.token for shift in shifts.by_difference] == largest
            close([shift.difference for shift in shifts.by_difference], differences[largest])
            close([shift.base for shift in shifts.by_difference], base.exp()[largest], 1)


def test_changes_of_a_text(tiny: Measured) -> None:
    variants = [{}, tiny.vectors(), tiny.vectors(20.0, seed=1)]
    found = token_changes(tiny.source, texts(tiny), variants, 2)
    for vectors, changes in zip(variants[1:], found, strict=True):
        for ids, change in zip(texts(tiny), changes, strict=True):
            base, steered = tiny.log_probs(ids, {}), tiny.log_probs(ids, vectors)
            expected = [0.0, *[float((steered - base)[at, token]) for at, token in enumerate(ids[1:])]]
            close(change, expected)


def test_perplexity_of_sentences(tiny: Measured) -> None:
    variants = [{}, tiny.vectors()]
    found = sentence_perplexities(tiny.source, texts(tiny), variants, 3)
    losses = [
        [-tiny.log_probs(ids, vectors)[:-1].gather(-1, torch.tensor(ids[1:])[:, None])[:, 0] for ids in texts(tiny)]
        for vectors in variants
    ]
    close(found.surprises, [[float(loss.mean()) for loss in row] for row in losses])
    per_sentence = torch.tensor([[float(loss.mean().exp()) for loss in row] for row in losses])
    relative = found.per_sentence() / per_sentence
    close(relative, torch.ones_like(relative), per_sentence[1] - per_sentence[0])
    close(found.overall().log(), [float(torch.cat(row).mean()) for row in losses])
    close(found.mean() / per_sentence.mean(dim=1), [1, 1], found.mean() - found.overall())


def test_a_sentence_of_nothing_counts_nowhere(llama: Measured) -> None:
    found = sentence_perplexities(llama.source, [texts(llama)[0], (1,)], [{}], 2)
    assert found.tokens.tolist() == [len(texts(llama)[0]) - 1, 0]
    alone = sentence_perplexities(llama.source, [texts(llama)[0]], [{}], 2)
    close(found.overall(), alone.overall())
    close(found.mean(), alone.mean())


def test_jobs_of_a_batch_follow_one_another_and_share_inputs(llama: Measured) -> None:
    variants = [{}, llama.vectors(), llama.vectors(20.0, seed=1)]
    for measure in (next_token_divergence, token_changes, most_shifted_tokens):
        recorded = Recorded(llama)
        measure(recorded, texts(llama), variants, 2)
        assert len(recorded.jobs) == 9
        for start in range(0, 9, 3):
            batch = recorded.jobs[start : start + 3]
            assert all(job.inputs is batch[0].inputs for job in batch)
            assert [job.vectors for job in batch] == variants


def test_long_texts_make_small_batches(llama: Measured) -> None:
    recorded = Recorded(llama)
    next_token_divergence(recorded, [(1,) * 300, (2,) * 300, (3,), (4,), ()], [{}], 16)
    assert [tuple(job.inputs["input_ids"].shape) for job in recorded.jobs] == [(2, 1), (1, 300), (1, 300)]


def test_an_impossible_token_adds_nothing(llama: Measured) -> None:
    class Forbids:
        def logits(self, jobs: Sequence[LogitsJob], use: Callable[[int, torch.Tensor], None]) -> None:
            def forbidding(number: int, logits: torch.Tensor) -> None:
                use(number, logits.index_fill(-1, torch.tensor([7]), float("-inf")))

            llama.source.logits(jobs, forbidding)

    found = next_token_divergence(Forbids(), texts(llama), [{}, llama.vectors()], 2)
    assert torch.isfinite(found.means).all() and found.overall()[1] > 0.01
    top = top_contributing_tokens(Forbids(), texts(llama), {}, llama.vectors(), 2, count=10**6)
    assert next(item for item in top.tokens if item.token == 7).contribution == 0


def test_a_measure_of_the_wrong_variant_is_noticed(llama: Measured) -> None:
    class Forgets:
        def logits(self, jobs: Sequence[LogitsJob], use: Callable[[int, torch.Tensor], None]) -> None:
            llama.source.logits([LogitsJob(job.inputs, {}, job.columns) for job in jobs], use)

    variants = [{}, llama.vectors()]
    right = next_token_divergence(llama.source, texts(llama), variants, 2).overall()[1]
    assert right > 100 * TOLERANCE
    assert next_token_divergence(Forgets(), texts(llama), variants, 2).overall()[1] == 0
    assert not any(change.any() for change in token_changes(Forgets(), texts(llama), variants, 2)[0])


@pytest.mark.parametrize("offered", [2, 3, 6])
def test_answer_probability_over_all_offered_answers(tiny: Measured, offered: int) -> None:
    letters = "ABCDEF"[:offered]
    prompts = [f"Which one?{''.join(f' ({letter})' for letter in letters)} Answer {number}: (" for number in (1, 22, 3)]
    questions, naive = [], torch.zeros(2, len(prompts), dtype=torch.float64)
    variants = [{}, tiny.vectors()]
    for number, prompt in enumerate(prompts):
        prefix = encode_texts([prompt], tiny.tokenizer)[0]
        order = letters[number % offered] + letters.replace(letters[number % offered], "")
        tokens = [tiny.tokenizer(letter, add_special_tokens=False)["input_ids"][0] for letter in order]
        close_bracket = tiny.tokenizer(")", add_special_tokens=False)["input_ids"][0]
        options = tuple(Option((*prefix, token, close_bracket), len(prefix)) for token in tokens)
        questions.append(Question(options, lettered=True))
        for variant, vectors in enumerate(variants):
            p = tiny.log_probs(prefix, vectors)[-1].exp()
            naive[variant, number] = p[tokens[0]] / sum(p[token] for token in tokens)
    found = answer_probability(tiny.source, questions, variants, 2)
    close(found, naive, (naive[1] - naive[0]))
    if offered > 2:
        pair = [Question(question.options[:2], lettered=True) for question in questions]
        assert (answer_probability(tiny.source, pair, variants, 2) - naive).abs().max() > 0.01
