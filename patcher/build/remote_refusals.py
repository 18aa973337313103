"""What cannot be built remotely, said before anything is downloaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from patcher.architectures.quantised import quantisation_of
from patcher.checkpoint.completeness import Reading
from patcher.checkpoint.source import Source, locate
from patcher.disk.json_files import read_json_object
from patcher.errors import InputError
from patcher.recipe.file import LoadedRecipe
from patcher.routes.planner import ROUTES
from patcher.stacks.names import TRANSFORMERS
from patcher.vectors.prepared import PreparedVector

if TYPE_CHECKING:
    from patcher.capture.processes.messages import Processes

LOCAL = "give `output` a folder (or --output): the whole model is then downloaded, and published from there"


def check_recipe(loaded: LoadedRecipe, processes: Processes | None = None) -> tuple[str, str | None]:
    """The base's Hub id and revision.

    Raises:
        InputError: the recipe asks for what needs the whole model here, or for no place to publish it.
    """
    recipe = loaded.recipe
    if recipe.push is None:
        raise InputError(
            "`output: null` writes no folder here, and the recipe does not say where to publish the copy",
            where="push",
            remedy="add push: {repo: owner/name}, or give `output` a folder",
            code="remote",
        )
    found = locate(recipe.model, recipe_folder=loaded.folder)
    if isinstance(found, Path):
        raise _refused(
            "the base is a local folder, so the Hub has no files to copy", "model", "name the base on the Hub"
        )
    if recipe.adapter is not None:
        raise _refused("merging an adapter changes most of the weights", "adapter")
    for index, spec in enumerate(recipe.vectors):
        where = f"vectors.{index}"
        if spec.method == "persona":
            raise _refused("`method: persona` lets the whole model write", f"{where}.method")
        if spec.swept:
            raise _refused("a sweep runs the whole model", where, "give the layer and the coefficient as numbers")
    fitted = [name for name, route in ROUTES.items() if not route.exact]
    if not recipe.exact and recipe.route in ("auto", *fitted):
        raise _refused("a fitted route is fitted on the whole model", "exact", "take `exact: false` out")
    others = (
        [] if recipe.verify.stacks == "installed" else [name for name in recipe.verify.stacks if name != TRANSFORMERS]
    )
    if others:
        raise _refused(
            f"{', '.join(others)} would need the whole model",
            "verify.stacks",
            f"take {', '.join(others)} out of verify.stacks, and check the published copy with patch-model verify",
        )
    if processes is not None:
        raise _refused("only one process takes part", f"{processes.world.size} processes", "start it without torchrun")
    return found


def refuse_images(prepared: Sequence[PreparedVector]) -> None:
    """Refuse pairs with images.

    Raises:
        InputError: a pair has one.
    """
    for entry in prepared:
        if any(pair.image is not None for pair in (*entry.used, *entry.held_out)):
            raise _refused("pairs with images are read by the whole model", entry.where)


def check_base(source: Source, *, trust_remote_code: bool = False) -> None:
    """Refuse a base that cannot be checked by names and shapes.

    Raises:
        InputError: it is quantised, or brings code of its own that is to be run.
    """
    config = read_json_object(source.folder / "config.json")
    quantisation = quantisation_of(config)
    if quantisation is not None:
        raise _refused(
            f"the base is quantised ({quantisation.method}), and its copy could not be checked without the weights",
            "model",
            "use the unquantised version of this model, or give `output` a folder",
        )
    if trust_remote_code and "auto_map" in config:
        raise _refused("the base is run by code of its own", "trust_remote_code")


def require_plain_names(reading: Reading) -> None:
    """Refuse a base whose tensors have to be renamed: all its weight files would change.

    Raises:
        InputError: with what their names contain.
    """
    if reading.stripped:
        raise _refused(f"the base's tensor names contain `{reading.stripped[0]}`, and would have to change", "model")


def _refused(message: str, where: str, remedy: str = LOCAL) -> InputError:
    return InputError(
        f"{message}; this cannot be built remotely (`output: null`)", where=where, remedy=remedy, code="remote"
    )
