"""Every text of a recipe that the model will read, tokenised before any work: is there an embedding for each token?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from patcher.architectures.analysis import Architecture
from patcher.evaluate.inputs import own_pairs
from patcher.evaluate.questions import build_question, encode_prompts
from patcher.evaluate.texts import encode_texts, read_passages
from patcher.pairs.vocabulary import Vocabulary
from patcher.recipe.file import LoadedRecipe
from patcher.recipe.vector import VectorSpec
from patcher.vectors.prepared import PreparedVector
from patcher.verify.probes import PROBES

Fed = Iterator[tuple[str, Sequence[int]]]
"""Where a text is from, and its ids."""


def check_fed_texts(
    loaded: LoadedRecipe, prepared: Sequence[PreparedVector], tokenizer: Any, architecture: Architecture, *, fits: bool
) -> list[str]:
    """Hold the ids of every text that will be fed to the model against its embeddings.

    Args:
        tokenizer: of the model, or None.
        fits: whether the route fits a constant, on calibration texts.

    Returns:
        Notes for the user, on a tokenizer that does not go with the model in every way.

    Raises:
        InputError: a token has no embedding; or a text cannot be read or rendered.
    """
    if tokenizer is None:
        return []
    vocabulary = Vocabulary(tokenizer, architecture.embeddings)
    if not vocabulary.fits:
        vocabulary.require_any(PROBES)
        vocabulary.require(_fed(loaded, prepared, vocabulary, fits=fits))
    notes = vocabulary.notes()
    for entry in prepared:
        rows = [side.ids for side in entry.sides]
        rows += [ids for asked in (entry.asked.used if entry.asked else ()) for ids in asked.ids.values()]
        unknown = vocabulary.unknown_note(rows)
        notes += [f"vector `{entry.spec.name}`: {unknown}"] if unknown else []
    return notes


def _fed(loaded: LoadedRecipe, prepared: Sequence[PreparedVector], vocabulary: Vocabulary, *, fits: bool) -> Fed:
    recipe, tokenizer = loaded.recipe, vocabulary.tokenizer
    for entry in prepared:
        if entry.lists is not None:
            yield from ((text.origin, side.ids) for text, side in entry.lists.tokens.items())
        for pair in entry.pairs:
            yield from ((pair.origin, side.ids) for side in (pair.positive, pair.negative))
        for asked in (*entry.asked.used, *entry.asked.held_out) if entry.asked else ():
            yield from ((asked.question.origin, ids) for ids in asked.ids.values())
    if recipe.evaluate.enabled:
        yield from _evaluated(loaded, prepared, tokenizer, vocabulary.embeddings)
    for number, text in enumerate(recipe.verify.probes or ()):
        yield f"verify.probes.{number}", tokenizer(text)["input_ids"]
    if fits and recipe.calibration.texts is not None:
        from patcher.routes.rank_one.calibration import load_calibration

        for number, text in enumerate(load_calibration(recipe.calibration.texts, loaded.folder), 1):
            yield f"calibration.texts: passage {number}", tokenizer(text, verbose=False)["input_ids"]


def _evaluated(loaded: LoadedRecipe, prepared: Sequence[PreparedVector], tokenizer: Any, embeddings: int | None) -> Fed:
    spec, own = loaded.recipe.evaluate, own_pairs(loaded)
    for entry in prepared:
        under = [entry.spec, *_prompted(entry.spec, spec.system_prompt)]
        for pair in own or (*entry.held_out, *entry.used):
            for rendered in under:
                options = build_question(pair, tokenizer, rendered, entry.images).options
                yield from ((pair.origin, option.ids) for option in options)
    first = prepared[0].spec
    for system_prompt in dict.fromkeys([first.system_prompt, spec.system_prompt]):
        rows = encode_prompts(spec.prompts, tokenizer, first, system_prompt)
        yield from ((f"evaluate.prompts.{number}", ids) for number, ids in enumerate(rows))
    for name, file in (("on_topic", spec.on_topic), ("off_topic", spec.off_topic), ("neutral", spec.neutral)):
        if file is not None:
            passages = read_passages(loaded.file(file), f"evaluate.{name}")
            rows = encode_texts(passages, tokenizer, embeddings=embeddings)
            yield from ((f"evaluate.{name}: {file}, passage {number}", ids) for number, ids in enumerate(rows, 1))


def _prompted(spec: VectorSpec, system_prompt: str | None) -> list[VectorSpec]:
    return [] if system_prompt is None else [spec.model_copy(update={"system_prompt": system_prompt})]
