"""Where a model comes from: a local folder, or the Hub at a pinned revision."""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from patcher.checkpoint.folder import BIN_INDEX, BIN_SINGLE, INDEX, SIDE_FILES, SIDE_FOLDERS, SINGLE, CheckpointFolder
from patcher.checkpoint.given import not_a_checkpoint, of_file, refuse_other_heads, require_checkpoint
from patcher.checkpoint.hub_bytes import bar_class
from patcher.checkpoint.hub_links import without_address
from patcher.checkpoint.listing import Listing
from patcher.disk.json_files import read_json_object
from patcher.errors import InputError, OutsideError
from patcher.errors.hub import hub_errors
from patcher.progress.stage import BYTES, Say, doing, silent

_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?")
_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._/+-]*")
_SMALL = ("config.json", "*.json", *SIDE_FILES, *(f"{folder}/*.jinja" for folder in SIDE_FOLDERS), "README.md", "*.py")
_OF_PATCHES = ("steering*.safetensors", "steering_generations*.jsonl")
"""Of a model that is a patched one itself: a further patch takes along what the earlier ones kept."""


@dataclass(frozen=True)
class Source:
    """A base model on this machine.

    Attributes:
        name: Hub id, or the folder's name.
        hub: whether it came from the Hub.
        revision: the commit, for a Hub model.
        folder: the local folder.
    """

    name: str
    hub: bool
    revision: str | None
    folder: Path


def locate_model(model: str, *, recipe_folder: Path, where: str = "model") -> Path | tuple[str, str | None]:
    """The same of a model: what is here must be the folder of a causal LM's checkpoint.

    Raises:
        InputError: see :func:`locate` and :func:`patcher.checkpoint.given.require_checkpoint`.
    """
    found = locate(model, recipe_folder=recipe_folder, where=where)
    if isinstance(found, Path):
        require_checkpoint(found, where)
    return found


def locate(model: str, *, recipe_folder: Path, where: str = "model") -> Path | tuple[str, str | None]:
    """What ``model`` names: a local folder, or (Hub id, revision).

    A path is a folder that exists relative to the recipe, or anything that only a path can be
    (``./x``, ``/x``, ``~/x``, ``../x``).

    Raises:
        InputError: a path without a folder, or a text that is neither.
    """
    try:
        path = Path(model).expanduser()
        local = path if path.is_absolute() else recipe_folder / path
        if model.strip() and local.is_dir():
            return local
        if local.is_file():
            raise of_file(local, f"{where}: {model}")
        only_path = model.startswith((".", "/", "~")) or local.exists()
    except (OSError, ValueError, RuntimeError) as error:
        # No such home folder, too long, a null byte.
        raise InputError("this is not a usable path", where=f"{where}: {model[:200]!r}", found=error) from None
    if only_path:
        raise InputError(
            "there is no such model folder",
            where=f"{where}: {model}",
            found=str(local),
            remedy="check the spelling; paths are relative to the recipe",
        )
    name, at, revision = model.partition("@")
    if not _HUB_ID.fullmatch(name):
        short = without_address(model)
        raise InputError(
            "this is neither a folder nor a Hub id",
            where=f"{where}: {model}",
            remedy="give a path relative to the recipe, or owner/name, or owner/name@revision"
            if short == model
            else f"give the model's name alone: {short}",
        )
    if at and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise InputError(
            "this is not a revision of a Hub model",
            where=f"{where}: {model}",
            found=revision or "nothing after @",
            remedy="give a commit, a branch or a tag after @",
        )
    return name, revision or None


def fetch(name: str, revision: str | None, *, weights: bool, say: Say = silent) -> Source:
    """Download (or find in the cache) a Hub model: its small files, and its weights if asked.

    Safetensors are preferred; ``.bin`` is taken only where there are none.

    Args:
        say: is told of a download of weights, and how far it is.

    Raises:
        InputError, OutsideError: in plain words, see :mod:`patcher.errors.hub`.
    """
    patterns, names = list(_SMALL), names_on_the_hub(name, revision) if weights else set[str]()
    if weights:
        patterns += [*_weight_patterns(names), *_OF_PATCHES]
    folder = download(name, revision, patterns, say=say if weights else silent)
    if names:
        _refuse_by_names(names, folder, f"model: {name}")
    commit = _commit(folder, revision)
    if weights and (odd := _missing_weights(folder)):
        folder = download(name, commit, [*patterns, *odd], say=say)
    return Source(name, True, commit, folder)


def require_model(source: Source, where: str) -> None:
    """Refuse in words a repository that is no causal LM's, by its small files and the names of the others.

    Raises:
        InputError: with what it is.
        OutsideError: the Hub cannot be asked for the names.
    """
    if (source.folder / "config.json").is_file():
        refuse_other_heads(read_json_object(source.folder / "config.json"), f"{source.name}: config.json")
        return
    names = names_on_the_hub(source.name, source.revision)
    _refuse_by_names(names, source.folder, f"{where}: {source.name}")


