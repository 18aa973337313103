"""One damaged case after another through a reader, and what must hold of each.

A case is read as the stock reader reads it, or refused with an error for people that names one of its files. It raises
nothing else, opens nothing around its folder, writes nowhere but to the output, starts nothing, and comes to an end.
"""

from __future__ import annotations

import json
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any

from support.fuzz.formats import damaged_file
from support.fuzz.memory import MOST_OF_A_CASE, peak_bytes
from support.fuzz.watch import WATCH, Case, Sandbox

from patcher.errors import CheckFailed, PatchModelError

CPU_SECONDS = 20
LONGEST_MESSAGE = 6000
PACKAGE = str(Path(sys.modules["patcher"].__file__ or "").parent)
_CORPUS = 400
_GUIDED = 8
"""One case in this many is followed line by line, and kept as a seed if it reaches what none reached before."""


class TooSlow(BaseException):
    """A case took more processor time than any should."""


@dataclass(frozen=True)
class Reader:
    """What is fuzzed.

    Attributes:
        name: for the table.
        seeds: sound cases.
        read: (folder of the case, folder for output) -> what was read.
        same: raises AssertionError if that is not what the stock reader makes of the folder.
        cost: run a case of every so many only.
    """

    name: str
    seeds: Callable[[], list[Case]]
    read: Callable[[Path, Path], Any]
    same: Callable[[Path, Any], None] = lambda _folder, _result: None
    cost: int = 1


@dataclass(frozen=True)
class Failure:
    """A case that broke a rule."""

    reader: str
    kind: str
    text: str
    case: Case


@dataclass
class Tally:
    """What a run came to."""

    cases: int = 0
    refused: int = 0
    accepted: int = 0
    uncaught: int = 0
    wrong: int = 0
    seconds: float = 0.0
    slowest: float = 0.0
    failures: list[Failure] = field(default_factory=list)


class _Lines:
    """Which steps from line to line of the package have been seen."""

    def __init__(self) -> None:
        self.known: set[tuple[str, int, int]] = set()

    def new_in(self, call: Callable[[], None]) -> bool:
        before, found = sys.gettrace(), set()

        def follow(frame: FrameType, event: str, _argument: Any) -> Any:
            if not frame.f_code.co_filename.startswith(PACKAGE):
                return None
            last = [0]

            def line(inner: FrameType, _event: str, _argument: Any) -> Any:
                found.add((inner.f_code.co_filename, last[0], inner.f_lineno))
                last[0] = inner.f_lineno
                return line

            return line

        sys.settrace(follow)
        try:
            call()
        finally:
            sys.settrace(before)
        new = not found <= self.known
        self.known |= found
        return new


def damaged_case(random: Random, corpus: list[Case]) -> Case:
    """A case of the corpus with a file or two damaged, and now and then one missing, renamed or exchanged."""
    case = dict(random.choice(corpus))
    names = list(case)
    if len(names) > 1 and random.random() < 0.06:
        first, second = random.sample(names, 2)
        step = random.randrange(3)
        if step == 0:
            del case[first]
        elif step == 1:
            case[first] = case[second]
        else:
            case[first], case[second] = case[second], case[first]
    for _ in range(random.choice((1, 1, 1, 1, 2))):
        name = names[0] if random.random() < 0.7 else random.choice(names)
        if name in case:
            case[name] = damaged_file(random, name, case[name])
    return case


def checked(reader: Reader, sandbox: Sandbox, case: Case, tally: Tally) -> None:
    """Read one case and count what came of it."""
    sandbox.fill(case)
    started, peak = time.process_time(), peak_bytes()
    kind, text, result, verdict = "accepted", "", None, False
    with WATCH.over(sandbox.out, sandbox.scratch), _limited():
        try:
            result = reader.read(sandbox.case, sandbox.out)
        except PatchModelError as error:
            kind, text = "refused", str(error)
            json.dumps(error.as_json())
            verdict = isinstance(error, CheckFailed)
        except TooSlow:
            kind, text = "uncaught", f"more than {CPU_SECONDS} seconds of processor time"
        except Exception:
            kind, text = "uncaught", traceback.format_exc()
    spent = time.process_time() - started
    if kind == "refused":
        known = (*case, str(sandbox.root), sandbox.case.name)
        if not verdict and not any(name in text for name in known):
            kind, text = "wrong", f"the error names no file: {text}"
        elif len(text) > LONGEST_MESSAGE:
            kind, text = "wrong", f"an error of {len(text)} characters: {text[:500]}"
    if (taken := peak_bytes() - peak) > MOST_OF_A_CASE:
        kind, text = "wrong", f"{taken:,} bytes of memory for {sum(map(len, case.values())):,} of files"
    if WATCH.seen or (touched := sandbox.touched(case)):
        kind, text = "wrong", "; ".join(WATCH.seen) or str(touched)
    if kind == "accepted":
        try:
            reader.same(sandbox.case, result)
        except Exception:
            kind, text = "wrong", traceback.format_exc()
    tally.cases += 1
    tally.seconds += spent
    tally.slowest = max(tally.slowest, spent)
    setattr(tally, kind, getattr(tally, kind) + 1)
    if kind in ("uncaught", "wrong"):
        tally.failures.append(Failure(reader.name, kind, text, case))


def fuzz(reader: Reader, root: Path, cases: int, seed: int = 0, *, guided: bool = True) -> Tally:
    """Run ``cases`` damaged cases, seeded; every sound one first, which must be accepted."""
    sandbox, tally, lines = Sandbox(root), Tally(), _Lines()
    corpus = list(reader.seeds())
    former, tempfile.tempdir = tempfile.tempdir, str(sandbox.scratch)
    no_bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        for case in corpus:
            checked(reader, sandbox, case, tally)
        assert tally.accepted == len(corpus), (
            "\n".join(failure.text for failure in tally.failures) or "a seed is refused"
        )
        random = Random(f"{reader.name} {seed}")
        for number in range(cases):
            case = damaged_case(random, corpus)
            if guided and number % _GUIDED == 0:
                new = lines.new_in(lambda case=case: checked(reader, sandbox, case, tally))
                if new and len(corpus) < _CORPUS and sum(map(len, case.values())) < 1 << 18:
                    corpus.append(case)
            else:
                checked(reader, sandbox, case, tally)
    finally:
        tempfile.tempdir, sys.dont_write_bytecode = former, no_bytecode
    return tally


@contextmanager
def _limited() -> Iterator[None]:
    """Processor time, which a busy machine does not use up."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_signal: int, _frame: Any) -> None:
        raise TooSlow

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
