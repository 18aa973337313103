"""What a vector is judged by: the measure of held-out pairs or, without them, of a text; beside its controls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

from patcher.capture.layout import Text
from patcher.capture.logits import LogitsSource
from patcher.evaluate.held_out import Question, measure_of, random_like, texts_of
from patcher.evaluate.scoring import Vectors, mean_log_probs, scored_from
from patcher.evaluate.statistics import bootstrap_interval

ON_TOPIC = "on_topic_log_probability"
NO_CONTROL = "no random vector was measured beside it: whether one would do as much is not known"


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

    @property
    def batch_size(self) -> int:
        """Most rows in a batch."""
        ...

    def first(self, items: int) -> Effect:
        """The same of the first ``items`` items."""
        ...

    def texts(self, items: int) -> list[Text]:
        """What is run for the first ``items`` items."""
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

    def first(self, items: int) -> PairsEffect:
        return replace(self, questions=self.questions[:items])

    def texts(self, items: int) -> list[Text]:
        return texts_of(self.questions[:items])

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

    def first(self, items: int) -> TextEffect:
        return replace(self, sentences=self.sentences[:items])

    def texts(self, items: int) -> list[Text]:
        return [scored_from(ids, 1) for ids in self.sentences[:items]]

    def values(self, source: LogitsSource, variants: Sequence[Vectors], items: int) -> torch.Tensor:
        chosen = self.sentences[:items]
        return mean_log_probs(source, chosen, [1] * len(chosen), variants, self.batch_size)


@dataclass
class Measured:
    """An effect on held-out items, as parts of it come in: base and steered first, then what stands beside them.

    Attributes:
        effect: over the items.
        vectors: layer -> [hidden], coefficient and scale included.
        expected_sign: +1 where the vectors should raise the measure, -1 where they should lower it.
        base, steered: of every item, fp64.
        negative: of every item under the negated vectors, or None.
        random: of the first items under each random vector of equal norm, [vectors, items].
    """

    effect: Effect
    vectors: Vectors
    expected_sign: float
    base: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    steered: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    negative: torch.Tensor | None = None
    random: torch.Tensor = field(default_factory=lambda: torch.zeros(0, 0))

    def measure(self, source: LogitsSource, *, random_vectors: int = 0, negative: bool = False, seed: int) -> None:
        """Measure base and steered and, in the same passes, what stands beside them."""
        values = self.effect.values(
            source, [{}, self.vectors, *self.controls(random_vectors, negative, seed)], self.effect.count
        )
        self.base, self.steered = values[0], values[1]
        self._take(values[2:], random_vectors, negative)

    def compare(
        self, source: LogitsSource, *, random_vectors: int, negative: bool, items: int | None = None, seed: int
    ) -> None:
        """Measure what stands beside them, on the first ``items`` items; all by default."""
        controls = self.controls(random_vectors, negative, seed)
        count = self.effect.count if items is None else items
        if controls:
            self._take(self.effect.values(source, controls, count), random_vectors, negative)

    def controls(self, random_vectors: int, negative: bool, seed: int) -> list[Vectors]:
        """Random vectors of equal norm, seeded; then the vectors' negative."""
        found: list[Vectors] = [random_like(self.vectors, seed + number) for number in range(random_vectors)]
        return [*found, *([{layer: -vector for layer, vector in self.vectors.items()}] if negative else [])]

    def _take(self, values: torch.Tensor, random_vectors: int, negative: bool) -> None:
        self.random = values[:random_vectors]
        if negative:
            self.negative = values[random_vectors]

    def result(self, seed: int) -> dict[str, Any]:
        """What the manifest says of it.

        Returns:
            ``measure``, ``pairs`` (how many items), ``base``, ``steered``, the ``shift`` between them with its 95 %
            interval ``shift_low`` and ``shift_high`` (a bootstrap over the items), ``negative`` (or None), ``random``
            (a list, empty where none was measured), ``random_pairs``: on how many items those were,
            ``distinguishable``: whether the shift goes the expected way and is larger than that of every random vector
            on the same items, None where there is none; and ``notes``.
        """
        shifts = self.steered - self.base
        low, high = bootstrap_interval(shifts, seed)
        count = self.random.shape[1] if len(self.random) else 0
        noise = (self.random - self.base[:count]).mean(dim=1).tolist() if count else []
        own = float(shifts[: count or None].mean()) * self.expected_sign
        # A measure that is not a number is no effect.
        expected = float(shifts.mean()) * self.expected_sign > 0
        beyond = (expected and own > max(map(abs, noise))) if noise else None
        notes = []
        if not expected:
            notes.append("the vector moves the measure away from the matching behaviour, or not at all")
        elif beyond is None:
            notes.append(NO_CONTROL)
        elif not beyond:
            notes.append("the shift is no larger than that of a random vector of the same norm")
        base = float(self.base.mean())
        return {
            "measure": self.effect.measure,
            "pairs": self.effect.count,
            "base": base,
            "steered": float(self.steered.mean()),
            "shift": float(shifts.mean()),
            "shift_low": low,
            "shift_high": high,
            "negative": None if self.negative is None else float(self.negative.mean()),
            # Of fewer items: what they shift, from the base of all.
            "random": [base + value for value in noise],
            "random_pairs": count,
            "distinguishable": beyond if expected else False,
            "held_out": True,
            "notes": notes,
        }