def _refuse_by_names(names: Collection[str], folder: Path, where: str) -> None:
    problem = not_a_checkpoint(Listing.of_paths(names, folder, where))
    if problem is not None:
        raise problem


def fetch_blocks(
    name: str,
    revision: str | None,
    needed: Callable[[Collection[str]], Collection[str]],
    *,
    say: Say = silent,
    text: str = "",
) -> Source:
    """Download (or find in the cache) a Hub model's small files, and of its weights only the shards that are needed.

    A checkpoint in one file, or of ``.bin`` files, is downloaded whole. Open what comes back with
    ``CheckpointFolder(folder, partial=True)``; :func:`fetch` for the same commit downloads the rest.

    Args:
        name: Hub id.
        revision: branch, tag or commit.
        needed: given the name of every stored tensor, those that are needed
            (:func:`patcher.checkpoint.block_names.tensors_for_blocks`).
        say: is told ``text``, and how far the download is.

    Raises:
        InputError, OutsideError: in plain words, see :mod:`patcher.errors.hub`; or the index is damaged.
    """
    names = names_on_the_hub(name, revision)
    folder = download(name, revision, _SMALL)
    source = Source(name, True, _commit(folder, revision), folder)
    sharded = (folder / INDEX).is_file() and not (SINGLE in names or (folder / SINGLE).is_file())
    if not sharded:
        return fetch(name, source.revision, weights=True, say=say)
    weight_map = CheckpointFolder(folder, partial=True).weight_map
    fetch_files(source, {weight_map[tensor] for tensor in needed(list(weight_map))}, say, text)
    return source


def fetch_files(source: Source, names: Collection[str], say: Say = silent, text: str = "") -> None:
    """Download (or find in the cache) these files of a model on the Hub; they lie in its folder afterwards.

    Raises:
        InputError, OutsideError: in plain words, see :mod:`patcher.errors.hub`.
    """
    if not names:
        return
    # A name is not a pattern, whatever characters it has.
    patterns = [glob.escape(name) for name in sorted(names)]
    folder = download(source.name, source.revision, patterns, say=say, text=text)
    missing = sorted(name for name in names if not (folder / name).is_file())
    if missing or folder != source.folder:
        raise OutsideError(
            "a part of the model is not in the local cache, and was not downloaded",
            where=source.name,
            found=", ".join(missing[:3]) or str(folder),
            remedy="check the network, and that the repository holds this file; unset HF_HUB_OFFLINE",
            code="hub_unreachable",
        )


def fetch_config(name: str, revision: str | None, *, code: bool = False) -> Path:
    """The folder that holds a Hub model's config.json; nothing else is downloaded.

    Args:
        name: Hub id.
        revision: branch, tag or commit.
        code: also download the model's Python files, if its config names code of its own.

    Raises:
        InputError, OutsideError: in plain words, see :mod:`patcher.errors.hub`.
    """
    from huggingface_hub import hf_hub_download

    with hub_errors("downloading the config", name):
        folder = Path(hf_hub_download(name, "config.json", revision=revision)).parent
    if code and "auto_map" in read_json_object(folder / "config.json"):
        # The same commit, whatever the branch has become since.
        return download(name, folder.name, ["config.json", "*.py"], what="the config")
    return folder


def download(
    name: str,
    revision: str | None,
    patterns: Collection[str],
    *,
    what: str = "the model",
    say: Say = silent,
    text: str = "",
) -> Path:
    """Download (or find in the cache) those files of a Hub repository that the patterns choose; their folder.

    Args:
        what: it is, for errors.
        say: is told ``text``, and how many bytes of how many have come.

    Raises:
        InputError, OutsideError: in plain words, see :mod:`patcher.errors.hub`.
    """
    from huggingface_hub import snapshot_download

    with hub_errors(f"downloading {what}", name), doing(say, text or f"downloading {name}", unit=BYTES) as running:
        bars = bar_class(running)
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns), tqdm_class=bars))


def names_on_the_hub(name: str, revision: str | None) -> set[str]:
    """The files of the repository; none where the Hub cannot be asked."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import LocalEntryNotFoundError

    with hub_errors("downloading the model", name):
        try:
            return {item.rfilename for item in HfApi().model_info(name, revision=revision).siblings or []}
        except LocalEntryNotFoundError:
            raise
        except (OSError, ValueError):
            return set()


def _commit(folder: Path, revision: str | None) -> str | None:
    return folder.name if re.fullmatch(r"[0-9a-f]{40}", folder.name) else revision


def _weight_patterns(names: set[str]) -> list[str]:
    """What to ask for, given the names in the repository (none: they are not known)."""
    if SINGLE in names:
        return [SINGLE]
    if not names or INDEX in names:
        return ["model*.safetensors"]
    return ["pytorch_model*.bin", BIN_INDEX]


def _missing_weights(folder: Path) -> list[str]:
    """Shards that the index names and the usual pattern has missed."""
    if not any((folder / name).is_file() for name in (SINGLE, INDEX, BIN_SINGLE, BIN_INDEX)):
        return []
    return [name for name in CheckpointFolder(folder).weight_files if not (folder / name).is_file()]
