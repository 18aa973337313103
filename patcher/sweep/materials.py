"""What a sweep measures on: pairs in three parts that share nothing, and texts in two."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from patcher.capture.opened import OpenedBase
from patcher.errors import InputError
from patcher.evaluate.damage import POSITIONS, NeutralText
from patcher.evaluate.details import batch_rows
from patcher.evaluate.effect import Effect, PairsEffect, TextEffect
from patcher.evaluate.inputs import IN_SAMPLE, pairs_to_measure
from patcher.evaluate.lists import IN_SAMPLE as LISTS_IN_SAMPLE
from patcher.evaluate.lists import list_effect
from patcher.evaluate.questions import build_question, questions_with_prompt
from patcher.evaluate.side_effects import neutral_ids
from patcher.evaluate.texts import encode_texts, read_passages, split_sentences
from patcher.pairs.pair import ContrastPair, ListedText
from patcher.pairs.repeats import unseen
from patcher.pairs.sampling import sample_pairs, split_held_out, split_note
from patcher.pairs.tokens import tokenise_pairs
from patcher.recipe.file import LoadedRecipe
from patcher.sweep.cells import CellBench
from patcher.vectors.both_lists import NO_TEXTS, Texts, sample_texts, split_lists
from patcher.vectors.directions import Direction, steering_vector
from patcher.vectors.lists import PreparedLists
from patcher.vectors.prepared import PreparedVector


@dataclass(frozen=True)
class Parts:
    """The pairs of a recipe in three parts.

    Attributes:
        prepared: the recipe's vectors, the swept one made of the first part only.
        choose: the second part: cells are compared on it.
        report: the third: the chosen cell is reported on it.
        notes: what the user should know.
        choose_texts: in place of pairs to choose on, texts of two lists.
        report_texts: the same to report on.
        whole: the swept vector with the second part as its ``rest``: together they are what a build makes it of. None
            where it is made of the same as the one of ``prepared``.
        kept_back: whether no vector has seen the third part, so that it can confirm anything.
    """

    prepared: list[PreparedVector]
    choose: tuple[ContrastPair, ...]
    report: tuple[ContrastPair, ...]
    notes: tuple[str, ...]
    choose_texts: Texts = NO_TEXTS
    report_texts: Texts = NO_TEXTS
    whole: PreparedVector | None = None
    kept_back: bool = True


def split(prepared: Sequence[PreparedVector], index: int, loaded: LoadedRecipe, tokenizer: Any) -> Parts:
    """Split the swept vector's pairs by the recipe's seed: to make the vector, to choose the cell, to report it.

    The third part is the one that a build of the recipe holds out, so its evaluation too is of unseen pairs.
    """
    entry, notes = prepared[index], [note for one in prepared for note in one.notes]
    recipe = loaded.recipe
    report, kept_back, said = pairs_to_measure(loaded, prepared, entry)
    notes, unseen_report = notes + said, kept_back
    if entry.lists is not None and not report:
        return _split_lists(prepared, index, entry.lists, loaded, notes)
    if entry.spec.method == "file" or entry.lists is not None:
        given = report
        choose, report = split_held_out(given, 0.5, recipe.seed)
        notes += filter(None, [split_note(given, report, 0.5)])
        if given and not report:
            report, unseen_report = choose, False
            notes.append("too few pairs to keep some back: the cell is reported on the pairs that it was chosen on")
        if given and not kept_back:
            notes.append(f"nothing was kept back: {IN_SAMPLE}")
    else:
        # The fraction is of all pairs, those that are held out included.
        fraction = recipe.sweep.choose * (len(entry.used) + len(entry.held_out)) / len(entry.used)
        make, choose = split_held_out(entry.used, min(fraction, 0.9), recipe.seed + 1)
        fresh = unseen(choose, [pair for one in prepared if one is not entry for pair in one.made_of], beside=make)
        if len(fresh) < len(choose):
            seen = (
                f"{len(choose) - len(fresh)} of {len(choose)} pairs to choose on say the same as another vector's pairs"
            )
            notes.append(f"{seen}: {'they are left out' if fresh else 'there are no others'}")
            choose = fresh or choose
        if not choose or not kept_back:
            apart = recipe.evaluate.pairs is not None or entry.held_out
            choose, report = choose or make, report if apart else make
            notes.append(f"too few pairs to keep some back: {IN_SAMPLE}")
        pairs, _said = tokenise_pairs(make, tokenizer, entry.spec, entry.images)
        entry = replace(entry, pairs=tuple(pairs), used=tuple(make))
    shuffled = sample_pairs(choose, recipe.sweep.limit, recipe.seed)
    # Successive halving begins with the first few.
    random.Random(recipe.seed).shuffle(shuffled)
    # Nothing of a sweep is of a vector that was refitted: it would have seen the pairs that are reported on.
    parts = [one.without_refit() for one in (*prepared[:index], entry, *prepared[index + 1 :])]
    reported = sample_pairs(report, recipe.evaluate.limit, recipe.seed)
    made = {id(pair) for pair in entry.used}
    rest = [pair for pair in prepared[index].used if id(pair) not in made]
    whole = (
        replace(parts[index], rest=tuple(tokenise_pairs(rest, tokenizer, entry.spec, entry.images)[0]))
        if rest
        else None
    )
    told = tuple(dict.fromkeys(notes))
    return Parts(parts, tuple(shuffled), tuple(reported), told, whole=whole, kept_back=unseen_report)


def _split_lists(
    prepared: Sequence[PreparedVector], index: int, lists: PreparedLists, loaded: LoadedRecipe, notes: list[str]
) -> Parts:
    """The same of two lists, each of which is split."""
    recipe, held_out = loaded.recipe, lists.held_out
    fraction = recipe.sweep.choose * (len(lists.used) + len(held_out)) / len(lists.used)
    make, choose = split_lists(lists.used, min(fraction, 0.9), recipe.seed + 1)
    kept_back, left = bool(held_out), choose
    if not choose or not held_out:
        notes.append(f"too few texts to keep some back: {LISTS_IN_SAMPLE}")
    choose, report = choose or make, held_out or make

    def shuffled(texts: Sequence[ListedText]) -> list[ListedText]:
        chosen = sample_texts(texts, recipe.sweep.limit, recipe.seed)
        random.Random(recipe.seed).shuffle(chosen)
        return chosen

    chosen = choose.each(shuffled)
    reported = report.each(lambda texts: sample_texts(texts, recipe.evaluate.limit, recipe.seed))
    entry = replace(prepared[index], lists=replace(lists, used=make))
    parts = [one.without_refit() for one in (*prepared[:index], entry, *prepared[index + 1 :])]
    whole = replace(parts[index], lists=replace(lists, used=make, rest=left)) if left else None
    return Parts(parts, (), (), tuple(dict.fromkeys(notes)), chosen, reported, whole, kept_back)


def others(
    prepared: Sequence[PreparedVector], index: int, found: Sequence[Sequence[Direction]]
) -> dict[int, torch.Tensor]:
    """What the recipe's other vectors add: layer -> [hidden]."""
    total: dict[int, torch.Tensor] = {}
    rest = [*prepared[:index], *prepared[index + 1 :]]
    for entry, directions in zip(rest, found, strict=True):
        for direction in directions:
            vector = steering_vector(entry.spec, direction).values
            total[direction.layer] = total.get(direction.layer, torch.zeros(())) + vector
    return total


