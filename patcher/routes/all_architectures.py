"""Every text causal LM of the installed transformers: what is found of each is kept, and what is not known yet is found
by two processes side by side. Nothing heavy is imported where all of it is known.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from queue import Queue
from typing import Any

from patcher.disk.findings import Findings
from patcher.errors import OutsideError
from patcher.progress.stage import Say, doing

_FEW = 8
"""Architectures that are looked at here: another process takes seconds to begin."""
_PROCESSES = 2


class _NotKnown(Exception):  # noqa: N818 - a finding, not a failure
    """Nothing is kept of it."""


def inspect_all(demands: Mapping[str, Any], say: Say) -> list[dict[str, Any]]:
    """Every architecture, by the config that its class has by default.

    Args:
        demands: the fields of :class:`patcher.routes.inspection.Demands`.

    Returns:
        What ``--json`` prints of each, in the order of their names.

    Raises:
        OutsideError: a process that looks at some of them ended before it was done.
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
    lines: Queue[tuple[int, str | None]] = Queue()
    workers = [_started(list(names[start::_PROCESSES]), demands) for start in range(_PROCESSES)]
    try:
        for number, worker in enumerate(workers):
            threading.Thread(target=_pass_on, args=(worker, number, lines), daemon=True).start()
        running = len(workers)
        while running:
            number, line = lines.get()
            if line is not None:
                take(*json.loads(line))
                continue
            running -= 1
            if workers[number].wait() != 0:
                raise OutsideError(
                    "a process that looks at architectures ended before it was done",
                    found=f"exit status {workers[number].returncode}",
                    remedy="run it again: what was found is kept",
                )
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.kill()
            worker.wait()


def _started(names: list[str], demands: Mapping[str, Any]) -> subprocess.Popen[str]:
    worker = subprocess.Popen(
        [sys.executable, "-m", __spec__.name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        encoding="ascii",
        env={"OMP_NUM_THREADS": "1", **os.environ},
    )
    assert worker.stdin is not None
    worker.stdin.write(json.dumps([names, dict(demands)]))
    worker.stdin.close()
    return worker


def _pass_on(worker: subprocess.Popen[str], number: int, lines: Queue[tuple[int, str | None]]) -> None:
    assert worker.stdout is not None
    for line in worker.stdout:
        lines.put((number, line))
    lines.put((number, None))


def _work() -> None:
    """A process of its own: names and demands on stdin, one line of JSON for each on stdout."""
    # What a library prints is nothing of ours.
    answers, sys.stdout = sys.stdout, sys.stderr
    names, demands = json.load(sys.stdin)
    for name in names:
        print(json.dumps([name, _looked_at(name, demands)]), file=answers, flush=True)


if __name__ == "__main__":
    _work()
