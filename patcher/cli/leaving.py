"""The end of a command's process, without the second that Python takes to take torch apart.

What is registered to run at the end has run by then, and what was said is written; memory is the system's to free.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def leaving_at_once() -> Iterator[None]:
    """End the process with the status of the ``SystemExit`` that leaves this block; to be entered first of all.

    Whatever else leaves it ends the process as Python ends it.
    """
    status: list[int] = []
    # Handlers run from the last registered to the first: this one after those of everything that is imported later.
    atexit.register(_leave, status)
    try:
        yield
    except SystemExit as done:
        if done.code is None or isinstance(done.code, int):
            status.append(done.code or 0)
        raise


def _leave(status: list[int]) -> None:
    # A debugger or a measurement of coverage was there before, and has its own things to do at the end.
    if not status or sys.gettrace() is not None or "coverage" in sys.modules:
        return
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except (OSError, ValueError, AttributeError):
        # Python tries again, and says what is wrong.
        return
    os._exit(status[0])
