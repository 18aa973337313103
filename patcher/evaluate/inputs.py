"""What a recipe's evaluation reads: its pairs, its texts, its tasks."""

from __future__ import annotations

from collections.abc import Sequence

from patcher.evaluate.lm_eval_tasks import Tasks, check_tasks
from patcher.evaluate.scorers import load_scorer
from patcher.evaluate.texts import read_passages
from patcher.pairs.formats import load_pairs
from patcher.pairs.pair import ContrastPair
from patcher.pairs.repeats import unseen
from patcher.recipe.file import LoadedRecipe
from patcher.vectors.prepared import PreparedVector

IN_SAMPLE = "measured on the pairs that the vector was made of: none were held out"


def pairs_to_measure(
    loaded: LoadedRecipe,
    prepared: Sequence[PreparedVector],
    entry: PreparedVector,
    own: Sequence[ContrastPair] | None = None,
) -> tuple[list[ContrastPair], bool, list[str]]:
    """The pairs that a vector's effect can be measured on: ``evaluate.pairs``, else its held-out ones.

    All vectors of a recipe are measured together, so what says the same as a pair that any of them is made of is left
    out (:mod:`patcher.pairs.repeats`).

    Args:
        own: ``evaluate.pairs``, where they have been read.

    Returns:
        The pairs, the vector's own where there are no others, none where it has none; whether no vector has seen
        them; and notes.

    Raises:
        InputError: see :mod:`patcher.pairs`.
    """
    own = own_pairs(loaded) if own is None else own
    chosen = list(own or entry.kept_out)
    if not chosen and entry.lists is not None:
        return [], False, []
    if not chosen:
        return list(entry.made_of), False, []
    left = chosen
    for other in prepared:
        if own or other is not entry:
            left = unseen(left, other.made_of, beside=() if own else entry.made_of)
    whose = "`evaluate.pairs`" if own else f"the held-out pairs of vector `{entry.spec.name}`"
    if not left:
        return chosen, False, [f"all {len(chosen)} of {whose} say the same as pairs that a vector is made of"]
    if len(left) == len(chosen):
        return chosen, True, []
    said = f"{len(chosen) - len(left)} of {len(chosen)} of {whose} say the same as pairs that a vector is made of"
    return left, True, [f"{said}: they are not measured on"]


def own_pairs(loaded: LoadedRecipe, notes: list[str] | None = None) -> list[ContrastPair]:
    """The pairs of ``evaluate.pairs``, read once for a recipe; none where it gives none.

    Args:
        notes: what was guessed when they were read is added to them.

    Raises:
        InputError: see :mod:`patcher.pairs`.
    """
    spec = loaded.recipe.evaluate
    given = spec.pairs
    if given is None:
        return []

    def read() -> tuple[list[ContrastPair], list[str]]:
        said: list[str] = []
        pairs = load_pairs(
            given,
            base_folder=loaded.folder,
            format=spec.format,
            columns=spec.columns,
            where="evaluate.pairs",
            notes=said,
        )
        return pairs, said

    pairs, said = loaded.once(("evaluate.pairs", repr((spec.pairs, spec.format, spec.columns))), read)
    if notes is not None:
        notes += [f"evaluate.pairs: {note}" for note in said]
    return list(pairs)


def check_evaluation_inputs(loaded: LoadedRecipe, prepared: Sequence[PreparedVector]) -> list[str]:
    """Read what the evaluation will need, so that a wrong path is known before the model runs.

    Returns:
        Notes on the pairs that it can be measured on.

    Raises:
        InputError: a file is missing, empty or not what it should be.
    """
    spec = loaded.recipe.evaluate
    if not spec.enabled:
        return []
    own = own_pairs(loaded)
    notes = [note for entry in prepared for note in pairs_to_measure(loaded, prepared, entry, own)[2]]
    for name, file in (("on_topic", spec.on_topic), ("off_topic", spec.off_topic), ("neutral", spec.neutral)):
        if file is not None:
            read_passages(loaded.file(file), f"evaluate.{name}")
    if spec.scorer is not None:
        load_scorer(spec.scorer, where="evaluate.scorer")
    if spec.lm_eval:
        check_tasks(lm_eval_tasks(loaded))
    return list(dict.fromkeys(notes))


def lm_eval_tasks(loaded: LoadedRecipe) -> Tasks:
    """The lm-eval tasks that the recipe asks for."""
    spec = loaded.recipe.evaluate
    folder = None if spec.lm_eval_folder is None else loaded.file(spec.lm_eval_folder)
    return Tasks(spec.lm_eval, folder, spec.lm_eval_limit, loaded.recipe.seed)
