"""Builds that are killed at moments drawn by chance."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness_parts.builds import Build
from harness_parts.checks import MODES, Bench, FaultFound, Mode, require, require_ended

WRITING, VERIFYING = "writing the copy", "verifying"
COMPLETE_EVERY, COLD_EVERY, AIMED_EVERY = 10, 40, 4
MANY = 20
Say = Callable[[str], None]


@dataclass
class Kills:
    """What came of them.

    Attributes:
        made: builds that were killed; those that had ended before their moment are drawn again, and are ``late``.
        whom: of the kills, how many ended the build's process alone, and how many its whole group.
        phases: what the build had last said when it was killed -> how often.
        outputs: what lay at the output then -> how often.
        completed: next builds that were run to their end.
        longest: seconds for which what a killed build had started went on, at most.
        failures: what did not hold.
    """

    made: int = 0
    survived: int = 0
    late: int = 0
    whom: Counter[str] = field(default_factory=Counter)
    modes: Counter[str] = field(default_factory=Counter)
    phases: Counter[str] = field(default_factory=Counter)
    outputs: Counter[str] = field(default_factory=Counter)
    leftovers: int = 0
    completed: int = 0
    longest: float = 0.0
    failures: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return {key: dict(value) if isinstance(value, Counter) else value for key, value in vars(self).items()}


@dataclass(frozen=True)
class Timetable:
    """When a build of a mode writes, verifies and is done, in seconds; measured by running one."""

    writing: float
    verifying: float
    whole: float


def timetable(bench: Bench, mode: Mode) -> Timetable:
    bench.reset(mode)
    build = bench.shop.start(bench.arguments(mode))
    done = build.wait()
    require(done.code == 0, f"a build that nothing disturbs fails:\n{done.said}")
    require(bench.version(mode) == "new", "a build that nothing disturbs made something else")
    bench.require_nothing_left()
    found = {words: when for when, words in reversed(build.lines())}
    first = {key: min(when for words, when in found.items() if words.startswith(key)) for key in (WRITING, VERIFYING)}
    return Timetable(first[WRITING], first[VERIFYING], done.seconds)


def kill_many(bench: Bench, count: int, seed: int, say: Say) -> Kills:
    """Kill ``count`` builds; every case is checked, the next build cleans up, and every tenth is run to its end."""
    chance, result = random.Random(seed), Kills()
    modes = MODES if count >= MANY else MODES[:3:2]
    tables = {mode.name: timetable(bench, mode) for mode in modes}
    while result.made < count and result.late < 10 * count + 100:
        mode = modes[result.made % len(modes)]
        try:
            _one(bench, mode, tables[mode.name], chance, result)
        except FaultFound as error:
            result.failures.append(f"kill {result.made} ({mode.name}): {error}")
        if result.made and result.made % 20 == 0:
            say(f"killed {result.made} of {count}")
    require(result.made == count, "the builds are too quick to be killed")
    return result


def _one(bench: Bench, mode: Mode, table: Timetable, chance: random.Random, result: Kills) -> None:
    bench.reset(mode)
    number = result.made
    cold = number % COLD_EVERY == COLD_EVERY - 1
    cache = bench.shop.folder / "fresh-cache" if chance.random() < 0.25 else None
    if cache is not None:
        shutil.rmtree(cache, ignore_errors=True)
    whole_group = chance.random() < 0.5
    build = bench.shop.start(bench.arguments(mode), cache=cache, warm=not cold)
    if not _sleep_until_the_moment(build, table, chance, number, cold):
        result.late += 1
        build.wait()
        require(bench.version(mode) == "new", "a build that was not disturbed made something else")
        return
    with contextlib.suppress(ProcessLookupError):
        (os.killpg if whole_group else os.kill)(build.pid, signal.SIGKILL)
    done = build.wait()
    if done.code != -signal.SIGKILL:
        result.late += 1
        require(done.code == 0, f"it ended by itself, with exit {done.code}:\n{done.said}")
        return
    result.made += 1
    result.whom["the whole group" if whole_group else "its process"] += 1
    result.modes[mode.name] += 1
    said = [line for _when, line in build.lines()] or done.said.splitlines()
    result.phases[said[-1].partition(":")[0].partition(" (")[0] if said else "starting"] += 1
    result.outputs[bench.require_outputs(mode, ("old", "new") if mode.force else ("absent", "new"))] += 1
    bench.require_base(mode)
    result.longest = max(result.longest, require_ended(build))
    # Again, for whatever those processes have done.
    bench.require_outputs(mode, ("old", "new") if mode.force else ("absent", "new"))
    result.leftovers += any(name != "out" for name in bench.names())
    if number % COMPLETE_EVERY == COMPLETE_EVERY - 1:
        again = Mode(mode.name, True, mode.link, mode.as_bin)
        finished = bench.shop.run(bench.arguments(again), cache=cache)
        require(finished.code == 0, f"the next build fails:\n{finished.said}")
        bench.require_outputs(mode, ["new"])
        bench.require_nothing_left()
        result.completed += 1
    else:
        bench.require_cleaned_by_the_next()
        bench.require_outputs(mode, ("old", "new") if mode.force else ("absent", "new"))
    bench.require_base(mode)
    _forget(build.folder)
    result.survived += 1


def _sleep_until_the_moment(build: Build, table: Timetable, chance: random.Random, number: int, cold: bool) -> bool:
    """Any moment of a build is as likely; of every fourth, any moment of those in which it writes.

    False if the build ended before.
    """
    if cold or number % AIMED_EVERY == AIMED_EVERY - 1:
        writes = chance.random() < 0.5
        begins, ends = (table.writing, table.verifying) if writes else (table.verifying, table.whole)
        # It ends by writing: the last half of the candidate's time and what follows.
        wait = chance.uniform(0, ends - begins) if writes else chance.uniform(0.5, 1.0) * (ends - begins)
        if cold:
            return _said(build, "writing" if writes else "verifying", chance.uniform(0, 1.0 if writes else 8.0))
        return build.until(WRITING if writes else VERIFYING) and _alive_after(build, wait)
    return _alive_after(build, build.started + chance.uniform(0, table.whole) - time.monotonic())


def _said(build: Build, words: str, wait: float) -> bool:
    while build.poll() is None:
        if any(line.startswith(words) for line in build.said().splitlines()):
            return _alive_after(build, wait)
        time.sleep(0.005)
    return False


def _alive_after(build: Build, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while build.poll() is None and time.monotonic() < end:
        time.sleep(min(0.001, max(0.0, end - time.monotonic())))
    return build.poll() is None


def _forget(log: Path) -> None:
    shutil.rmtree(log, ignore_errors=True)
