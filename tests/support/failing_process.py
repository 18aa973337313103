"""Run by torchrun: a build in which process 1 fails while it reads, in the way that the first argument says.

torchrun --nproc-per-node 2 tests/support/failing_process.py killed|refuses RECIPE [OPTIONS]
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any, NoReturn

from patcher.capture.processes import runner as distributed
from patcher.cli import main
from patcher.errors import OutsideError


def fails(*_arguments: Any) -> NoReturn:
    if sys.argv[1] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    raise OutsideError("this process has had enough", where="a test", remedy="none")


if __name__ == "__main__":
    if os.environ["RANK"] == "1":
        distributed._read = fails
    main(sys.argv[2:])
