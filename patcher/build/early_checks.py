"""What is wrong with a recipe's files and the base's config, found in well under a second: torch is not imported.

The plan looks at everything again, and at more. What is read here is not read a second time.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from patcher.architectures.config_keys import BLOCK_COUNTS, whole_number
from patcher.architectures.quantised import quantisation_of
from patcher.checkpoint.adapter_folder import find_adapter
from patcher.checkpoint.config_limits import require_plausible
from patcher.checkpoint.folder import CheckpointFolder
from patcher.checkpoint.given import refuse_other_heads
from patcher.checkpoint.source import locate, locate_model
from patcher.checkpoint.staging import check_output
from patcher.disk.json_files import read_json_object
from patcher.errors import InputError
from patcher.errors.misspelt import closest
from patcher.evaluate.texts import read_passages
from patcher.pairs.formats import load_pairs
from patcher.pairs.hub_datasets import HUB_PREFIX
from patcher.pairs.image_prompts import no_images, states_images
from patcher.pairs.images import require_pillow
from patcher.pairs.lists import load_list
from patcher.pairs.pair import ContrastPair
from patcher.pairs.questions import load_questions
from patcher.recipe.file import LoadedRecipe
from patcher.recipe.schema import Recipe
from patcher.recipe.vector import VectorSpec
from patcher.vectors.layers import resolve_layers, resolve_read_layer
from patcher.vectors.vector_beginnings import check_beginning

_DEVICES = ("auto", "cpu", "cuda", "mps", "xpu", "hpu", "npu", "mtia", "xla", "maia", "privateuseone", "meta")


def is_remote(recipe: Recipe, output: Path | None) -> bool:
    """Whether the copy is to be made on the Hub: the recipe says `output: null`, and no --output is given."""
    return output is None and recipe.output is None and "output" in recipe.model_fields_set


def check_early(loaded: LoadedRecipe, output: Path | None, *, force: bool = False) -> None:
    """Refuse what needs neither torch nor the network to be seen as wrong.

    Args:
        output: the folder to be written; None: none is.
        force: whether one of ours may be replaced.

    Raises:
        InputError, OutsideError, MissingExtraError: see :func:`patcher.build.planning.plan_build`.
    """
    recipe = loaded.recipe
    found = locate_model(recipe.model, recipe_folder=loaded.folder)
    blocks, base = None, None
    if isinstance(found, Path):
        base = found
        if output is not None:
            check_output(output, force=force, inputs=(found.resolve(),))
        blocks = _check_base(found)
    _check_device(recipe.device)
    if recipe.adapter is not None:
        _check_adapter(loaded, recipe.adapter)
    loaded.require_vector_files()
    for index, spec in enumerate(recipe.vectors):
        where = loaded.place(f"vectors.{index}")
        if blocks is not None:
            for layer in resolve_layers(spec, blocks, where):
                resolve_read_layer(spec, layer, blocks, where)
        _check_images(_check_data(loaded, spec, where), base)
    _check_images(_check_evaluation(loaded), base)


def _check_base(folder: Path) -> int | None:
    """The number of blocks that its config.json states, if it states one."""
    stated, where = read_json_object(folder / "config.json"), str(folder / "config.json")
    refuse_other_heads(stated, where)
    require_plausible(stated, where)
    quantisation_of(stated, where)
    checkpoint = CheckpointFolder(folder)
    if not checkpoint.is_bin:
        assert checkpoint.tensors is not None
    parts = [part for part in (stated, stated.get("text_config")) if isinstance(part, dict)]
    counts = {count for part in parts for name in BLOCK_COUNTS if (count := whole_number(part, name)) is not None}
    # Where there are several, which one counts is the class's matter.
    return counts.pop() if len(counts) == 1 else None


def _check_device(device: str) -> None:
    kind = device.partition(":")[0]
    if kind not in _DEVICES:
        near = closest(kind, _DEVICES)
        raise InputError(
            "there is no such device",
            where=f"device: {device}",
            found=f"`{kind}`",
            remedy=f"did you mean `{near}`?" if near else "device: auto",
        )


def _check_adapter(loaded: LoadedRecipe, adapter: str) -> None:
    place = loaded.folder.joinpath(adapter)
    if place.is_file() or isinstance(locate(adapter, recipe_folder=loaded.folder, where="adapter"), Path):
        assert find_adapter(adapter, loaded.folder).tensors is not None


def _check_images(pairs: Sequence[ContrastPair], base: Path | None) -> None:
    """Whether the base takes images at all, and whether they can be opened."""
    if not any(pair.image is not None for pair in pairs):
        return
    if base is not None:
        place = base / "config.json"
        if not states_images(config := read_json_object(place)):
            raise no_images(str(place), f"`{config.get('model_type')}`, and no key about images")
    require_pillow()


def _check_data(loaded: LoadedRecipe, spec: VectorSpec, where: str) -> Sequence[ContrastPair]:
    """The rows of its files, of which contrast pairs are returned; data sets of the Hub are read later."""
    if spec.method == "file":
        check_beginning(loaded.file(str(spec.file)))
    elif spec.of_lists:
        for key, side in (("positives", "positive"), ("negatives", "negative")):
            if not _on_the_hub(getattr(spec, key)):
                load_list(spec, side, base_folder=loaded.folder, where=f"{where}.{key}")  # type: ignore[arg-type]
    elif spec.pairs is None:
        if not _on_the_hub(spec.questions):
            load_questions(spec.questions or [], base_folder=loaded.folder, where=f"{where}.questions")
    elif not _on_the_hub(spec.pairs):
        place = f"{where}.pairs"
        return load_pairs(spec.pairs, base_folder=loaded.folder, format=spec.format, columns=spec.columns, where=place)
    return ()


def _check_evaluation(loaded: LoadedRecipe) -> Sequence[ContrastPair]:
    spec, pairs = loaded.recipe.evaluate, list[ContrastPair]()
    if not spec.enabled:
        return pairs
    if spec.pairs is not None and not _on_the_hub(spec.pairs):
        place = "evaluate.pairs"
        pairs = load_pairs(spec.pairs, base_folder=loaded.folder, format=spec.format, columns=spec.columns, where=place)
    for name, file in (("on_topic", spec.on_topic), ("off_topic", spec.off_topic), ("neutral", spec.neutral)):
        if file is not None:
            read_passages(loaded.file(file), f"evaluate.{name}")
    return pairs


def _on_the_hub(source: object) -> bool:
    return isinstance(source, str) and source.startswith(HUB_PREFIX)
