"""Disks that are full, files that may not grow, and what may not be read or written."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from harness_parts.cases import (
    NEW,
    NEW_LINK,
    REPLACED,
    REPLACED_LINK,
    Case,
    as_nobody,
    finish,
    remount,
    run,
    small_disk,
)
from harness_parts.checks import Bench, Mode, require

DISK = 3
MIB = 1 << 20


def file_size_limit(bench: Bench, limit: int, mode: Mode) -> str:
    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    bench.reset(mode)
    return finish(bench, mode, run(bench, mode, before=limited), DISK)


def full_disk(bench: Bench, share: float, mode: Mode) -> str:
    """The disk has room for that share of what the build needs at most."""
    bench.reset(mode)
    size = sum(item.stat().st_size for item in bench.whole_output(mode.as_bin, "new").rglob("*"))
    with small_disk(bench, int(size * (share + mode.force)) + MIB // 4):
        if mode.force:
            shutil.copytree(bench.whole_output(mode.as_bin, "old"), bench.shop.output)
        return finish(bench, mode, run(bench, mode), DISK)


def no_room_but_for_the_copy(bench: Bench, mode: Mode) -> str:
    """Ever more room beyond the weights: the verification's files, the manifest and the card are what does not fit."""
    size = sum(item.stat().st_size for item in bench.whole_output(mode.as_bin, "new").rglob("*"))
    ends: list[str] = []
    for more in range(0, 4 * MIB, 256 << 10):
        bench.reset(mode)
        with small_disk(bench, size + more):
            ends.append(finish(bench, mode, run(bench, mode), [DISK, 0]))
        if ends[-1] == "exit 0":
            break
    require(ends[-1] == "exit 0" and len(ends) > 2, f"not what this case is for: {ends}")
    return f"{len(ends) - 1} sizes refused, then exit 0"


def full_cache(bench: Bench) -> str:
    """A cache that cannot be written is no cause to fail."""
    bench.reset(NEW)
    cache = bench.shop.folder / "full-cache"
    cache.mkdir(exist_ok=True)
    with small_disk(bench, 4096, place=cache):
        (cache / "ballast").write_bytes(b"x" * 4096)
        return finish(bench, NEW, run(bench, NEW, cache=cache), 0)


def full_temporary(bench: Bench) -> str:
    """All that a build writes beside the output lies on the output's disk."""
    bench.reset(NEW)
    with small_disk(bench, 4096, place=bench.shop.temporary) as where:
        (where / "ballast").write_bytes(b"x" * 4096)
        done = run(bench, NEW)
        (where / "ballast").unlink()
        return finish(bench, NEW, done, [0, DISK])


def read_only_disk(bench: Bench, mode: Mode) -> str:
    bench.reset(mode)
    with small_disk(bench) as where:
        if mode.force:
            shutil.copytree(bench.whole_output(mode.as_bin, "old"), bench.shop.output)
        remount(where, "ro")
        return finish(bench, mode, run(bench, mode), DISK)


def read_only_during(bench: Bench, words: str) -> str:
    """The disk turns read-only while the build runs, as ext4 does after an error."""
    bench.reset(NEW)
    with small_disk(bench) as where:
        done = run(bench, NEW, at={words: partial(remount, where, "ro")})
        remount(where, "rw")
        # What could not be removed then is the next build's to remove.
        bench.require_cleaned_by_the_next()
        return finish(bench, NEW, done, DISK)


def forbidden(bench: Bench, what: Callable[[Bench], Path], to: int, code: int | list[int], mode: Mode) -> str:
    """A file or a folder has permissions ``to``, and the build is not root's."""
    bench.reset(mode)
    with as_nobody(bench) as become:
        path = what(bench)
        before = path.stat().st_mode & 0o777
        path.chmod(to)
        try:
            done = run(bench, mode, before=become)
        finally:
            if path.exists():
                path.chmod(before)
    if bench.shop.output.exists():
        bench.shop.output.chmod(0o755)
    return finish(bench, mode, done, code)


