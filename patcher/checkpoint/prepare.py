"""The base, ready to be copied from: found, its pickles converted, its adapter merged."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from patcher.architectures.decoder import decoder_config
from patcher.architectures.quantised import quantisation_of
from patcher.checkpoint.adapter import merge_adapter
from patcher.checkpoint.adapter_folder import AdapterFolder, find_adapter
from patcher.checkpoint.bin_files import convert_bin
from patcher.checkpoint.config_limits import require_plausible
from patcher.checkpoint.folder import CheckpointFolder
from patcher.checkpoint.given import refuse_other_heads
from patcher.checkpoint.safetensors_file import DTYPES, FLOATS
from patcher.checkpoint.source import Source, fetch, locate_model, require_model
from patcher.checkpoint.staging import scratch_folder
from patcher.checkpoint.stored_names import write_renamed
from patcher.disk.failures import disk_errors
from patcher.errors import InputError, OutsideError
from patcher.errors.causes import cause_of
from patcher.progress.stage import Say, silent

if TYPE_CHECKING:
    from patcher.architectures.analysis import Architecture
    from patcher.recipe.file import LoadedRecipe


@dataclass(frozen=True)
class PreparedBase:
    """A base whose bytes can be copied.

    Attributes:
        checkpoint: safetensors, adapter merged; names, dtypes and bytes as they will be in the copy.
        reference_folder: what stock software loads as the unsteered model.
        adapter: the adapter, if one was merged.
        notes: what the user should know of it.
    """

    checkpoint: CheckpointFolder
    reference_folder: Path
    adapter: AdapterFolder | None
    notes: tuple[str, ...] = ()

    @property
    def parameter_count(self) -> int:
        return sum(math.prod(info.shape) for info in self.checkpoint.tensors.values())

    def loaded_count(self, architecture: Architecture) -> int:
        """The parameters that are loaded for texts; of a quantised base, all that are stored."""
        unread = architecture.unread if architecture.quantisation is None else 0
        return max(0, self.parameter_count - unread)

    @property
    def stored_dtype(self) -> torch.dtype:
        """The dtype that most of the stored parameters have."""
        sizes: dict[str, int] = {}
        for info in self.checkpoint.tensors.values():
            if info.dtype in FLOATS:
                sizes[info.dtype] = sizes.get(info.dtype, 0) + math.prod(info.shape)
        return DTYPES[max(sizes, key=lambda name: sizes[name])] if sizes else torch.float32


def find_model(model: str, recipe_folder: Path, *, weights: bool, where: str = "model", say: Say = silent) -> Source:
    """The base as a local folder; of a Hub model, only the small files unless ``weights``.

    Raises:
        InputError, OutsideError: see :mod:`patcher.checkpoint.source`.
    """
    found = locate_model(model, recipe_folder=recipe_folder, where=where)
    if isinstance(found, Path):
        return Source(found.resolve().name, False, None, found)
    try:
        source = fetch(*found, weights=weights, say=say)
    except (InputError, OutsideError):
        if not Path(model).is_dir():
            raise
        raise InputError(
            "there is no such folder beside the recipe, and no such model could be had from the Hub",
            where=f"{where}: {model}",
            found="the working directory has a folder of this name, and paths are relative to the recipe",
            remedy=f"write {os.path.relpath(Path.cwd() / model, recipe_folder)}",
        ) from None
    require_model(source, where)
    return source


def read_config(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The folder's transformers config; of a multimodal wrapper its decoder's, which remembers the whole.

    Raises:
        InputError: no config, an architecture that this transformers does not know, sizes that no model has, or a
            checkpoint that is quantised in a way that is not known here.
    """
    import transformers
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    from patcher.architectures.model_class import quiet_transformers
    from patcher.disk.json_files import read_json_object

    stated, where = read_json_object(folder / "config.json"), str(folder / "config.json")
    refuse_other_heads(stated, where)
    require_plausible(stated, where)
    quantisation_of(stated, where)
    try:
        with quiet_transformers():
            whole = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
        return decoder_config(whole)
    except (
        OSError, ValueError, LookupError, TypeError, AttributeError, ImportError, ArithmeticError, RuntimeError,
        AssertionError, StrictDataclassError,
    ) as error:  # fmt: skip
        message = "transformers does not understand the model's config"
        remedy = "correct config.json, or download it again"
        if "does not recognize this architecture" in str(error):
            remedy = f"check `model_type` in config.json; this is transformers {transformers.__version__}"
        if "trust_remote_code" in str(error):
            message = "the model comes with Python code of its own, which is not run unless you say so"
            remedy = "if you trust it: `trust_remote_code: true` in a recipe, --trust-remote-code for other commands"
        raise InputError(message, where=where, found=cause_of(error), remedy=remedy) from None


