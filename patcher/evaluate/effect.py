"""What a sweep maximises: the measure of held-out pairs, or, without them, of an on-topic text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from patcher.capture.logits import LogitsSource
from patcher.evaluate.held_out import Question, measure_of
from patcher.evaluate.scoring import Vectors, mean_log_probs

ON_TOPIC = "on_topic_log_probability"


class Effect(Protocol):
    """A measure over items (pairs or sentences); larger is more of what the vector is for."""

    @property
    def measure(self) -> str:
        """Its name."""
        ...

    @property
    def count(self) -> int:
        """How many items there are."""
        ...

    def values(self, source: LogitsSource, variants: Sequence[Vectors], items: int) -> torch.Tensor:
        """The measure of the first ``items`` items under each variant: [variants, items], fp64."""
        ...


@dataclass(frozen=True)
class PairsEffect:
    """p(matching answer) of lettered questions, else the log odds a token (:mod:`patcher.evaluate.held_out`)."""

    questions: Sequence[Question]
    batch_size: int

    @property
    def measure(self) -> str:
        return measure_of(self.questions)[0]

    @property
    def count(self) -> int:
        return len(self.questions)

    def values(self, source: LogitsSource, variants: Sequence[Vectors], items: int) -> torch.Tensor:
        _name, measure = measure_of(self.questions)
        return measure(source, self.questions[:items], variants, self.batch_size)


@dataclass(frozen=True)
class TextEffect:
    """Mean log-probability a token of each sentence of a text, nats, as the ActAdd post's perplexities (sec. 3)."""

    sentences: Sequence[Sequence[int]]
    batch_size: int

    @property
    def measure(self) -> str:
        return ON_TOPIC

    @property
    def count(self) -> int:
        return len(self.sentences)

    def values(self, source: LogitsSource, variants: Sequence[Vectors], items: int) -> torch.Tensor:
        chosen = self.sentences[:items]
        return mean_log_probs(source, chosen, [1] * len(chosen), variants, self.batch_size)
