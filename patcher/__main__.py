"""``python -m patcher`` and the console script ``patch-model``."""

from __future__ import annotations

import gc
from typing import NoReturn

from patcher import cli
from patcher.cli.leaving import leaving_at_once

_ALLOCATIONS = 50_000, 2, 2
"""Between two searches for garbage. Imports make some million objects and no garbage; Python looks every 700."""


def main() -> NoReturn:
    """Run the command line in this process, which is there for nothing else: see :func:`patcher.cli.main`."""
    gc.set_threshold(*_ALLOCATIONS)
    with leaving_at_once():
        cli.main()


if __name__ == "__main__":
    main()