@contextmanager
def prepared_base(
    source: Source,
    loaded: LoadedRecipe,
    output: Path,
    say: Say,
    adapter: AdapterFolder | None = None,
    stripped: Sequence[str] = (),
) -> Iterator[PreparedBase]:
    """Convert ``.bin`` weights, rename tensors, and merge the adapter, in a scratch folder beside the output that is
    removed after.

    Args:
        adapter: the recipe's, as the plan found it; without it, it is looked for, and all its side files are used.
        stripped: what is left out of the names on disk, see :mod:`patcher.checkpoint.stored_names`.

    Raises:
        InputError: see :mod:`patcher.checkpoint.bin_files` and :mod:`patcher.checkpoint.adapter`; or the base is
            quantised, and there is an adapter.
    """
    checkpoint, recipe = CheckpointFolder(source.folder), loaded.recipe
    if not (checkpoint.is_bin or stripped) and recipe.adapter is None:
        yield PreparedBase(checkpoint, source.folder, None)
        return
    if recipe.adapter is not None:
        refuse_quantised(checkpoint.config)
        adapter = adapter or find_adapter(recipe.adapter, loaded.folder)
    with disk_errors(output), scratch_folder(output) as scratch:
        checkpoint, notes = _rewritten(checkpoint, scratch, stripped, adapter, recipe.trust_remote_code, say)
        # Stock software reads .bin files as well, and those are what the user has.
        reference = source.folder if adapter is None and not stripped else checkpoint.path
        yield PreparedBase(checkpoint, reference, adapter, notes)


def _rewritten(
    checkpoint: CheckpointFolder,
    scratch: Path,
    stripped: Sequence[str],
    adapter: AdapterFolder | None,
    trust_remote_code: bool,
    say: Say,
) -> tuple[CheckpointFolder, tuple[str, ...]]:
    """The base as safetensors, under the names that stock software reads, the adapter merged; and notes on this.

    Each step has a folder in ``scratch``, and only the last one's is left.
    """
    notes: tuple[str, ...] = ()
    if checkpoint.is_bin:
        say("converting the .bin weights to safetensors")
        checkpoint = convert_bin(checkpoint, scratch / "converted")
    if stripped:
        say("writing the base under the names that stock software reads")
        checkpoint = write_renamed(checkpoint, scratch / "renamed", stripped)
        shutil.rmtree(scratch / "converted", ignore_errors=True)
    if adapter is not None:
        say("merging the adapter")
        merged = merge_adapter(checkpoint, adapter, scratch / "merged", trust_remote_code=trust_remote_code)
        checkpoint, notes = merged.checkpoint, (*adapter.notes, *merged.notes)
        for before in ("converted", "renamed"):
            shutil.rmtree(scratch / before, ignore_errors=True)
    return checkpoint, notes


def refuse_quantised(config: Mapping[str, Any]) -> None:
    """Refuse a base that no adapter can be merged into, by its config.json.

    Raises:
        InputError: it is quantised.
    """
    quantisation = quantisation_of(config)
    if quantisation is not None:
        raise InputError(
            f"the base is quantised ({quantisation.method}), and no adapter can be merged into quantised weights",
            where="adapter",
            remedy="use the unquantised version of this model",
            code="quantised",
        )


@contextmanager
def temporary_base(
    source: Source, adapter: AdapterFolder | None, *, trust_remote_code: bool, stripped: Sequence[str] = ()
) -> Iterator[Path]:
    """The folder that stock software loads as the unsteered model, for verifying later: tensors renamed and adapter
    merged again."""
    if adapter is None and not stripped:
        yield source.folder
        return
    with tempfile.TemporaryDirectory(prefix="patch-model-base-") as name:
        with disk_errors(Path(name), "the merged base (a temporary folder, see TMPDIR)"):
            checkpoint, _notes = _rewritten(
                CheckpointFolder(source.folder), Path(name), stripped, adapter, trust_remote_code, lambda _text: None
            )
        yield checkpoint.path
