"""From a recipe's vectors to steering vectors: pairs are read and checked first, then the model runs once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from typing import Any

from torch import nn

from patcher.capture.model import require_tokenizer
from patcher.capture.reader import Request, ResidualReader
from patcher.errors import InputError
from patcher.pairs.formats import load_pairs
from patcher.pairs.image_prompts import ImagePrompts
from patcher.pairs.pair import ContrastPair, TokenisedSide
from patcher.pairs.sampling import letter_imbalance, sample_pairs, split_held_out, split_note
from patcher.pairs.templates import settled
from patcher.pairs.tokens import tokenise_pairs
from patcher.progress.stage import Say, doing, silent
from patcher.recipe.file import LoadedRecipe
from patcher.recipe.vector import VectorSpec
from patcher.vectors.directions import Direction, direction_of, directions_of_file, steering_vector
from patcher.vectors.files.asked import Asked, SteeredModel
from patcher.vectors.files.reading import VectorFile
from patcher.vectors.layers import resolve_layers
from patcher.vectors.lists import prepare_lists
from patcher.vectors.persona import answer
from patcher.vectors.persona_questions import AskedQuestions, prepare_questions
from patcher.vectors.prepared import PreparedVector
from patcher.vectors.refit import joined, refit_note
from patcher.vectors.steering_vector import SteeringVector


def prepare_vectors(
    loaded: LoadedRecipe,
    tokenizer: Any,
    block_count: int,
    model: SteeredModel | None = None,
    images: ImagePrompts | None = None,
) -> list[PreparedVector]:
    """Resolve layers, read pairs, split them and tokenise them, for every vector of the recipe; read vector files.

    Args:
        model: what the vectors are for; needed for those from files.
        images: reads pairs with images.

    Raises:
        InputError: see :mod:`patcher.pairs`, :mod:`patcher.vectors.layers` and :mod:`patcher.vectors.files`.
    """
    evaluate = loaded.recipe.evaluate
    fraction = evaluate.held_out if evaluate.enabled and evaluate.pairs is None else 0.0
    today, prepared = date.today(), []
    for index, spec in enumerate(loaded.recipe.vectors):
        where = loaded.place(f"vectors.{index}")
        spec = settled(spec, tokenizer, today, where)
        prepared.append(_prepared(loaded, spec, where, tokenizer, block_count, model, fraction, images))
    return [replace(entry, images=images) for entry in prepared]


def _prepared(
    loaded: LoadedRecipe,
    spec: VectorSpec,
    where: str,
    tokenizer: Any,
    block_count: int,
    model: SteeredModel | None,
    fraction: float,
    images: ImagePrompts | None,
) -> PreparedVector:
    seed = loaded.recipe.seed
    entry = PreparedVector(spec, where, (), {}).at_layers(resolve_layers(spec, block_count, where), block_count)
    if spec.method == "file":
        assert model is not None
        return _of_file(replace(entry, file=VectorFile(loaded.file(str(spec.file)), model, Asked.of(spec))))
    key = f"{where}.{'positives' if spec.of_lists else 'questions' if spec.pairs is None else 'pairs'}"
    require_tokenizer(tokenizer, "contrast pairs need one", key, ", or use a vector from a file")
    if spec.of_lists:
        lists, said = prepare_lists(
            spec, tokenizer, recipe_folder=loaded.folder, held_out=fraction, seed=seed, where=where
        )
        said += filter(None, [refit_note(spec, tuple(lists.held_out))])
        return replace(entry, lists=lists, notes=tuple(f"vector `{spec.name}`: {note}" for note in said))
    if spec.pairs is None:
        asked, said = prepare_questions(
            spec, tokenizer, recipe_folder=loaded.folder, held_out=fraction, seed=seed, where=where
        )
        said += filter(None, [refit_note(spec, asked.held_out)])
        notes = tuple(f"vector `{spec.name}`: {note}" for note in said)
        return replace(entry, notes=notes, asked=asked)
    read: list[str] = []
    rows = load_pairs(
        spec.pairs,
        base_folder=loaded.folder,
        format=spec.format,
        columns=spec.columns,
        where=f"{where}.pairs",
        notes=read,
    )
    if images is None and any(pair.image is not None for pair in rows):
        raise InputError(
            "pairs with images are read by the whole model, which is not here",
            where=f"{where}.pairs",
            remedy="give `output` a folder (or --output), or leave the images out of the pairs",
        )
    rows = sample_pairs(rows, spec.limit, seed)
    used, held_out = split_held_out(rows, fraction, seed)
    warnings = [letter_imbalance(used), split_note(rows, held_out, fraction), refit_note(spec, held_out)]
    pairs, said = tokenise_pairs(used, tokenizer, spec, images)
    said += images_note(rows)
    return replace(
        entry,
        pairs=tuple(pairs),
        used=tuple(used),
        held_out=tuple(held_out),
        rest=tuple(tokenise_pairs(held_out, tokenizer, spec, images)[0]) if spec.refit else (),
        notes=tuple(f"vector `{spec.name}`: {note}" for note in [*read, *filter(None, warnings), *said]),
    )


def images_note(pairs: Sequence[ContrastPair]) -> list[str]:
    """How many of the pairs have images, for people; nothing where none has."""
    count = sum(pair.image is not None for pair in pairs)
    if not count:
        return []
    which = "each pair has an image" if count == len(pairs) else f"{count} of {len(pairs)} pairs have an image"
    different = len({pair.image.digest for pair in pairs if pair.image is not None})
    return [f"{which}, which both its sides share ({different} different image{'s' * (different != 1)})"]


def _of_file(entry: PreparedVector) -> PreparedVector:
    """With what is said of its file, which is read here: a wrong one is refused before any work."""
    assert entry.file is not None
    if entry.spec.layer == "auto":
        # A sweep reads the layers of its grid; this one only stands for them.
        entry.file.contents()
        return entry
    return replace(entry, notes=tuple(f"vector `{entry.spec.name}`: {said}" for said in entry.file.said(entry.layers)))


def answer_questions(
    prepared: Sequence[PreparedVector],
    model: nn.Module,
    tokenizer: Any,
    *,
    seed: int,
    progress: Say | None = None,
) -> list[PreparedVector]:
    """Let the model write the pairs of vectors of method ``persona``; the other vectors stay as they are.

    Args:
        model: a whole causal LM, in eval mode.
        seed: of the sampling.

    Raises:
        InputError, OutsideError: see :func:`patcher.vectors.persona.answer`.
    """

    def with_answers(entry: PreparedVector, asked: AskedQuestions) -> PreparedVector:
        with doing(progress or silent, f"writing `{entry.spec.name}`", unit="responses") as writing:
            found = answer(asked, model, tokenizer, entry.spec, seed=seed, where=entry.where, progress=writing.at)
        return replace(entry, **{**vars(found), "notes": (*entry.notes, *found.notes), "asked": None})

    return [entry if entry.asked is None else with_answers(entry, entry.asked) for entry in prepared]


def find_directions(
    prepared: Sequence[PreparedVector],
    reader: ResidualReader,
    *,
    neutral: Sequence[Sequence[int]],
    progress: Say | None = None,
) -> list[list[Direction]]:
    """For every vector of a recipe, its direction at each of its layers.

    Args:
        reader: reads the residuals of the base.
        neutral: token ids of neutral texts; the residual norm beside a vector from a file is measured on them.

    Raises:
        InputError: a file does not fit.
    """
    say = progress or silent
    # Held-out pairs that a final vector is made of are read with the others, in a request of their own.
    refitted = [(list(entry.rest_sides), _read_layers(entry)) for entry in prepared if entry.rest_sides]
    requests = [*(_request(entry, neutral) for entry in prepared), *refitted]
    with doing(say, "reading activations", sum(len(prompts) for prompts, _layers in requests), "prompts") as reading:
        residuals = reader.read(requests, reading.at)
    found, of_rest = [], iter(residuals[len(prepared) :])
    for entry, read in zip(prepared, residuals, strict=False):
        if entry.file is not None:
            norms = {layer: at.mean_norm for layer, at in read.items()}
            found.append(directions_of_file(entry, norms))
            continue
        count, rest = len(entry.sides.positive), entry.rest_sides
        directions = [direction_of(entry, layer, read[entry.read_layers[layer]], count) for layer in entry.layers]
        if rest:
            whole = joined(read, count, next(of_rest), len(rest.positive))
            count += len(rest.positive)
            directions = [
                replace(one, of_all=direction_of(entry, one.layer, whole[entry.read_layers[one.layer]], count))
                for one in directions
            ]
        found.append(directions)
    return found


def find_vectors(
    prepared: Sequence[PreparedVector],
    reader: ResidualReader,
    *,
    neutral: Sequence[Sequence[int]],
    progress: Say | None = None,
) -> list[SteeringVector]:
    """Make every steering vector of a recipe; see :func:`find_directions`.

    Raises:
        InputError: a direction is zero or not finite, or its file does not fit.
    """
    found = find_directions(prepared, reader, neutral=neutral, progress=progress)
    return [
        steering_vector(entry.spec, direction)
        for entry, directions in zip(prepared, found, strict=True)
        for direction in directions
    ]


def _request(entry: PreparedVector, neutral: Sequence[Sequence[int]]) -> Request:
    if entry.spec.method == "file":
        return [TokenisedSide(tuple(ids), (len(ids) - 1,), 0) for ids in neutral if ids], list(entry.layers)
    return list(entry.sides), _read_layers(entry)


def _read_layers(entry: PreparedVector) -> list[int]:
    return sorted(set(entry.read_layers.values()))
