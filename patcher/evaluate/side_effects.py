"""What else the vectors of a build do: damage on neutral text under a guard, and effect and damage by coefficient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from patcher.capture.logits import LogitsSource
from patcher.capture.opened import OpenedBase
from patcher.evaluate.damage import POSITIONS, NeutralText
from patcher.evaluate.effect import Effect
from patcher.evaluate.held_out import random_like
from patcher.evaluate.neutral import neutral_texts
from patcher.evaluate.statistics import bootstrap_interval
from patcher.evaluate.texts import encode_texts, read_passages
from patcher.pairs.vocabulary import with_embeddings
from patcher.recipe.file import LoadedRecipe

FACTORS = (-1.0, -0.5, 0.5, 1.0, 1.5, 2.0)
"""Multiples of what is baked in, for the curve."""
_CURVE_ITEMS = 12
"""Pairs and passages of the curve: it is for the eye; what is judged is measured on all of them."""


def neutral_ids(loaded: LoadedRecipe, opened: OpenedBase) -> tuple[list[Sequence[int]], str]:
    """The recipe's neutral passages as token ids, and what they are called.

    A passage is left out that holds a token without an embedding.

    Raises:
        InputError: the file cannot be read.
    """
    named = loaded.recipe.evaluate.neutral
    if named is None:
        passages, name = neutral_texts(), "bundled neutral passages"
    else:
        passages, name = read_passages(loaded.file(named), "evaluate.neutral"), "neutral passages"
    encoded = encode_texts(passages, opened.tokenizer, opened.positions, opened.embeddings)
    return [ids for ids in with_embeddings(encoded, opened.embeddings) if len(ids) > 1], name


@dataclass(frozen=True)
class Curve:
    """Effect and damage at multiples of what is baked in.

    Attributes:
        layer: of the edit; None where there are several.
        coefficient: of the edit; 1 where there are several vectors, and the axis then shows multiples.
        sign: +1 where the measure should rise.
    """

    layer: int | None
    coefficient: float
    sign: float

    def measure(
        self,
        source: LogitsSource,
        vectors: Mapping[int, torch.Tensor],
        effect: Effect,
        texts: Sequence[Sequence[int]],
        *,
        seed: int,
    ) -> dict[str, list[dict[str, Any]]]:
        """`evaluation.curve` and `evaluation.random_curve`, in the shape of a sweep's grid; of at most 12 items."""
        items = min(effect.count, _CURVE_ITEMS)
        noise = random_like(vectors, seed)
        scaled = [_times(vectors, factor) for factor in FACTORS] + [_times(noise, factor) for factor in FACTORS]
        values = effect.values(source, [{}, *scaled], items)
        damages = NeutralText(texts[:_CURVE_ITEMS], positions=POSITIONS).damage(source, scaled)
        cells = []
        for factor, value, damage in zip(FACTORS * 2, values[1:], damages, strict=True):
            shifts = (value - values[0]) * self.sign
            low, high = bootstrap_interval(shifts, seed)
            cells.append(
                {
                    "layer": self.layer,
                    "coefficient": factor * self.coefficient,
                    "effect": float(shifts.mean()),
                    "effect_low": low,
                    "effect_high": high,
                    "damage": damage.mean_kl,
                    "pairs": items,
                }
            )
        return {"curve": cells[: len(FACTORS)], "random_curve": cells[len(FACTORS) :]}


def _times(vectors: Mapping[int, torch.Tensor], factor: float) -> dict[int, torch.Tensor]:
    return {layer: factor * vector for layer, vector in vectors.items()}