@dataclass(frozen=True)
class Materials:
    """Everything that cells and the report are measured on, as token ids.

    Attributes:
        choosing: what cells are measured on.
        reporting: the same on the items that are kept back, and on the neutral passages of a build.
        neutral_name: what the neutral passages are, for people.
        prompting: the report's items under the system prompt that asks for the behaviour, or None.
        splits: how many items are in each part.
        kept_back: whether no vector has seen the items of the report.
        notes: what the user should know.
    """

    choosing: CellBench
    reporting: CellBench
    neutral_name: str
    prompting: Effect | None
    splits: dict[str, int]
    kept_back: bool
    notes: tuple[str, ...]

    @property
    def on_pairs(self) -> bool:
        """Whether the effect is that on pairs or lists, and not on a text."""
        return not isinstance(self.choosing.effect, TextEffect)


def gather(
    loaded: LoadedRecipe, parts: Parts, opened: OpenedBase, index: int, added: Mapping[int, torch.Tensor], memory: int
) -> Materials:
    """Encode everything that is measured on.

    Args:
        index: of the vector that is swept.
        added: what the recipe's other vectors add; see :func:`others`.
        memory: bytes that may be kept of the base's distributions.

    Raises:
        InputError: there is nothing to measure the effect on, or a text cannot be read.
    """
    evaluate, tokenizer, spec = loaded.recipe.evaluate, opened.tokenizer, parts.prepared[index].spec
    rows = batch_rows(loaded.recipe)
    on_topic = _sentences(loaded, "on_topic", opened)
    off_topic = _sentences(loaded, "off_topic", opened)
    neutral, name = neutral_ids(loaded, opened)
    if not neutral:
        raise InputError(
            "the neutral text has no passage of two tokens or more, and damage is measured on it",
            where=f"evaluate.neutral: {evaluate.neutral}" if evaluate.neutral else "the bundled neutral passages",
            remedy="give `evaluate.neutral` a text file with one passage of several words on each line",
        )
    of_build = neutral[: evaluate.neutral_limit]
    of_cells = _every_other(neutral, evaluate.neutral_limit)
    choose, report, notes = _effects(parts.prepared[index], parts, on_topic, opened, rows)
    prompting: Effect | None = None
    if evaluate.system_prompt is not None and isinstance(report, TextEffect):
        notes.append("a system prompt is compared on pairs, and the effect is measured on a text: it is left out")
    elif evaluate.system_prompt is not None and parts.report_texts:
        notes.append("a system prompt is compared on pairs, and lists have none: it is left out")
    elif evaluate.system_prompt is not None:
        images = parts.prepared[index].images
        asked = questions_with_prompt(parts.report, tokenizer, spec, evaluate.system_prompt, images)
        prompting = PairsEffect(asked, rows)
    sign, neutral_text = math.copysign(1.0, spec.factor), NeutralText(of_cells, memory, POSITIONS)
    choosing = CellBench(opened.logits, choose, neutral_text, on_topic, off_topic, sign, added, rows)
    return Materials(
        choosing,
        replace(choosing, effect=report, neutral=NeutralText(of_build, memory, POSITIONS)),
        f"{len(of_cells)} {name} to choose on, {sum(map(len, of_cells))} tokens; the {len(of_build)} of a build to "
        f"report on, {sum(map(len, of_build))} tokens",
        prompting,
        {"make": parts.prepared[index].pair_count, "choose": choose.count, "report": report.count},
        parts.kept_back or isinstance(report, TextEffect),
        tuple(notes),
    )


