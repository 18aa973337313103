"""A base that goes away or changes while it is read, builds that meet, and builds that are interrupted."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from harness_parts.cases import NEW, NEW_LINK, REPLACED, Case, cold_cache, finish, run
from harness_parts.checks import Bench, Mode, require, require_ended, require_told

OUTSIDE = 3
LINES = (
    "reading the model's config",
    "checking the contrast pairs",
    "loading the model",
    "writing the copy",
    "hashing the base",
    "verifying: the base",
)


@contextlib.contextmanager
def spare(bench: Bench, mode: Mode) -> object:
    """The base as it was, put back afterwards, whatever a case has made of it."""
    base = bench.bases[mode.as_bin]
    kept = bench.shop.folder / "kept"
    shutil.rmtree(kept, ignore_errors=True)
    shutil.copytree(base, kept)
    try:
        yield base
    finally:
        shutil.rmtree(base, ignore_errors=True)
        shutil.rmtree(bench.shop.folder / "gone", ignore_errors=True)
        kept.rename(base)


def removed(bench: Bench, words: str, mode: Mode) -> str:
    """The base is gone when the build says ``words``; a copy that was verified needs it no more."""
    bench.reset(mode)
    with spare(bench, mode) as base:
        done = run(bench, mode, at={words: lambda: base.rename(bench.shop.folder / "gone")})
    return finish(bench, mode, done, [2, OUTSIDE, 0] if words.startswith(LINES[-1]) else [2, OUTSIDE])


def changed(bench: Bench, words: str, how: Callable[[Path], None], mode: Mode) -> str:
    """A weight file of the base changes when the build says ``words``.

    In a copy, nothing may be of two minds: it is whole and of the base as its manifest records it, or it is not there.
    """
    bench.reset(mode)
    with spare(bench, mode) as base:
        done = run(
            bench, mode, at={words: lambda: how(sorted(base.glob("model-*.safetensors"))[1])}, cache=cold_cache(bench)
        )
    return finish(bench, mode, done, OUTSIDE)


def overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(b"\x00\x3c" * 512)


def replace(path: Path) -> None:
    other = path.with_name("other")
    shutil.copyfile(path, other)
    overwrite(other)
    other.rename(path)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def truncated_while_mapped(bench: Bench, mode: Mode) -> str:
    """The weights are read where they lie, so what is cut off ends the process (SIGBUS), like a kill."""
    bench.reset(mode)
    with spare(bench, mode) as base:
        done = run(
            bench,
            mode,
            at={"reading activations": lambda: truncate(sorted(base.glob("model-*.safetensors"))[1])},
            cache=cold_cache(bench),
        )
        require(done.code in (-signal.SIGBUS, OUTSIDE), f"exit {done.code}:\n{done.said}")
        bench.require_outputs(mode, ["old"] if mode.force else ["absent"])
    bench.require_cleaned_by_the_next()
    return f"exit {done.code}; the next build cleans up"


def two_at_once(bench: Bench, mode: Mode, apart: float) -> str:
    """Two builds of different versions into one output, the second ``apart`` seconds later."""
    bench.reset(mode)
    first = bench.shop.start(bench.arguments(mode, "new"))
    time.sleep(apart)
    second = bench.shop.start(bench.arguments(mode, "old"))
    ends = [first.wait(), second.wait()]
    codes = [done.code for done in ends]
    for done in ends:
        require_told(done, [0, 2])
    if mode.force:
        require(codes == [0, 0], f"with --force both may replace it: exits {codes}")
    else:
        require(sorted(codes) == [0, 2], f"one wins and one is refused: exits {codes}")
    version = bench.version(mode)
    require(version in ("old", "new"), f"the output is {version}")
    if not mode.force:
        require(version == ("new" if codes[0] == 0 else "old"), "the output is not that of the build that succeeded")
    bench.require_base(mode)
    bench.require_nothing_left()
    return f"exits {codes[0]} and {codes[1]}, the output is whole"


def interrupted(bench: Bench, number: int, words: str, mode: Mode) -> str:
    """Ctrl-C reaches all processes of the terminal, ``kill`` one."""
    bench.reset(mode)
    build = bench.shop.start(bench.arguments(mode))
    require(build.until(words), f"it ended before it said {words!r}:\n{build.said()}")
    time.sleep(0.05)
    (os.killpg if number == signal.SIGINT else os.kill)(build.pid, number)
    done = build.wait()
    require_ended(build)
    return finish(bench, mode, done, 130)


def interrupted_twice(bench: Bench, words: str, mode: Mode) -> str:
    """The impatient press Ctrl-C again while the first one is being obeyed."""
    bench.reset(mode)
    build = bench.shop.start(bench.arguments(mode))
    require(build.until(words), f"it ended before it said {words!r}:\n{build.said()}")
    for _time in range(2):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(build.pid, signal.SIGINT)
        time.sleep(0.002)
    done = build.wait()
    require_ended(build)
    require(done.code in (130, -signal.SIGINT), f"exit {done.code}:\n{done.said}")
    bench.require_outputs(mode, ["old"] if mode.force else ["absent"])
    bench.require_base(mode)
    # The second one may stop the tidying up; the next build does it.
    bench.require_cleaned_by_the_next()
    return f"exit {done.code}"


CASES = [
    *(
        Case(f"base removed: {words}", partial(removed, words=words, mode=NEW), quick=words == "writing the copy")
        for words in LINES
    ),
    Case("base removed, --link: writing the copy", partial(removed, words="writing the copy", mode=NEW_LINK)),
    *(
        Case(
            f"base {name}: {words}, {mode.name}",
            partial(changed, words=words, how=how, mode=mode),
            quick=words == "reading activations",
        )
        for name, how, words, mode in (
            ("overwritten", overwrite, "writing the copy", NEW),
            ("overwritten", overwrite, "writing the copy", REPLACED),
            ("overwritten", overwrite, "hashing the base", NEW),
            ("overwritten", overwrite, "reading activations", NEW),
            ("overwritten", overwrite, "verifying: the base", NEW),
            ("replaced", replace, "writing the copy", NEW),
            ("replaced", replace, "hashing the base", NEW_LINK),
            ("truncated", truncate, "writing the copy", NEW),
            ("truncated", truncate, "verifying: the base", NEW),
        )
    ),
    *(
        Case(
            f"two builds at once, {apart:g} s apart, {mode.name}",
            partial(two_at_once, mode=mode, apart=apart),
            quick=apart == 0 and mode is NEW,
        )
        for mode, apart in ((NEW, 0), (NEW, 0.3), (REPLACED, 0), (REPLACED, 0.3))
    ),
    *(
        Case(
            f"{name}: {words}",
            partial(interrupted, number=number, words=words, mode=mode),
            quick=words == {"SIGINT": "writing the copy", "SIGTERM": "verifying: the base"}[name],
        )
        for name, number, mode in (("SIGINT", signal.SIGINT, NEW), ("SIGTERM", signal.SIGTERM, REPLACED))
        for words in LINES
    ),
    *(Case(f"SIGINT twice: {words}", partial(interrupted_twice, words=words, mode=NEW)) for words in LINES[3::3]),
    Case("base truncated while it is mapped: reading activations", partial(truncated_while_mapped, mode=REPLACED)),
]
