"""Run a program in this process, and end it when the process that started it is gone.

``python -I watched_run.py PROGRAM ARGUMENT ...``: stdin is a pipe whose other end is held by who started it, see
:mod:`patcher.verify.watched`. A build that is killed cannot stop what it has started; without this, a verification
would go on for as long as the model takes. Other Pythons run this too: nothing of this package is imported.
"""

import os
import runpy
import signal
import sys
import threading
import time

GRACE_SECONDS = 2.0


def watch() -> None:
    try:
        while os.read(0, 1):
            pass
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
    runpy.run_path(sys.argv[0], run_name="__main__")
