"""One cell of the grid: a layer, a coefficient, and what a vector of them does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch

from patcher.capture.logits import LogitsSource
from patcher.evaluate.perplexity import sentence_perplexities
from patcher.evaluate.scoring import Vectors
from patcher.evaluate.statistics import bootstrap_interval
from patcher.evaluate.sweep.damage import NeutralText
from patcher.evaluate.sweep.effect import Effect


@dataclass(frozen=True)
class Cell:
    """What was measured of one layer and coefficient.

    Attributes:
        effects: of each choosing item the measure's shift from the base, positive the expected way.
        steered: the measure's mean under the vector.
        damage: KL(base || steered) on neutral text, nats a token.
        perplexity: of the neutral text.
        on_topic: perplexity of the on-topic text's sentences, or None.
        off_topic: of the off-topic text's, or None.
        norm: of the vector, coefficient included.
        residual_norm: mean residual norm at the layer, or None.
    """

    layer: int
    coefficient: float
    effects: tuple[float, ...]
    steered: float
    damage: float
    perplexity: float
    on_topic: float | None
    off_topic: float | None
    norm: float
    residual_norm: float | None

    @property
    def effect(self) -> float:
        """The mean shift, positive the expected way."""
        return sum(self.effects) / len(self.effects)

    @cached_property
    def interval(self) -> tuple[float, float]:
        """95 % bootstrap interval of the effect; the items are drawn alike for every cell."""
        return bootstrap_interval(self.effects, 0)

    @property
    def pairs(self) -> int:
        """On how many choosing items the cell was measured."""
        return len(self.effects)

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "effects": list(self.effects)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Cell:
        """Raises: TypeError, KeyError: it is not a cell's record."""
        return cls(**{**data, "effects": tuple(float(value) for value in data["effects"])})


@dataclass(frozen=True)
class Column:
    """The vectors of one layer.

    Attributes:
        layer: where they are added.
        vectors: coefficient -> [hidden].
        residual_norm: mean residual norm at the layer, or None.
    """

    layer: int
    vectors: Mapping[float, torch.Tensor]
    residual_norm: float | None


@dataclass
class Bench:
    """What every cell is measured on.

    Attributes:
        source: the base model.
        effect: over the choosing items.
        neutral: the texts that should be left alone.
        on_topic: token ids of sentences, or None.
        off_topic: token ids of sentences, or None.
        expected_sign: +1 where the measure should rise, -1 where it should fall.
        others: what the recipe's other vectors add, in every variant and in the base of the effect; the damage is that
            of all of them.
        batch_size: rows in a batch.
    """

    source: LogitsSource
    effect: Effect
    neutral: NeutralText
    on_topic: Sequence[Sequence[int]] | None
    off_topic: Sequence[Sequence[int]] | None
    expected_sign: float
    others: Vectors
    batch_size: int
    _base: torch.Tensor | None = None
    _perplexity: float | None = None

    def base_values(self) -> torch.Tensor:
        """The measure of every choosing item without the swept vector: [items], fp64."""
        if self._base is None:
            self._base = self.effect.values(self.source, [self.others], self.effect.count)[0]
        return self._base

    def base_perplexity(self) -> float:
        """Of the neutral text, without any vector."""
        if self._perplexity is None:
            self._perplexity = self.neutral.damage(self.source, [{}])[0].perplexity
        return self._perplexity

    def measure(self, columns: Sequence[Column], *, items: int | None = None, texts: int | None = None) -> list[Cell]:
        """The cells of some columns, all of them at once.

        Args:
            items: how many of the choosing items, the first; all by default.
            texts: how many of the neutral texts.
        """
        count = self.effect.count if items is None else min(items, self.effect.count)
        places = [(column, coefficient) for column in columns for coefficient in column.vectors]
        variants = [self.with_others({column.layer: column.vectors[coefficient]}) for column, coefficient in places]
        values = self.effect.values(self.source, variants, count)
        shifts = (values - self.base_values()[:count]) * self.expected_sign
        damages = self.neutral.damage(self.source, variants, texts)
        on_topic = self.sentence_perplexities(self.on_topic, variants)
        off_topic = self.sentence_perplexities(self.off_topic, variants)
        return [
            Cell(
                layer=column.layer,
                coefficient=coefficient,
                effects=tuple(shifts[index].tolist()),
                steered=float(values[index].mean()),
                damage=damages[index].mean_kl,
                perplexity=damages[index].perplexity,
                on_topic=None if on_topic is None else on_topic[index],
                off_topic=None if off_topic is None else off_topic[index],
                norm=float(column.vectors[coefficient].norm()),
                residual_norm=column.residual_norm,
            )
            for index, (column, coefficient) in enumerate(places)
        ]

    def with_others(self, vectors: Vectors) -> dict[int, torch.Tensor]:
        """The swept vector together with the recipe's others."""
        total = dict(self.others)
        for layer, vector in vectors.items():
            total[layer] = total[layer] + vector if layer in total else vector
        return total

    def sentence_perplexities(
        self, sentences: Sequence[Sequence[int]] | None, variants: Sequence[Vectors]
    ) -> list[float] | None:
        """Perplexity over all tokens of the sentences, each run on its own: [variants]."""
        if not sentences:
            return None
        return sentence_perplexities(self.source, sentences, variants, self.batch_size).overall().tolist()
