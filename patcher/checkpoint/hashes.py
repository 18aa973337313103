"""SHA-256 of the base's files: taken from the Hub's cache, from an earlier run, or computed while the copy is written.

A base that changes meanwhile is noticed: what is hashed is what was copied, or the build fails.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patcher.checkpoint.folder import BIN_INDEX, INDEX, CheckpointFolder
from patcher.disk.cache_folder import cache_folder
from patcher.disk.whole_files import whole_file
from patcher.errors import InputError, OutsideError, PatchModelError
from patcher.progress.stage import BYTES, Say, doing, silent

_THREADS = 4
_PIECE = 1 << 22
_WORTH_KEEPING = 1 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}")
_TICK_NS = 50_000_000
_COARSE_TICK_NS = 2_000_000_000


def base_files(base: CheckpointFolder) -> list[Path]:
    """The base's files that the result depends on, relative: weights, index, config, side files."""
    names = [Path("config.json"), *(Path(name) for name in base.weight_files), Path(INDEX), Path(BIN_INDEX)]
    present = [name for name in names if (base.path / name).is_file()]
    return sorted({*present, *base.side_files()})


def files_now(base: CheckpointFolder) -> dict[Path, os.stat_result]:
    """The base's files as they are now, for :func:`hashing` to notice what has changed when they are copied."""
    found = {}
    for name in base_files(base):
        with suppress(OSError):
            found[name] = (base.path / name).stat()
    return found


@contextmanager
def hashing(
    base: CheckpointFolder, *, hash: bool = True, since: Mapping[Path, os.stat_result] | None = None
) -> Iterator[Hashing]:
    """Hash the base's files beside what is done in the block, which copies them.

    Hashing releases Python's lock, and reads what the copy has just read. The block ends it, however it ends.

    Args:
        since: what :func:`files_now` gave when the base was first read.

    Raises:
        OutsideError: the base has changed: since then, or (where the block fails) during it, which is why it failed.
    """
    for name, before in (since or {}).items():
        _require_unchanged(base.path / name, before, times=False)
    files = base_files(base)
    with running_hashes(base.path, files if hash else [], also=files) as running:
        try:
            yield running
        except PatchModelError:
            for file in running.files.values():
                _require_unchanged(file.path, file.before, times=False)
            raise


@contextmanager
def running_hashes(folder: Path, names: Sequence[Path], *, also: Iterable[Path] = ()) -> Iterator[Hashing]:
    """The same for files of any folder; the records also list those in ``also``, without a hash."""
    stop = _Stop()
    pool = ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1), thread_name_prefix="hash")
    try:
        files = {name: _File(folder / name, (folder / name).stat()) for name in {*names, *also}}
        for name in names:
            files[name].begin(pool, stop)
        yield Hashing(files, stop)
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)


def hashes_of(folder: Path, names: Sequence[Path], say: Say, text: str) -> dict[str, str]:
    """Name -> SHA-256 of files of a folder; ``text`` is what is said of it."""
    with running_hashes(folder, names) as running, doing(say, text, running.size, BYTES, lambda: running.done):
        return {record["name"]: record["sha256"] for record in running.records()}


def differing(
    folder: Path, records: Sequence[Mapping[str, Any]], say: Say = silent, text: str = "hashing files"
) -> list[str]:
    """Which of the recorded files ``folder`` lacks, or has with another content (size, where no hash was kept)."""
    wrong, there = [], []
    for record in records:
        path = folder / str(record["name"])
        if not path.is_file() or path.stat().st_size != record["size"]:
            wrong.append(str(record["name"]))
        elif record["sha256"] is not None:
            there.append(record)
    found = hashes_of(folder, [Path(str(record["name"])) for record in there], say, text)
    wrong += [str(record["name"]) for record in there if found[str(Path(str(record["name"])))] != record["sha256"]]
    return sorted(wrong)


@dataclass
class Hashing:
    """Hashes that are being computed."""

    files: Mapping[Path, _File]
    stop: _Stop

    @property
    def size(self) -> int:
        """Bytes that are hashed."""
        return sum(file.before.st_size for file in self.files.values() if file.result is not None)

    @property
    def done(self) -> int:
        """Of these, the bytes that were read, or are known by an older hash."""
        return sum(self.stop.read.copy().values())

    def records(self) -> list[dict[str, Any]]:
        """Wait for them: [{name, size, sha256}].

        Raises:
            OutsideError: a file was changed since the block began, or cannot be read.
        """
        return [
            {"name": str(name), "size": file.before.st_size, "sha256": file.finish()}
            for name, file in sorted(self.files.items())
        ]


