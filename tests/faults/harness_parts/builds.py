"""Real builds as forks of one process that has imported everything: half a second each instead of ten.

A build is the command line's own ``main`` in a forked child. Its verifying processes are forks as well, that run the
programs which a build starts; ``warm=False`` starts everything anew, as a user does.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers.models.llama.modeling_llama  # noqa: F401 - once here, so that no fork imports it
from support.stock_processes import become, leave

from patcher import cli
from patcher.cli.progress import Voice
from patcher.verify import transformers_stack, warm

ROOT = Path(__file__).parents[3]
TIMEOUT = 300.0
Action = Callable[[], None]


@dataclass(frozen=True)
class Done:
    """A build that has ended: its exit status (negative: the signal), what it said, seconds."""

    code: int
    out: str
    said: str
    seconds: float


@dataclass
class Build:
    """A build that runs; ``lines`` are what it said and when, in seconds since its start."""

    pid: int
    folder: Path
    started: float = field(default_factory=time.monotonic)
    code: int | None = None
    ended: float = 0.0

    def poll(self) -> int | None:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code, self.ended = os.waitstatus_to_exitcode(status), time.monotonic()
        return self.code

    def wait(self, timeout: float = TIMEOUT) -> Done:
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                os.killpg(self.pid, signal.SIGKILL)
                raise AssertionError(f"the build still runs after {timeout:.0f} s; it said:\n{self.said()}")
            time.sleep(0.002)
        assert self.code is not None
        return Done(self.code, (self.folder / "stdout").read_text(), self.said(), self.ended - self.started)

    def said(self) -> str:
        return (self.folder / "stderr").read_text(errors="replace")

    def lines(self) -> list[tuple[float, str]]:
        text = (self.folder / "lines").read_text()
        # The last one may be half written.
        pairs = [line.partition(" ") for line in text.splitlines(keepends=True) if line.endswith("\n")]
        return [(float(when) - self.started, words.rstrip("\n")) for when, _, words in pairs]

    def until(self, words: str) -> bool:
        """Wait until it says a line that begins so; False if it ended before."""
        while True:
            ended = self.poll() is not None
            if any(line.startswith(words) for _when, line in self.lines()):
                return not ended
            if ended:
                return False
            time.sleep(0.002)

    def running(self) -> list[int]:
        """Which processes of its group still run (a dead one that nobody has waited for does not)."""
        found = []
        for status in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                state, _parent, group = status.read_text().rpartition(")")[2].split()[:3]
                if int(group) == self.pid and state != "Z":
                    found.append(int(status.parent.name))
        return found

    def end_group(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)


@dataclass(frozen=True)
class Shop:
    """A folder of builds: ``place`` holds nothing but the output, ``temporary`` what TMPDIR gets, ``cache`` is warm."""

    folder: Path

    @property
    def place(self) -> Path:
        return self.folder / "place"

    @property
    def output(self) -> Path:
        return self.place / "out"

    @property
    def temporary(self) -> Path:
        return self.folder / "tmp"

    @property
    def cache(self) -> Path:
        return self.folder / "cache"

    def start(
        self,
        arguments: Sequence[str | Path],
        *,
        before: Action | None = None,
        at: Mapping[str, Action] | None = None,
        cache: Path | None = None,
        warm: bool = True,
    ) -> Build:
        """Start ``patch-model ARGUMENTS``.

        Args:
            before: done in the child before it begins.
            at: what is done in the child when it first says a line that begins with the key.
            cache: instead of the warm one.
            warm: whether the build is a fork, or an interpreter of its own (``before`` and ``at`` are not for it).
        """
        log = Path(tempfile.mkdtemp(dir=self.folder, prefix="log-"))
        log.chmod(0o777)
        for name in ("stdout", "stderr", "lines"):
            # Here, because a kill may come before the build has made anything.
            (log / name).touch()
            (log / name).chmod(0o666)
        variables = {"PATCH_MODEL_CACHE": str(cache or self.cache), "TMPDIR": str(self.temporary)}
        words = [str(argument) for argument in arguments]
        if not warm:
            return self._cold(words, log, variables)
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid:
            return Build(pid, log)
        code = 70
        try:
            code = _child(words, log, self.folder, variables, before, dict(at or {}))
        except BaseException:
            with contextlib.suppress(OSError):
                traceback.print_exc()
        finally:
            leave(code)

    def _cold(self, words: list[str], log: Path, variables: Mapping[str, str]) -> Build:
        with (log / "stdout").open("w") as out, (log / "stderr").open("w") as err:
            process = subprocess.Popen(
                [sys.executable, "-m", "patcher", *words],
                cwd=self.folder,
                env={**os.environ, **variables, "PYTHONPATH": str(ROOT)},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )
        return Build(process.pid, log)

    def run(self, arguments: Sequence[str | Path], **options: Any) -> Done:
        return self.start(arguments, **options).wait()


def _child(
    words: list[str],
    log: Path,
    folder: Path,
    variables: Mapping[str, str],
    before: Action | None,
    at: dict[str, Action],
) -> int:
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(variables)
    tempfile.tempdir = None
    os.chdir(folder)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(log / name, os.O_WRONLY | os.O_APPEND), number)
    lines = os.open(log / "lines", os.O_WRONLY | os.O_APPEND)
    honest = Voice.__call__

    def says(voice: Voice, text: str) -> None:
        honest(voice, text)
        # Where the disk is full or files may not grow, there is no record of it either.
        with contextlib.suppress(OSError):
            os.write(lines, f"{time.monotonic()} {text}\n".encode())
        for beginning in [key for key in at if text.startswith(key)]:
            at.pop(beginning)()

    Voice.__call__ = says  # type: ignore[method-assign]
    transformers_stack.run_watched = run_forked  # type: ignore[assignment]
    warm.start = lambda: None  # type: ignore[assignment,return-value]
    if before is not None:
        before()
    try:
        cli.main(words)
    except SystemExit as done:
        return int(done.code or 0)
    return 0


def run_forked(
    command: Sequence[str], environment: Mapping[str, str], cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """What :func:`patcher.verify.watched.run_watched` does, without a new interpreter."""
    reader, writer = os.pipe()
    outputs = [os.memfd_create("stdout"), os.memfd_create("stderr")]
    # Python ignores what is raised in the hooks of a fork; what is started anew has none.
    arrived: list[int] = []
    handlers = {
        number: signal.signal(number, lambda number, _frame: arrived.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    pid = os.fork()
    if pid == 0:
        become(command[3:], environment, cwd, [reader, *outputs])
    try:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number in arrived:
            os.kill(os.getpid(), number)
        _pid, status = os.waitpid(pid, 0)
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise
    finally:
        os.close(reader)
        os.close(writer)
        texts = []
        for descriptor in outputs:
            with os.fdopen(descriptor, "rb") as file:
                file.seek(0)
                texts.append(file.read().decode(errors="replace"))
    return subprocess.CompletedProcess(list(command), os.waitstatus_to_exitcode(status), *texts)


torch.set_num_threads(1)