def read_only_files(bench: Bench, what: Callable[[Bench], Path], mode: Mode) -> str:
    """A whole folder, and all files in it, may be read and no more."""
    bench.reset(mode)
    with as_nobody(bench) as become:
        folder = what(bench)
        items = [folder, *folder.rglob("*")]
        modes = [item.stat().st_mode & 0o777 for item in items]
        for item in items:
            item.chmod(0o555 if item.is_dir() else 0o444)
        try:
            done = run(bench, mode, before=become)
        finally:
            for item, old in zip(items, modes, strict=True):
                if item.exists():
                    item.chmod(old)
    return finish(bench, mode, done, 0)


def another_users_base(bench: Bench) -> str:
    """Linux lets nobody link to files that he may not write (protected_hardlinks): they are copied instead."""
    bench.reset(NEW_LINK)
    with as_nobody(bench) as become:
        if not os.geteuid():
            for item in (bench.bases[False], *bench.bases[False].rglob("*")):
                os.chown(item, 0, 0)
                item.chmod(0o755 if item.is_dir() else 0o644)
        return finish(bench, NEW_LINK, run(bench, NEW_LINK, before=become), 0)


def _base(bench: Bench) -> Path:
    return bench.bases[False]


def _shard(bench: Bench) -> Path:
    return sorted(bench.bases[False].glob("model-*.safetensors"))[1]


def _config(bench: Bench) -> Path:
    return bench.bases[False] / "config.json"


def _parent(bench: Bench) -> Path:
    return bench.shop.place


def _output(bench: Bench) -> Path:
    return bench.shop.output


CASES = [
    *(
        Case(
            f"file size limit of {limit // 1024} KiB, {mode.name}",
            partial(file_size_limit, limit=limit, mode=mode),
            quick=mode is REPLACED_LINK,
        )
        for limit, mode in ((1024, NEW), (64 << 10, REPLACED_LINK), (4 * MIB, REPLACED))
    ),
    *(
        Case(
            f"disk with room for {share:.0%}, {mode.name}",
            partial(full_disk, share=share, mode=mode),
            quick=share == 0.5 and mode is NEW,
        )
        for share, mode in ((0.01, NEW), (0.5, NEW), (0.5, REPLACED), (0.95, NEW))
    ),
    Case("disk with room for little more than the weights", partial(no_room_but_for_the_copy, mode=NEW)),
    Case("the cache's disk is full", full_cache, quick=True),
    Case("the temporary folder's disk is full", full_temporary),
    Case("read-only disk, new copy", partial(read_only_disk, mode=NEW), quick=True),
    Case("read-only disk, replaced copy", partial(read_only_disk, mode=REPLACED)),
    Case("disk turns read-only while it is written", partial(read_only_during, words="writing the copy")),
    Case(
        "disk turns read-only during the verification",
        partial(read_only_during, words="verifying: the base"),
        quick=True,
    ),
    Case("read-only output parent", partial(forbidden, what=_parent, to=0o555, code=DISK, mode=NEW), quick=True),
    Case("read-only output parent, --force", partial(forbidden, what=_parent, to=0o555, code=DISK, mode=REPLACED)),
    Case(
        "read-only output folder, --force",
        partial(forbidden, what=_output, to=0o555, code=0, mode=REPLACED),
        quick=True,
    ),
    Case("unreadable output folder, --force", partial(forbidden, what=_output, to=0o000, code=DISK, mode=REPLACED)),
    Case("read-only output and its files, --force", partial(read_only_files, what=_output, mode=REPLACED)),
    Case("read-only base", partial(read_only_files, what=_base, mode=NEW)),
    Case("read-only base, --link", partial(read_only_files, what=_base, mode=NEW_LINK)),
    Case("another user's base, --link", another_users_base),
    Case(
        "unreadable shard of the base", partial(forbidden, what=_shard, to=0o000, code=[2, DISK], mode=NEW), quick=True
    ),
    Case("unreadable config of the base", partial(forbidden, what=_config, to=0o000, code=[2, DISK], mode=NEW)),
    Case("unreadable base folder", partial(forbidden, what=_base, to=0o000, code=[2, DISK], mode=REPLACED)),
]
