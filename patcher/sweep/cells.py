"""One cell of the grid: a layer, a coefficient, and what a vector of them does."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import torch

from patcher.capture.logits import LogitsSource
from patcher.disk.json_files import finite_or_null
from patcher.evaluate.damage import Damage, NeutralText
from patcher.evaluate.effect import Effect
from patcher.evaluate.perplexity import sentence_perplexities
from patcher.evaluate.scoring import Vectors
from patcher.evaluate.statistics import bootstrap_interval


@dataclass(frozen=True)
class Cell:
    """What was measured of one layer and coefficient; numbers are not finite where the model's logits are not.

    Attributes:
        effects: of each choosing item the measure's shift from the base, positive the expected way.
        steered: the measure's mean under the vector.
        damage: KL(base || steered) on neutral text, nats a token.
        perplexity: of the neutral text.
        on_topic: perplexity of the on-topic text's sentences, or None.
        off_topic: of the off-topic text's, or None.
        norm: of the vector, coefficient included.
        residual_norm: mean residual norm at the layer, or None.
        damage_high: the upper end of the damage's 95 % interval over texts; the damage itself where it is not known.
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
    damage_high: float | None = None

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

    @property
    def guarded(self) -> float:
        """The damage that must be within the guard: as much as it may be on other texts."""
        return self.damage if self.damage_high is None else self.damage_high

    @property
    def finite(self) -> bool:
        """Whether the steered model still gives numbers."""
        return all(map(math.isfinite, (*self.effects, self.steered, self.damage)))

    def as_json(self) -> dict[str, Any]:
        """A record of it; a number that is not finite becomes None."""
        data: dict[str, Any] = finite_or_null({**asdict(self), "effects": list(self.effects)})
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Cell:
        """The cell of a record.

        Raises:
            KeyError, TypeError, ValueError: it is no record of a cell.
        """
        numbers = {name: _number(data[name]) for name in ("steered", "damage", "perplexity")}
        effects = tuple(_number(value) for value in data["effects"])
        if not effects:
            raise ValueError("no items")
        return cls(**{**data, **numbers, "effects": effects})


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
class CellBench:
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
    _perplexities: dict[int, float] = field(default_factory=dict, init=False)

    @cached_property
    def base_values(self) -> torch.Tensor:
        """The measure of every choosing item without the swept vector: [items], fp64."""
        return self.effect.values(self.source, [self.others], self.effect.count)[0]

    def baseline(self) -> dict[str, Any]:
        """`baseline` of sweep.json: the items and texts without the swept vector."""
        return {
            "steered": float(self.base_values.mean()),
            "perplexity": self.base_perplexity(),
            "on_topic": self.sentence_perplexities(self.on_topic, [self.others])[0],
            "off_topic": self.sentence_perplexities(self.off_topic, [self.others])[0],
        }

    def shown_texts(self) -> dict[str, Sequence[Sequence[int]]]:
        """Texts to show in green and red, by title."""
        texts = {"on-topic text": self.on_topic, "off-topic text": self.off_topic, "neutral text": self.neutral.texts}
        return {title: passages for title, passages in texts.items() if passages}

    def texts_for(self, items: int) -> int:
        """On how many of the neutral texts a cell is measured beside ``items`` items: the same fraction of them."""
        texts = len(self.neutral.texts)
        return texts if items >= self.effect.count else min(texts, max(2, texts * items // self.effect.count))

    def base_perplexity(self, items: int | None = None) -> float:
        """Without any vector, of the neutral texts that cells of ``items`` items are measured on; of all by default."""
        texts = self.texts_for(self.effect.count if items is None else items)
        if texts not in self._perplexities:
            self._perplexities[texts] = self.neutral.damage(self.source, [{}], texts)[0].perplexity
        return self._perplexities[texts]

    def measure(self, columns: Sequence[Column], *, items: int | None = None) -> list[Cell]:
        """The cells of some columns, all of them at once.

        Args:
            items: how many of the choosing items, the first, and that fraction of the neutral texts; all by default.
        """
        count = self.effect.count if items is None else min(items, self.effect.count)
        places = [(column, coefficient) for column in columns for coefficient in column.vectors]
        variants = [self.with_others({column.layer: column.vectors[coefficient]}) for column, coefficient in places]
        values = self.effect.values(self.source, variants, count)
        shifts = (values - self.base_values[:count]) * self.expected_sign
        damages = self.neutral.damage(self.source, variants, self.texts_for(count))
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
                on_topic=on_topic[index],
                off_topic=off_topic[index],
                norm=float(column.vectors[coefficient].double().norm()),
                residual_norm=column.residual_norm,
                damage_high=upper_kl(damages[index]),
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
    ) -> list[float] | list[None]:
        """Perplexity over all tokens of the sentences, each run on its own: [variants]; None without sentences."""
        if not sentences:
            return [None] * len(variants)
        return sentence_perplexities(self.source, sentences, variants, self.batch_size).overall().tolist()


def upper_kl(damage: Damage) -> float:
    """The upper end of the 95 % bootstrap interval of the KL divergence over texts, nats a token.

    A sweep keeps this within the guard, so that a build, which measures on some of the texts, keeps its mean within it.
    """
    return bootstrap_interval(damage.kl, 0, weights=damage.tokens)[1]


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)
