"""What a build asks of one of its vectors: the effect on what was held out of it, on as much as fits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from patcher.capture.logits import LogitsSource
from patcher.capture.opened import OpenedBase
from patcher.evaluate.budget import most_within
from patcher.evaluate.details import batch_rows
from patcher.evaluate.effect import Effect, Measured, PairsEffect
from patcher.evaluate.held_out import Question, measure_of
from patcher.evaluate.inputs import IN_SAMPLE, pairs_to_measure
from patcher.evaluate.lists import IN_SAMPLE as LISTS_IN_SAMPLE
from patcher.evaluate.lists import MOST_PROMPTS, list_effect, separation_notes, separations, unit_of
from patcher.evaluate.questions import build_question, questions_with_prompt
from patcher.evaluate.scoring import Vectors, tokens_run
from patcher.pairs.pair import ContrastPair
from patcher.pairs.sampling import sample_pairs
from patcher.recipe.file import LoadedRecipe
from patcher.vectors.both_lists import Texts, sample_texts
from patcher.vectors.lists import PreparedLists
from patcher.vectors.prepared import PreparedVector
from patcher.vectors.steering_vector import SteeringVector

_FOR_SHARES, _FOR_SEPARATION = 0.3, 0.2
"""Of what a list's effect may cost: for the next tokens that it is told by, and for how far the lists lie apart."""


@dataclass
class Asked:
    """What is asked of one vector, and what came of it.

    Attributes:
        entry: the vector.
        measured: the effect on the held-out items that fit.
        of: how many there would be.
        unit: what they are.
        rows: most in a batch.
        held_out: whether no vector has seen them.
        prompted: the same questions under a system prompt, or None.
        more: what else the manifest says of it.
        notes: what the user should know of it.
        compared: whether its controls were measured together with it.
    """

    entry: PreparedVector
    measured: Measured
    of: int
    unit: str
    rows: int
    held_out: bool
    prompted: Sequence[Question] | None = None
    more: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    compared: bool = False

    @property
    def count(self) -> int:
        """On how many items it is measured."""
        return self.measured.effect.count

    def prompt(self, source: LogitsSource) -> None:
        """Measure the system prompt that asks for the behaviour: alone, and with the vectors."""
        if self.prompted is not None:
            _name, measure = measure_of(self.prompted)
            values = measure(source, self.prompted, [{}, self.measured.vectors], self.rows)
            self.more["prompting"] = dict(zip(("alone", "steered"), values.mean(dim=1).tolist(), strict=True))

    def result(self, seed: int) -> dict[str, Any]:
        """One entry of `evaluation.per_vector`."""
        found = self.measured.result(seed)
        notes = [*found["notes"], *self.notes, *separation_notes(self.more.get("separation", ()))]
        return {"vector": self.entry.spec.name, **found, "held_out": self.held_out, **self.more, "notes": notes}


def asked_of(
    loaded: LoadedRecipe,
    prepared: Sequence[PreparedVector],
    entry: PreparedVector,
    own: Sequence[ContrastPair],
    opened: OpenedBase,
    found: Sequence[SteeringVector],
    vectors: Mapping[int, torch.Tensor],
    allowed: float,
) -> tuple[Asked | None, list[str]]:
    """The items of one vector, as many as fit; None where there is nothing to measure on.

    Args:
        own: ``evaluate.pairs``.
        found: the recipe's vectors.
        vectors: what is added.
        allowed: full-depth passes for base and steered.

    Returns:
        What is asked, and notes for the user.
    """
    recipe, spec, source = loaded.recipe, loaded.recipe.evaluate, opened.logits
    rows, seed, sign = batch_rows(recipe), recipe.seed, math.copysign(1.0, entry.spec.factor)
    pairs, held_out, notes = pairs_to_measure(loaded, prepared, entry, own)
    every = sample_pairs(pairs, spec.limit, seed)
    effect: Effect
    if every:
        questions = {id(pair): build_question(pair, opened.tokenizer, entry.spec, entry.images) for pair in every}

        def of_pairs(count: int) -> Effect:
            return PairsEffect([questions[id(pair)] for pair in sample_pairs(every, count, seed)], rows)

        effect = of_pairs(most_within(len(every), lambda count: _cost(source, of_pairs(count), vectors), allowed))
        unit = "held-out pairs" if held_out else "pairs"
        one = Asked(entry, Measured(effect, vectors, sign), len(every), unit, rows, held_out)
        one.notes = [] if held_out else [IN_SAMPLE]
        if spec.system_prompt is not None:
            chosen = sample_pairs(every, effect.count, seed)
            prompted = chosen, opened.tokenizer, entry.spec, spec.system_prompt
            one.prompted = questions_with_prompt(*prompted, entry.images)
        return one, notes
    if entry.lists is None:
        return None, [f"vector `{entry.spec.name}` comes from a file: give `evaluate.pairs` to measure its effect"]
    lists, held_out = entry.lists, bool(entry.lists.held_out)
    texts = (lists.held_out or lists.used).each(lambda part: sample_texts(part, spec.limit, seed))
    effect, of = _of_lists(source, lists, texts, vectors, sign, rows, allowed)
    one = Asked(entry, Measured(effect, vectors, sign), of, unit_of(effect), rows, held_out)
    one.notes = [] if held_out else [LISTS_IN_SAMPLE]
    limit = most_within(spec.limit, lambda count: _depth(lists, entry, source, count), _FOR_SEPARATION * allowed, 2)
    apart = separations(entry, found, opened, limit=limit, seed=seed)
    one.more = {"unit": unit_of(effect), "separation": apart}
    if spec.system_prompt is not None:
        notes.append(f"vector `{entry.spec.name}`: a system prompt is compared on pairs, and lists have none")
    return one, notes


def _cost(source: LogitsSource, effect: Effect, vectors: Vectors) -> float:
    return source.cost(tokens_run(source, effect.texts(effect.count), effect.batch_size), [{}, vectors])


def _of_lists(
    source: LogitsSource,
    lists: PreparedLists,
    texts: Texts,
    vectors: Vectors,
    sign: float,
    rows: int,
    allowed: float,
) -> tuple[Effect, int]:
    """The effect on as many texts of two lists as fit, and how many there would be."""

    def shares(count: int) -> float:
        return source.cost(sum(len(side.ids) for side in lists.sides.first(count)), [{}])

    compared = most_within(MOST_PROMPTS, shares, _FOR_SHARES * allowed, 2)
    whole = list_effect(source, lists, texts, expected_sign=sign, batch_size=rows, compared=compared)
    left = (1 - _FOR_SHARES - _FOR_SEPARATION) * allowed
    return whole.first(most_within(whole.count, lambda count: _cost(source, whole.first(count), vectors), left)), (
        whole.count
    )


def _depth(lists: PreparedLists, entry: PreparedVector, source: LogitsSource, count: int) -> float:
    """What it costs to read ``count`` held-out texts of either list where the vector was read."""
    tokens = sum(len(side.ids) for side in lists.tokenised(lists.held_out.first(count)))
    return tokens * (max(entry.read_layers.values()) + 1) / source.meter.blocks
