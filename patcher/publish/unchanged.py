"""Which files need not be sent: the target has them already, or the base on the Hub does."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patcher.checkpoint.copying import sha256_of
from patcher.errors.hub import hub_errors
from patcher.patched.schema import Base
from patcher.publish.contents import OnHub, PublishedFile

if TYPE_CHECKING:
    from huggingface_hub import HfApi

# What the Hub takes in one question.
_NAMES_AT_ONCE = 500


@dataclass(frozen=True)
class BaseFile:
    """A large file of the base on the Hub; ``copyable`` if its storage lets other repositories have it."""

    name: str
    size: int
    sha256: str
    copyable: bool


@dataclass(frozen=True)
class HubBase:
    """The base model as the Hub shows it to a token.

    Attributes:
        repo: its present name, which may differ from the one it was built by.
        revision: the commit that the folder was made from.
        head: the commit of its default branch; None if it cannot be seen.
        private: None if this token cannot see it, so that it may be.
        gated: whether access must be asked for.
        files: its large files at ``revision``, by SHA-256; none if they may not be read.
    """

    repo: str
    revision: str | None
    head: str | None
    private: bool | None
    gated: bool
    files: Mapping[str, BaseFile]


@dataclass(frozen=True)
class Changes:
    """A folder's files by where their content is: in the target, in the base, or only here."""

    same: Sequence[PublishedFile]
    in_base: Sequence[tuple[PublishedFile, BaseFile]]
    new: Sequence[PublishedFile]

    @property
    def copyable(self) -> list[tuple[PublishedFile, BaseFile]]:
        return [(file, source) for file, source in self.in_base if source.copyable]

    def to_send(self, copying: bool) -> list[PublishedFile]:
        """What has to go up, if the base's files are copied on the server and if they are not."""
        left = [file for file, source in self.in_base if not (copying and source.copyable)]
        return sorted([*self.new, *left], key=lambda file: file.name)

    def stranded(self, copying: bool) -> list[PublishedFile]:
        """Those of them that are not here."""
        return [file for file in self.to_send(copying) if not file.here]


@dataclass
class Hashes:
    """SHA-256 of the files as they lie on the disk now, each read once in a push."""

    _known: dict[str, str] = field(default_factory=dict)

    def of(self, file: PublishedFile) -> str:
        if file.name not in self._known:
            content = file.content
            if isinstance(content, OnHub):
                return content.sha256
            self._known[file.name] = (
                sha256_of(content) if isinstance(content, Path) else hashlib.sha256(content).hexdigest()
            )
        return self._known[file.name]

    def read(self, files: Iterable[PublishedFile]) -> None:
        with ThreadPoolExecutor(max_workers=4) as pool:
            list(pool.map(self.of, files))


def base_on_hub(api: HfApi, record: Base, say: Callable[[str], None]) -> HubBase | None:
    """What the Hub shows of the base that a patch names; None if that was a local folder.

    A base that is gone, private or gated is no error: its files are then sent from here.

    Raises:
        OutsideError: the Hub cannot be asked.
    """
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if not record.hub:
        return None
    name, revision = record.model, record.revision
    with hub_errors("looking at the base", name):
        try:
            info = api.model_info(name)
        except GatedRepoError:
            say(f"access to the base {name} must be asked for, and this token's owner has none; nothing is copied")
            return HubBase(name, revision, None, False, True, {})
        except RepositoryNotFoundError:
            return HubBase(name, revision, None, None, False, {})
        repo, gated = info.id or name, bool(info.gated)
        try:
            files = _large_files(api, repo, revision, [file.name for file in record.files or []])
        except (RepositoryNotFoundError, RevisionNotFoundError) as error:
            why = "access to it must be asked for" if isinstance(error, GatedRepoError) else f"it has no {revision}"
            say(f"the files of the base {repo} cannot be copied: {why}")
            files = {}
    return HubBase(repo, revision, info.sha, bool(info.private), gated, files)


def _large_files(api: HfApi, repo: str, revision: str | None, names: list[str]) -> dict[str, BaseFile]:
    found = {}
    for start in range(0, len(names), _NAMES_AT_ONCE):
        for file in api.get_paths_info(repo, names[start : start + _NAMES_AT_ONCE], revision=revision):
            lfs = getattr(file, "lfs", None)
            if lfs is not None:
                copyable = bool(getattr(file, "xet_hash", None))
                found[str(lfs.sha256)] = BaseFile(file.path, int(lfs.size), str(lfs.sha256), copyable)
    return found


def compare(
    files: Sequence[PublishedFile],
    there: Mapping[str, Any],
    base: HubBase | None,
    hashes: Hashes,
    say: Callable[[str], None],
) -> Changes:
    """Sort a folder's files by where their content is already.

    Contents are compared, not names: a base in one file goes on as the first of two. What ``steering.json`` says of the
    base's files is not relied on; the file that lies here is hashed, and the Hub says what it holds.

    Args:
        files: of the folder.
        there: what ``model_info(files_metadata=True)`` says of the target's files, by name.
        base: the base on the Hub.
        hashes: filled on the way.
        say: is called with one line if much has to be read.

    Raises:
        OSError: a file cannot be read.
    """
    bases = dict(base.files) if base else {}
    sizes = {source.size for source in bases.values()}
    to_hash = [file for file in files if file.size in sizes or _large_and_maybe_same(file, there.get(file.name))]
    if (size := sum(file.size for file in to_hash if file.here)) > 1e9:
        say(f"comparing {len(to_hash)} files ({size / 1e9:.1f} GB) with those on the Hub")
    hashes.read(to_hash)

    same, in_base, new = [], [], []
    for file in files:
        if _same(file, there.get(file.name), hashes):
            same.append(file)
        elif file.size in sizes and (source := bases.get(hashes.of(file))) is not None:
            in_base.append((file, source))
        else:
            new.append(file)
    return Changes(same, in_base, new)


def _large_and_maybe_same(file: PublishedFile, there: Any) -> bool:
    return there is not None and there.lfs is not None and there.size == file.size


def _same(file: PublishedFile, there: Any, hashes: Hashes) -> bool:
    """Whether the head of the branch has this very file under this very name."""
    if there is None or there.size != file.size:
        return False
    if there.lfs is not None:
        return hashes.of(file) == str(there.lfs.sha256)
    if not file.here:
        return False
    content = file.read()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == str(there.blob_id)
