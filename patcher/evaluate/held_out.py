"""Does the vector do what it is for? Held-out pairs, beside the controls that a meaningless vector would match."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from patcher.capture.batches import RowImage
from patcher.capture.layout import Text
from patcher.capture.logits import LogitsSource
from patcher.evaluate.scoring import (
    Rows,
    Vectors,
    ending,
    mean_log_probs_of,
    run_texts,
    scored_from,
    token_log_probs,
)

ANSWER_PROBABILITY = "answer_probability"
LOG_ODDS = "log_odds_per_token"


@dataclass(frozen=True)
class Option:
    """One continuation of a prompt: all its ids, where the continuation begins, and the image among them, if any."""

    ids: tuple[int, ...]
    start: int
    image: RowImage | None = None


@dataclass(frozen=True)
class Question:
    """What a held-out pair asks: the options, the matching one first."""

    options: tuple[Option, ...]
    lettered: bool


def answer_probability(
    source: LogitsSource, questions: Sequence[Question], variants: Sequence[Vectors], batch_size: int
) -> torch.Tensor:
    """p(matching answer) over the probabilities of all offered answers: [variants, questions], fp64.

    Read at the token in which the answers differ, after what they share, as CAA does (Rimsky et al. 2024, sec. 4).
    Answers that cannot be told apart by one token are scored as whole texts.
    """
    asked = _asked(questions)
    result = torch.zeros(len(variants), len(questions), dtype=torch.float64)
    totals = torch.zeros(len(variants), len(asked), dtype=torch.float64)

    def use(variant: int, rows: Rows) -> None:
        for place, logits in rows:
            owner, text, nexts = asked[place]
            if nexts:
                result[variant, owner] = torch.softmax(logits[0, list(nexts)].float().cpu().double(), dim=-1)[0]
            else:
                totals[variant, place] = token_log_probs(logits, text).sum()

    run_texts(source, [text for _owner, text, _nexts in asked], variants, batch_size, use)
    for owner in dict.fromkeys(owner for owner, _text, nexts in asked if not nexts):
        places = [place for place, entry in enumerate(asked) if entry[0] == owner]
        result[:, owner] = torch.softmax(totals[:, places], dim=-1)[:, 0]
    return result


def _asked(questions: Sequence[Question]) -> list[tuple[int, Text, tuple[int, ...]]]:
    """What is run for lettered questions: whose it is, the text, and the tokens that are compared after it.

    Without such tokens the text is one answer, and is scored as a whole.
    """
    found: list[tuple[int, Text, tuple[int, ...]]] = []
    for index, question in enumerate(questions):
        ids = [option.ids for option in question.options]
        shared = _shared_prefix(ids)
        nexts = tuple(option[shared] for option in ids if len(option) > shared)
        if shared and len(set(nexts)) == len(ids):
            found.append((index, ending(ids[0][:shared], question.options[0].image), nexts))
        else:
            found += [(index, scored_from(option.ids, option.start, option.image), ()) for option in question.options]
    return found


def texts_of(questions: Sequence[Question]) -> list[Text]:
    """What is run for questions, whichever measure they allow."""
    if measure_of(questions)[0] == ANSWER_PROBABILITY:
        return [text for _owner, text, _nexts in _asked(questions)]
    options = [option for question in questions for option in question.options[:2]]
    return [scored_from(option.ids, option.start, option.image) for option in options]


def log_odds(
    source: LogitsSource, questions: Sequence[Question], variants: Sequence[Vectors], batch_size: int
) -> torch.Tensor:
    """Mean log-probability a token of the positive text minus that of the negative: [variants, questions], nats, fp64.

    A side without tokens of its own (ActAdd's empty negative) counts as 0.
    """
    options = [option for question in questions for option in question.options[:2]]
    texts = [scored_from(option.ids, option.start, option.image) for option in options]
    means = mean_log_probs_of(source, texts, variants, batch_size)
    return means[:, 0::2] - means[:, 1::2]


def measure_of(
    questions: Sequence[Question],
) -> tuple[str, Callable[[LogitsSource, Sequence[Question], Sequence[Vectors], int], torch.Tensor]]:
    """The measure that all of these questions allow: its name, and its function."""
    if all(question.lettered for question in questions):
        return ANSWER_PROBABILITY, answer_probability
    return LOG_ODDS, log_odds


def random_like(vectors: Mapping[int, torch.Tensor], seed: int) -> dict[int, torch.Tensor]:
    """Random directions with the norms of ``vectors``, seeded."""
    generator = torch.Generator().manual_seed(seed)
    result = {}
    for layer, vector in vectors.items():
        direction = torch.randn(vector.shape, generator=generator)
        result[layer] = direction / direction.norm() * vector.norm()
    return result


def _shared_prefix(sequences: Sequence[Sequence[int]]) -> int:
    shortest = min(len(ids) for ids in sequences)
    for place in range(shortest):
        if len({ids[place] for ids in sequences}) > 1:
            return place
    return shortest
