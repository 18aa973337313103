"""Where a model comes from: a local folder, or the Hub at a pinned revision."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from patcher.checkpoint.folder import (
    BIN_INDEX,
    BIN_SINGLE,
    INDEX,
    SIDE_FILES,
    SIDE_FOLDERS,
    SINGLE,
    CheckpointFolder,
    read_json_object,
)
from patcher.errors import InputError

_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?")
_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._/+-]*")
_SMALL = (
    "config.json",
    "*.json",
    *SIDE_FILES,
    *(f"{folder}/*.jinja" for folder in SIDE_FOLDERS),
    "README.md",
    "*.py",
)


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
        only_path = model.startswith((".", "/", "~")) or local.exists()
    except (OSError, ValueError, RuntimeError) as error:
        # No such home folder, too long, a null byte.
        raise InputError("this is not a usable path", where=f"{where}: {model[:200]!r}", found=error) from None
    if only_path:
        raise InputError("there is no such model folder", where=f"{where}: {model}", found=str(local))
    name, at, revision = model.partition("@")
    if not _HUB_ID.fullmatch(name):
        raise InputError(
            "this is neither a folder nor a Hub id",
            where=f"{where}: {model}",
            remedy="give a path relative to the recipe, or owner/name, or owner/name@revision",
        )
    if at and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise InputError(
            "this is not a revision of a Hub model",
            where=f"{where}: {model}",
            found=revision or "nothing after @",
            remedy="give a commit, a branch or a tag after @",
        )
    return name, revision or None


def fetch(name: str, revision: str | None, *, weights: bool) -> Source:
    """Download (or find in the cache) a Hub model: its small files, and its weights if asked.

    Safetensors are preferred; ``.bin`` is taken only where there are none.

    Raises:
        InputError, OutsideError: in plain words, see :mod:`patcher.hub_errors`.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    from patcher.hub_errors import hub_errors

    patterns = list(_SMALL)
    with hub_errors("downloading the model", name):
        if weights:
            try:
                names = {item.rfilename for item in HfApi().model_info(name, revision=revision).siblings or []}
            except (OSError, ValueError) as error:
                if isinstance(error, LocalEntryNotFoundError):
                    raise
                names = set()
            patterns += _weight_patterns(names)
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
        commit = folder.name if re.fullmatch(r"[0-9a-f]{40}", folder.name) else revision
        if weights and (odd := _missing_weights(folder)):
            folder = Path(snapshot_download(name, revision=commit, allow_patterns=[*patterns, *odd]))
    return Source(name, True, commit, folder)


def fetch_config(name: str, revision: str | None, *, code: bool = False) -> Path:
    """The folder that holds a Hub model's config.json; nothing else is downloaded.

    Args:
        name: Hub id.
        revision: branch, tag or commit.
        code: also download the model's Python files, if its config names code of its own.

    Raises:
        InputError, OutsideError: in plain words, see :mod:`patcher.hub_errors`.
    """
    from huggingface_hub import hf_hub_download, snapshot_download

    from patcher.hub_errors import hub_errors

    with hub_errors("downloading the config", name):
        folder = Path(hf_hub_download(name, "config.json", revision=revision)).parent
        if code and "auto_map" in read_json_object(folder / "config.json"):
            # The same commit, whatever the branch has become since.
            folder = Path(snapshot_download(name, revision=folder.name, allow_patterns=["config.json", "*.py"]))
    return folder


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