@dataclass
class _File:
    """One file, as it was when its copying began."""

    path: Path
    before: os.stat_result
    result: Future[str] | None = None
    kept: bool = False

    def begin(self, pool: ThreadPoolExecutor, stop: _Stop) -> None:
        known = _of_hub_cache(self.path)
        kept = None if known else _kept(self.path, self.before)
        self.kept = kept is not None
        if known or kept:
            self.result = Future()
            self.result.set_result(known or kept or "")
            stop.read[self.path] = self.before.st_size
        else:
            self.result = pool.submit(_sha256, self.path, stop)

    def finish(self) -> str | None:
        if self.result is None:
            _require_unchanged(self.path, self.before)
            return None
        try:
            digest = self.result.result()
        except OSError as error:
            _require_unchanged(self.path, self.before)
            raise OutsideError(
                "a file of the base cannot be read", where=str(self.path), found=error.strerror, code="disk"
            ) from None
        after = _require_unchanged(self.path, self.before)
        if self.before.st_size >= _WORTH_KEEPING and not (self.kept and _key(after) == _key(self.before)):
            _keep(self.path, after, digest)
        return digest


def require_same(folder: Path, records: Sequence[Mapping[str, Any]], say: Say = silent) -> None:
    """Refuse a folder that lacks what was recorded, or has it with another content.

    Raises:
        InputError: with the first file that differs.
    """
    wrong = differing(folder, records, say, "checking that the base is the one the folder was made from")
    if wrong:
        path = folder / wrong[0]
        raise InputError(
            "this is not the base that the folder was made from",
            where=str(path),
            found="another content" if path.is_file() else "no such file",
            remedy="give the same revision of the base: --base PATH",
        )


def _require_unchanged(path: Path, before: os.stat_result, *, times: bool = True) -> os.stat_result:
    """Without ``times``, these and links may have changed: backups and other builds do that."""
    try:
        after = path.stat()
    except OSError:
        raise _changed(path) from None
    # A hard link that was made to it meanwhile moves the time of the last change of its inode.
    same = _key if times and after.st_nlink == before.st_nlink else _content_key
    if same(after) != same(before):
        raise _changed(path)
    return after


def _changed(path: Path) -> OutsideError:
    return OutsideError(
        "the base changed while it was read, so nothing of the copy is kept",
        where=str(path),
        found="another content" if path.is_file() else "it is gone",
        remedy="run it again when nothing else writes to that file",
        code="base_changed",
    )


class _Stop(threading.Event):
    """Ends the hashing of files; ``read`` has the bytes of each that were hashed."""

    def __init__(self) -> None:
        super().__init__()
        self.read: dict[Path, int] = {}


def _sha256(path: Path, stop: _Stop) -> str:
    digest, piece = hashlib.sha256(), memoryview(bytearray(_PIECE))
    with path.open("rb", buffering=0) as file:
        while not stop.is_set() and (count := file.readinto(piece)):
            digest.update(piece[:count])
            stop.read[path] = stop.read.get(path, 0) + count
    return digest.hexdigest()


def _of_hub_cache(path: Path) -> str | None:
    """What the Hub says of a file in the user's cache of it, where a large file's blob is named by its SHA-256.

    Small files are named by another hash. A folder from elsewhere that only looks like such a cache is not believed.
    """
    if not path.is_symlink():
        return None
    from huggingface_hub import constants

    blob = path.resolve()
    is_blob = blob.parent.name == "blobs" and _SHA256.fullmatch(blob.name) is not None
    return blob.name if is_blob and blob.is_relative_to(Path(constants.HF_HUB_CACHE).resolve()) else None


def _key(stat: os.stat_result) -> list[int]:
    return [*_content_key(stat), stat.st_ctime_ns]


def _content_key(stat: os.stat_result) -> list[int]:
    return [stat.st_ino, stat.st_size, stat.st_mtime_ns]


def _place(path: Path) -> Path:
    resolved = str(path.resolve())
    return cache_folder() / "sha256" / f"{hashlib.sha256(os.fsencode(resolved)).hexdigest()[:32]}.json"


def _kept(path: Path, stat: os.stat_result) -> str | None:
    # A cache that cannot be read is no cache.
    with suppress(OSError, ValueError, RuntimeError):
        entry = json.loads(_place(path).read_bytes())
        if isinstance(entry, dict) and entry.get("key") == _key(stat) and entry.get("path") == str(path.resolve()):
            digest = entry.get("sha256")
            return digest if isinstance(digest, str) and _SHA256.fullmatch(digest) else None
    return None


def _keep(path: Path, stat: os.stat_result, digest: str) -> None:
    """Remember a hash, unless the file is so new that a change could hide within one tick of its clock."""
    with suppress(OSError, RuntimeError):
        coarse = stat.st_mtime_ns % 1_000_000_000 == 0 and stat.st_ctime_ns % 1_000_000_000 == 0
        age = time.time_ns() - max(stat.st_mtime_ns, stat.st_ctime_ns)
        if not coarse and 0 <= age < _TICK_NS:
            # A link that has just been made: wait, or it would never be remembered.
            time.sleep((_TICK_NS - age) / 1e9)
            if _key(path.stat()) != _key(stat):
                return
        elif age < (_COARSE_TICK_NS if coarse else _TICK_NS):
            return
        place = _place(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        entry = {"path": str(path.resolve()), "key": _key(stat), "sha256": digest}
        with whole_file(place, durable=False) as partial:
            partial.write_text(json.dumps(entry), encoding="ascii")
