"""Run a program in this process, and end it when the process that started it is gone.

``python -I watched_run.py PROGRAM ARGUMENT ...``: stdin is a pipe whose other end is held by who started it, see
:mod:`patcher.verify.watched`. A build that is killed cannot stop what it has started; without this, a verification
would go on for as long as the model takes. Lines that come through the pipe are for the program, which finds them by
calling ``told``. Other Pythons run this too: nothing of this package is imported.
"""

import os
import queue
import runpy
import signal
import sys
import threading
import time

GRACE_SECONDS = 2.0


lines: "queue.Queue[str]" = queue.Queue()


def watch() -> None:
    rest = b""
    try:
        while found := os.read(0, 4096):
            *whole, rest = (rest + found).split(b"\n")
            for line in whole:
                lines.put(line.decode())
    except OSError:
        return  # There is nothing to watch.
    # As an exception it unwinds, so that a server which the program has started ends with it.
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_SECONDS)
    os._exit(1)


def leave(_signal: int, _frame: object) -> None:
    sys.exit(1)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, leave)
    threading.Thread(target=watch, name="watch", daemon=True).start()
    del sys.argv[0]
    runpy.run_path(sys.argv[0], init_globals={"told": lines.get}, run_name="__main__")
