"""The base that a manifest names, found again: where it was, on the Hub, or where the user says that it is now."""

from __future__ import annotations

from pathlib import Path

from patcher.checkpoint.adapter_folder import EVERY_USE, WEIGHTS, AdapterFolder, find_adapter
from patcher.checkpoint.copying import sha256_of
from patcher.checkpoint.hashes import require_same
from patcher.checkpoint.prepare import find_model
from patcher.checkpoint.source import Source, fetch
from patcher.errors import InputError
from patcher.patched.schema import Patch
from patcher.progress.stage import Say, silent


def recorded_base(patch: Patch, given: str | None = None, say: Say = silent) -> Source:
    """The base, its weights included.

    Args:
        given: a folder or a Hub id, if it is not where the manifest says.

    Raises:
        InputError, OutsideError: it is not there; see also :mod:`patcher.checkpoint.source`.
    """
    record = patch.base
    if given is not None:
        return find_model(given, Path.cwd(), weights=True, where="--base", say=say)
    if record.hub:
        return fetch(record.model, record.revision, weights=True, say=say)
    path = record.path
    if not path or not Path(path).is_dir():
        raise InputError(
            f"the base `{record.model}` is not where it was",
            where="steering.json: base",
            found=path or "no path",
            remedy="say where it is: --base PATH",
        )
    return Source(record.model, False, None, Path(path))


def recorded_adapter(patch: Patch, given: str | None = None) -> AdapterFolder | None:
    """The adapter that was merged, if there was one, used as it was then.

    Raises:
        InputError: it is not there, or has another content.
    """
    record = patch.base.adapter
    if record is None:
        return None
    named = f"{record.given.partition('@')[0]}@{record.revision}" if record.revision else record.given
    try:
        found = find_adapter(given or named, Path.cwd())
    except InputError:
        raise InputError(
            f"the adapter `{record.name}` that was merged is not where it was",
            where="steering.json: base.adapter",
            found=given or record.given,
            remedy="say where it is: --adapter PATH",
        ) from None
    hashes = {WEIGHTS: record.sha256, **{file.name: file.sha256 for file in record.files}}
    for name, sha256 in hashes.items():
        path = found.folder / name
        if not path.is_file() or sha256_of(path) != sha256:
            raise InputError(
                "this is not the adapter that was merged: its content differs", where=str(path), remedy="--adapter PATH"
            )
    return found.using(frozenset(use for use in EVERY_USE if use in record.uses))


def require_recorded(folder: Path, patch: Patch, say: Say = silent) -> None:
    """Refuse a base that is not the one that the manifest was written for.

    Raises:
        InputError: with the first file that differs.
    """
    require_same(folder, [file.as_json() for file in patch.base.files or []], say)
