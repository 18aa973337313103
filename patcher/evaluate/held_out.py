"""Does the vector do what it is for? Held-out pairs, beside the controls that a meaningless vector would match."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from patcher.capture.forward import steering_hooks
from patcher.evaluate.scoring import last_token_logits, mean_log_probs

ANSWER_PROBABILITY = "answer_probability"
LOG_ODDS = "log_odds_per_token"


@dataclass(frozen=True)
class Option:
    """One continuation of a prompt: all its ids, and where the continuation begins."""

    ids: tuple[int, ...]
    start: int


@dataclass(frozen=True)
class Question:
    """What a held-out pair asks: the options, the matching one first."""

    options: tuple[Option, ...]
    lettered: bool


def answer_probability(model: nn.Module, questions: Sequence[Question], batch_size: int) -> torch.Tensor:
    """p(matching answer) over the probabilities of all offered answers: [questions], fp64.

    Read at the token in which the answers differ, after what they share, as CAA does (Rimsky et al. 2024, sec. 4).
    Answers that cannot be told apart by one token are scored as whole texts.
    """
    prefixes, single = [], []
    for question in questions:
        ids = [option.ids for option in question.options]
        shared = _shared_prefix(ids)
        nexts = [option[shared] for option in ids if len(option) > shared]
        single.append(len(set(nexts)) == len(ids))
        prefixes.append(ids[0][:shared])
    result = torch.zeros(len(questions), dtype=torch.float64)
    by_token = [index for index, plain in enumerate(single) if plain and prefixes[index]]
    if by_token:
        logits = last_token_logits(model, [prefixes[index] for index in by_token], batch_size)
        for row, index in enumerate(by_token):
            options = questions[index].options
            nexts = [option.ids[len(prefixes[index])] for option in options]
            result[index] = torch.softmax(logits[row, nexts].double(), dim=-1)[0]
    for index in sorted(set(range(len(questions))) - set(by_token)):
        options = questions[index].options
        means = mean_log_probs(model, [o.ids for o in options], [o.start for o in options], batch_size)
        lengths = torch.tensor([len(o.ids) - max(1, o.start) for o in options], dtype=torch.float64)
        result[index] = torch.softmax(means * lengths, dim=-1)[0]
    return result


def log_odds(model: nn.Module, questions: Sequence[Question], batch_size: int) -> torch.Tensor:
    """Mean log-probability a token of the positive text minus that of the negative: [questions], nats, fp64.

    A side without tokens of its own (ActAdd's empty negative) counts as 0.
    """
    options = [option for question in questions for option in question.options[:2]]
    means = mean_log_probs(model, [o.ids for o in options], [o.start for o in options], batch_size)
    return means[0::2] - means[1::2]


def evaluate_edits(
    model: nn.Module,
    blocks: str,
    vectors: Mapping[int, torch.Tensor],
    questions: Sequence[Question],
    *,
    random_vectors: int,
    seed: int,
    expected_sign: float,
    batch_size: int = 16,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """The measure on held-out questions: base, steered, the negative, and random vectors of equal norm.

    Args:
        vectors: layer -> [hidden], coefficient and scale included.
        expected_sign: +1 where the vectors should raise the measure, -1 where they should lower it.

    Returns:
        ``measure``, ``pairs``, ``base``, ``steered``, ``negative``, ``random`` (a list), ``distinguishable``: whether
        the shift goes the expected way and is larger than that of every random vector, and ``notes``.
    """
    lettered = all(question.lettered for question in questions)
    measure = answer_probability if lettered else log_odds
    say = progress or (lambda _text: None)

    def mean_under(name: str, added: Mapping[int, torch.Tensor]) -> float:
        say(f"evaluating: {name}")
        with steering_hooks(model, blocks, added):
            return float(measure(model, questions, batch_size).mean())

    base = mean_under("base", {})
    steered = mean_under("steered", vectors)
    negative = mean_under("negative coefficient", {layer: -vector for layer, vector in vectors.items()})
    controls = [
        mean_under(f"random vector {number + 1} of equal norm", random_like(vectors, seed + number))
        for number in range(random_vectors)
    ]
    shift = (steered - base) * expected_sign
    largest = max(abs(value - base) for value in controls)
    notes = []
    if shift <= 0:
        notes.append("the vector moves the measure away from the matching behaviour, or not at all")
    elif shift <= largest:
        notes.append("the shift is no larger than that of a random vector of the same norm")
    return {
        "measure": ANSWER_PROBABILITY if lettered else LOG_ODDS,
        "pairs": len(questions),
        "base": base,
        "steered": steered,
        "negative": negative,
        "random": controls,
        "distinguishable": shift > largest,
        "held_out": True,
        "notes": notes,
    }


def random_like(vectors: Mapping[int, torch.Tensor], seed: int) -> dict[int, torch.Tensor]:
    """Random directions with the norms of ``vectors``, seeded."""
    generator = torch.Generator().manual_seed(seed)
    result = {}
    for layer, vector in vectors.items():
        direction = torch.randn(vector.shape, generator=generator)
        result[layer] = direction / direction.norm() * vector.norm()
    return result


def perplexity(model: nn.Module, texts: Sequence[Sequence[int]], batch_size: int) -> float:
    """exp of the mean negative log-probability a token, averaged over all tokens of all passages."""
    means = mean_log_probs(model, texts, [1] * len(texts), batch_size)
    lengths = torch.tensor([len(ids) - 1 for ids in texts], dtype=torch.float64)
    return float(torch.exp(-(means * lengths).sum() / lengths.sum()))


def _shared_prefix(sequences: Sequence[Sequence[int]]) -> int:
    shortest = min(len(ids) for ids in sequences)
    for place in range(shortest):
        if len({ids[place] for ids in sequences}) > 1:
            return place
    return shortest
