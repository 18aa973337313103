"""The evaluation that is part of every build: held-out pairs and, if given, on- and off-topic texts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from patcher.capture.logits import LogitsSource
from patcher.errors import InputError
from patcher.evaluate.held_out import Option, Question, evaluate_edits
from patcher.evaluate.scoring import perplexities
from patcher.pairs import ContrastPair, load_pairs, sample_pairs, tokenise_continuation
from patcher.recipe import Recipe, VectorSpec
from patcher.vectors.finding import PreparedVector

IN_SAMPLE = "measured on the pairs that the vector was made of: none were held out"


def evaluate_build(
    recipe: Recipe,
    prepared: Sequence[PreparedVector],
    source: LogitsSource,
    tokenizer: Any,
    vectors: Mapping[int, torch.Tensor],
    *,
    positions: int | None,
    recipe_folder: Path,
    progress: Callable[[str], None] | None = None,
) -> tuple[dict[str, Any] | None, list[str]]:
    """Measure all edits together on each vector's held-out pairs.

    Returns:
        The ``evaluation`` of ``steering.json`` (that of the first vector with pairs on top, all of them in
        ``per_vector``), or None where there is nothing to measure on; and notes that say why.
    """
    spec = recipe.evaluate
    if not spec.enabled or tokenizer is None:
        return None, ["the effect was not evaluated" + ("" if spec.enabled else ": `evaluate.enabled` is false")]
    results, notes = [], []
    for entry in prepared:
        pairs, held_out = _pairs_for(recipe, entry, recipe_folder)
        if not pairs:
            notes.append(f"vector `{entry.spec.name}` comes from a file: give `evaluate.pairs` to measure its effect")
            continue
        questions = [build_question(pair, tokenizer, entry.spec) for pair in pairs]
        result = evaluate_edits(
            source,
            vectors,
            questions,
            random_vectors=spec.random_vectors,
            seed=recipe.seed,
            expected_sign=math.copysign(1.0, entry.spec.factor),
            batch_size=batch_rows(recipe),
            progress=progress,
        )
        result["held_out"] = held_out
        if not held_out:
            result["notes"].append(IN_SAMPLE)
        results.append({"vector": entry.spec.name, **result})
    texts = _perplexities(recipe, source, tokenizer, vectors, positions, recipe_folder, progress)
    if not results and texts is None:
        return None, notes
    head = {key: value for key, value in results[0].items() if key != "vector"} if results else {}
    return {**head, "per_vector": results, "perplexity": texts}, notes


def batch_rows(recipe: Recipe) -> int:
    """Rows per forward pass of the evaluation, which keeps logits."""
    return 16 if recipe.capture.batch_size == "auto" else recipe.capture.batch_size


def _pairs_for(recipe: Recipe, entry: PreparedVector, recipe_folder: Path) -> tuple[Sequence[ContrastPair], bool]:
    """The pairs to measure on, and whether the vector has not seen them."""
    spec = recipe.evaluate
    if spec.pairs is not None:
        pairs = load_pairs(spec.pairs, base_folder=recipe_folder, format="auto", where="evaluate.pairs")
        return sample_pairs(pairs, spec.limit, recipe.seed), True
    chosen = entry.held_out or entry.used
    return sample_pairs(list(chosen), spec.limit, recipe.seed), bool(entry.held_out)


def check_evaluation_inputs(recipe: Recipe, recipe_folder: Path) -> None:
    """Read what the evaluation will need, so that a wrong path is known before the model runs.

    Raises:
        InputError: a file is missing, empty or not what it should be.
    """
    spec = recipe.evaluate
    if not spec.enabled:
        return
    if spec.pairs is not None:
        load_pairs(spec.pairs, base_folder=recipe_folder, format="auto", where="evaluate.pairs")
    for name, file in (("on_topic", spec.on_topic), ("off_topic", spec.off_topic)):
        if file is not None:
            read_passages(recipe_folder, file, f"evaluate.{name}")


def build_question(pair: ContrastPair, tokenizer: Any, spec: VectorSpec) -> Question:
    """What a held-out pair asks: its positive side first, then its negative one, then any other offered answer."""
    others = [choice for choice in pair.choices if choice not in (pair.positive, pair.negative)]
    others = [pair.negative, *others]
    options = []
    for text in (pair.positive, *others):
        ids, start = tokenise_continuation(pair.prompt, text, tokenizer, spec)
        options.append(Option(tuple(ids), start))
    return Question(tuple(options), lettered=pair.format == "ab")


def _perplexities(
    recipe: Recipe,
    source: LogitsSource,
    tokenizer: Any,
    vectors: Mapping[int, torch.Tensor],
    positions: int | None,
    recipe_folder: Path,
    progress: Callable[[str], None] | None,
) -> dict[str, dict[str, float]] | None:
    result = {}
    for name, file in (("on_topic", recipe.evaluate.on_topic), ("off_topic", recipe.evaluate.off_topic)):
        if file is None:
            continue
        if progress is not None:
            progress(f"evaluating: perplexity on the {name.replace('_', '-')} text")
        lines = read_passages(recipe_folder, file, f"evaluate.{name}")
        texts = [ids for ids in (tokenizer(line)["input_ids"][:positions] for line in lines) if len(ids) > 1]
        base, steered = perplexities(source, texts, [{}, vectors], batch_rows(recipe))
        result[name] = {"base": base, "steered": steered}
    return result or None


def read_passages(recipe_folder: Path, file: str, where: str) -> list[str]:
    """The non-empty lines of a text file.

    Raises:
        InputError: the file is missing, not UTF-8 text, or empty.
    """
    path = Path(file).expanduser()
    path = path if path.is_absolute() else recipe_folder / path
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError("the text cannot be read", where=f"{where}: {path}", found=error) from None
    passages = [line for line in lines if line]
    if not passages:
        raise InputError("the text is empty", where=f"{where}: {path}", remedy="put one passage on each line")
    return passages