def _effects(
    entry: PreparedVector, parts: Parts, on_topic: Sequence[Sequence[int]] | None, opened: OpenedBase, rows: int
) -> tuple[Effect, Effect, list[str]]:
    in_sample = any(text in note for note in parts.notes for text in (IN_SAMPLE, LISTS_IN_SAMPLE))
    if on_topic and len(on_topic) > 1 and (in_sample or not (parts.choose or parts.choose_texts)):
        # As the ActAdd post chooses: the sentences of a text that the vector should make likelier.
        return (
            TextEffect(on_topic[0::2], rows),
            TextEffect(on_topic[1::2], rows),
            ["the effect is that on the on-topic text: every other sentence to choose on, the others to report on"],
        )
    if entry.lists is not None and parts.choose_texts:
        sign = math.copysign(1.0, entry.spec.factor)
        choose, report = (
            list_effect(opened.logits, entry.lists, texts, expected_sign=sign, batch_size=rows)
            for texts in (parts.choose_texts, parts.report_texts)
        )
        return choose, report, []
    if not parts.choose:
        raise InputError(
            "there is nothing to measure the effect on: a vector from a file has no pairs",
            where="evaluate.pairs",
            remedy="give `evaluate.pairs`, or a text that the vector should make likelier as `evaluate.on_topic`",
        )
    asked = [
        [build_question(pair, opened.tokenizer, entry.spec, entry.images) for pair in pairs]
        for pairs in (parts.choose, parts.report)
    ]
    return PairsEffect(asked[0], rows), PairsEffect(asked[1], rows), []


def _every_other(texts: Sequence[Sequence[int]], limit: int) -> Sequence[Sequence[int]]:
    """Enough to choose on: what is chosen is measured on all that a build measures on."""
    return texts[0::2][:limit]


def _sentences(
    loaded: LoadedRecipe, name: Literal["on_topic", "off_topic"], opened: OpenedBase
) -> Sequence[Sequence[int]] | None:
    file: str | None = getattr(loaded.recipe.evaluate, name)
    if file is None:
        return None
    passages = read_passages(loaded.file(file), f"evaluate.{name}")
    sentences = [sentence for passage in passages for sentence in split_sentences(passage)]
    encoded = encode_texts(sentences, opened.tokenizer, opened.positions, opened.embeddings)
    return [ids for ids in encoded if len(ids) > 1]
