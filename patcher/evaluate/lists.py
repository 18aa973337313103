"""What a vector of two lists does: do held-out texts lie apart along it, and does adding it change what is written?

That texts lie apart says that the direction is there. It does not say that adding it steers, so that is measured too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from patcher.capture.layout import Text
from patcher.capture.logits import LogitsSource
from patcher.capture.opened import OpenedBase
from patcher.evaluate.effect import Effect, PairsEffect
from patcher.evaluate.held_out import Option, Question
from patcher.evaluate.log_probs import next_token_log_probs, wide
from patcher.evaluate.scoring import Rows, Vectors, ending
from patcher.pairs.pair import TokenisedSide
from patcher.vectors.both_lists import BothLists, Texts, sample_texts
from patcher.vectors.lists import PreparedLists
from patcher.vectors.prepared import PreparedVector
from patcher.vectors.steering_vector import SteeringVector

FIRST_TOKEN = "first_token_as_after_positives"
IN_SAMPLE = "measured on the texts that the vector was made of: none were held out"
RANDOM_DIRECTIONS = 100
"""Beside the separation: a projection costs nothing."""
MOST_PROMPTS = 50
"""Of either list, whose next tokens are what is compared with."""
_SMOOTHING = 0.1
"""Of a uniform distribution: a token that follows neither list speaks for neither."""
_ROUNDING = 1e-9
"""Of the largest projection: a spread below it is the rounding of sums in fp64, and no distance is told by it."""


@dataclass(frozen=True)
class FirstTokenEffect:
    """How far the first token after a prompt is one that follows the positive list rather than the negative one.

    Of every prompt: the sum over all tokens t of p(t) P(t) / (P(t) + N(t)), with P and N the unsteered model's mean
    next-token distributions after prompts of the two lists. 0 is as after the negative list, 1 as after the positive
    one, where the two share nothing. The refusal metric of Arditi et al. 2024 (appendix B) with tokens that are found
    in the lists instead of named.

    Attributes:
        prompts: token ids that end where the answer begins.
        shares: [vocabulary], fp32, of P in P + N.
        batch_size: most rows in a batch.
    """

    prompts: Sequence[Sequence[int]]
    shares: torch.Tensor
    batch_size: int

    @property
    def measure(self) -> str:
        return FIRST_TOKEN

    @property
    def count(self) -> int:
        return len(self.prompts)

    def first(self, items: int) -> FirstTokenEffect:
        return replace(self, prompts=self.prompts[:items])

    def texts(self, items: int) -> list[Text]:
        return [ending(ids) for ids in self.prompts[:items]]

    def values(self, source: LogitsSource, variants: Sequence[Vectors], items: int) -> torch.Tensor:
        chosen = self.prompts[:items]
        result = torch.zeros(len(variants), len(chosen), dtype=torch.float64)

        def use(variant: int, rows: Rows) -> None:
            for index, log_probs in rows:
                result[variant, index] = float((log_probs[0].exp().cpu() * self.shares).double().sum())

        next_token_log_probs(source, chosen, variants, self.batch_size, use, last_only=True)
        return result


def list_effect(
    source: LogitsSource,
    lists: PreparedLists,
    measured: Texts,
    *,
    expected_sign: float,
    batch_size: int,
    compared: int = MOST_PROMPTS,
) -> Effect:
    """What adding the vector does to the texts of two lists.

    Of texts that continue a prompt, or are plain text: the log-probability a token of positive texts minus that of
    negative ones, as of pairs, but of texts without partners. Of prompts whose answer begins where they end:
    :class:`FirstTokenEffect`, after negative prompts where the vector is added and after positive ones where it is
    taken away.

    Args:
        source: the base.
        measured: texts to measure on.
        compared: at most so many prompts of either list say which next tokens are whose.
    """
    sides = lists.tokenised(measured)
    if lists.continued:
        questions = [
            Question((_option(positive), _option(negative)), lettered=False)
            for positive, negative in zip(sides.positive, sides.negative, strict=False)
        ]
        return PairsEffect(questions, batch_size)
    prompts = sides.negative if expected_sign > 0 else sides.positive
    shares = _shares(source, lists.sides.first(compared), batch_size)
    return FirstTokenEffect([side.ids for side in prompts], shares, batch_size)


def unit_of(effect: Effect) -> str:
    """What the items of a list's effect are, after their number."""
    return "prompts" if isinstance(effect, FirstTokenEffect) else "texts of each list"


def _option(side: TokenisedSide) -> Option:
    return Option(side.ids, side.continuation_start)


