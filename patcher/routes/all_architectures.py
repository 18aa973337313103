"""Every language model of the installed transformers: what is found of each is kept, and what is not known yet is found
by two processes side by side. Nothing heavy is imported where all of it is known.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from queue import Queue
from typing import Any

from patcher.disk.findings import Findings
from patcher.progress.stage import Say, doing

_FEW = 8
"""Architectures that are looked at here: another process takes seconds to begin."""
_PROCESSES = 2
_MOST_SECONDS = 600.0
_MOST_MEMORY = 1 << 30
_COMMAND = [sys.executable, "-m", __spec__.name if __spec__ else __name__]


class _NotKnown(Exception):  # noqa: N818 - a finding, not a failure
    """Nothing is kept of it."""


def inspect_all(demands: Mapping[str, Any], say: Say) -> list[dict[str, Any]]:
    """Every architecture, by the config that its class has by default.

    Args:
        demands: the fields of :class:`patcher.routes.inspection.Demands`.

    Returns:
        What ``--json`` prints of each, in the order of their names.
    """
    names = Findings("all architectures").once("names", list[str], _names)
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        with contextlib.suppress(_NotKnown):
            found[name] = _findings(demands).once(name, dict[str, Any], _not_known)
    unknown = [name for name in names if name not in found]
    with doing(say, "looking at every architecture", len(names), "architectures") as looking:
        looking.advance(len(found))

        def take(name: str, body: dict[str, Any]) -> None:
            found[name] = body
            looking.advance()

        if len(unknown) < _FEW:
            for name in unknown:
                take(name, _looked_at(name, demands))
        else:
            _side_by_side(unknown, demands, take)
    return [found[name] for name in names]


def _findings(demands: Mapping[str, Any]) -> Findings:
    return Findings(["inspect --all", dict(demands)])


def _not_known() -> dict[str, Any]:
    raise _NotKnown


def _names() -> list[str]:
    from patcher.routes.inspection import all_names

    return all_names()


def _looked_at(name: str, demands: Mapping[str, Any]) -> dict[str, Any]:
    from patcher.routes.inspection import Demands, inspect_default

    return _findings(demands).once(name, dict[str, Any], lambda: inspect_default(name, Demands(**demands)).as_json())


def _side_by_side(
    names: Sequence[str], demands: Mapping[str, Any], take: Callable[[str, dict[str, Any]], None]
) -> None:
    done: Queue[tuple[str, dict[str, Any]]] = Queue()
    workers = [_Worker(demands) for _ in range(_PROCESSES)]
    waiting = deque(names)
    for worker in workers:
        threading.Thread(target=_serve, args=(worker, waiting, done), daemon=True).start()
    try:
        for _ in names:
            take(*done.get())
    finally:
        waiting.clear()
        for worker in workers:
            worker.end()


def _serve(worker: _Worker, waiting: deque[str], done: Queue[tuple[str, dict[str, Any]]]) -> None:
    with contextlib.suppress(IndexError):
        while True:
            name = waiting.popleft()
            done.put((name, worker.ask(name)))


class _Worker:
    """A process that looks at one architecture after another; a new one where a class took the last one down."""

    def __init__(self, demands: Mapping[str, Any]) -> None:
        self._demands = json.dumps(dict(demands))
        self._process: subprocess.Popen[str] | None = None

    def ask(self, name: str) -> dict[str, Any]:
        """What is found of it; one that ends the process, or takes too long, hides none of the others."""
        process = self._process = self._process or self._started()
        assert process.stdin is not None and process.stdout is not None
        late = threading.Timer(_MOST_SECONDS, process.kill)
        late.start()
        try:
            with contextlib.suppress(OSError):
                process.stdin.write(name + "\n")
                process.stdin.flush()
            line = process.stdout.readline()
        finally:
            in_time = late.is_alive()
            late.cancel()
        if line:
            found: dict[str, Any] = json.loads(line)
            return found
        self.end()
        ended = f"its process ended with exit status {process.returncode}"
        return _unseen(name, ended if in_time else f"it took longer than {_MOST_SECONDS:.0f} s")

    def end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            if process.poll() is None:
                process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError, AttributeError):
                    pipe.close()  # type: ignore[union-attr]

    def _started(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*_COMMAND, self._demands],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="ascii",
            env={"OMP_NUM_THREADS": "1", **os.environ},
        )


def _unseen(name: str, why: str) -> dict[str, Any]:
    from patcher.errors import Problem
    from patcher.routes.inspection import Inspection

    return Inspection(name, None, why_none=Problem("it could not be looked at", found=why)).as_json()


def _work() -> None:
    """A process of its own: the demands as an argument, a name a line on stdin, a line of JSON for each on stdout."""
    # What a library prints is nothing of ours.
    answers, sys.stdout = sys.stdout, sys.stderr
    demands = json.loads(sys.argv[1])
    for line in sys.stdin:
        print(json.dumps(_looked_at(line.strip(), demands)), file=answers, flush=True)
        if _memory() > _MOST_MEMORY:
            # What the allocator keeps of large stand-ins is given back.
            os.execv(sys.executable, [*_COMMAND, *sys.argv[1:]])


def _memory() -> int:
    """Bytes of memory that this process holds; 0 where the system does not say."""
    with contextlib.suppress(OSError, ValueError, LookupError):
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


if __name__ == "__main__":
    _work()