def _shares(source: LogitsSource, sides: BothLists[TokenisedSide], batch_size: int) -> torch.Tensor:
    totals = [torch.zeros(()), torch.zeros(())]
    first = len(sides.positive)

    def use(_variant: int, rows: Rows) -> None:
        for index, log_probs in rows:
            totals[index >= first] = totals[index >= first] + wide(log_probs[0].exp()).cpu()

    # One call for both: a base that is streamed from the disk is read once for each.
    next_token_log_probs(source, [side.ids for side in sides], [{}], batch_size, use, last_only=True)
    means = [total / len(prompts) for total, prompts in zip(totals, (sides.positive, sides.negative), strict=True)]
    positive, negative = means
    little = _SMOOTHING / len(positive)
    return ((positive + little) / (positive + negative + 2 * little)).float()


def separations(
    entry: PreparedVector, vectors: Sequence[SteeringVector], opened: OpenedBase, *, limit: int, seed: int
) -> list[dict[str, Any]]:
    """How far apart held-out texts of the two lists lie along each of a recipe entry's vectors, where it was read.

    Args:
        vectors: of the recipe.
        limit: at most so many texts of either list.

    Returns:
        For each layer ``layer``, ``read_layer``, how many ``positives`` and ``negatives``, and what
        :func:`separation` says. Empty where nothing was held out.

    Raises:
        InputError, OutsideError: see :meth:`patcher.capture.reader.ResidualReader.read`.
    """
    lists = entry.lists
    if lists is None or not lists.held_out:
        return []
    sampled = lists.held_out.each(lambda texts: sample_texts(texts, limit, seed))
    sides = lists.tokenised(sampled)
    layers = sorted(set(entry.read_layers.values()))
    [read] = opened.reader.read([(list(sides), layers)])
    count = len(sides.positive)
    found = []
    for vector in (vector for vector in vectors if vector.name == entry.spec.name):
        at = read[entry.read_layers[vector.layer]].read
        towards = vector.values * (1.0 if entry.spec.factor > 0 else -1.0)
        found.append(
            {
                "layer": vector.layer,
                "read_layer": entry.read_layers[vector.layer],
                "positives": count,
                "negatives": len(sides.negative),
                **separation(at[:count], at[count:], towards, seed=seed),
            }
        )
    return found


def separation(
    positive: torch.Tensor, negative: torch.Tensor, direction: torch.Tensor, *, seed: int
) -> dict[str, float | bool | None]:
    """How far apart two lists lie along a direction, beside random ones.

    Args:
        positive: [n, hidden], activations that the direction was not made of.
        negative: [m, hidden], as well.
        direction: [hidden].
        seed: of the random directions.

    Returns:
        ``d_prime``: the distance of the means over the pooled standard deviation, None where nothing varies or there
        are fewer than two texts of a list; ``auc``: the share of couples in which the positive text lies further along
        (0.5 is chance); ``random_d_prime`` and ``random_auc``: the largest of :data:`RANDOM_DIRECTIONS` random
        directions, either way round; ``beyond_random``: whether ``d_prime`` is larger than all of theirs.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(RANDOM_DIRECTIONS, len(direction), generator=generator, dtype=torch.float64)
    axes = torch.cat([direction.double()[None], noise])
    axes = axes / axes.norm(dim=1, keepdim=True).clamp(min=1e-30)
    first, second = positive.double() @ axes.T, negative.double() @ axes.T
    ahead = first[:, None] - second[None]
    auc = ((ahead > 0).double() + 0.5 * (ahead == 0).double()).mean(dim=(0, 1))
    folded = torch.maximum(auc, 1 - auc)
    result: dict[str, float | bool | None] = {
        "d_prime": None,
        "auc": float(auc[0]),
        "random_d_prime": None,
        "random_auc": float(folded[1:].max()),
        "beyond_random": None,
    }
    freedom = len(first) + len(second) - 2
    if len(first) < 2 or len(second) < 2:
        return result
    pooled = ((first.var(dim=0) * (len(first) - 1) + second.var(dim=0) * (len(second) - 1)) / freedom).sqrt()
    largest = torch.maximum(first.abs().amax(dim=0), second.abs().amax(dim=0))
    if bool((pooled <= _ROUNDING * largest).any()):
        return result
    distances = (first.mean(dim=0) - second.mean(dim=0)) / pooled
    own, others = float(distances[0]), float(distances[1:].abs().max())
    return {**result, "d_prime": own, "random_d_prime": others, "beyond_random": own > others}


def separation_notes(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the user should know of separations that are not beyond random directions."""
    notes = []
    for entry in found:
        if entry["beyond_random"] is False:
            notes.append(
                f"layer {entry['layer']}: the held-out texts of the two lists lie no further apart along the vector "
                "than along a random direction"
            )
    return notes
