"""No test reads or writes what is kept between a user's runs."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.stock_processes import StockProcesses

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # So a shell without job control starts what runs in the background, and every process that a test starts and
    # interrupts would inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache folder of the test run's own."""
    before = os.environ.get("PATCH_MODEL_CACHE")
    os.environ["PATCH_MODEL_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["PATCH_MODEL_CACHE"]
    else:
        os.environ["PATCH_MODEL_CACHE"] = before


@pytest.fixture(scope="session")
def stock_processes() -> Iterator[StockProcesses]:
    """Forks in the place of new interpreters, see there."""
    found = StockProcesses()
    yield found
    found.close()


@pytest.fixture(autouse=True)
def forked_stock_runs(request: pytest.FixtureRequest, stock_processes: StockProcesses) -> Iterator[None]:
    """Everywhere but where the processes themselves are tested."""
    # Where nothing has imported it, nothing is run by it; importing it here would cost every test run torch.
    stack = sys.modules.get("patcher.verify.transformers_stack")
    if stack is None or {"verify", "faults"} & set(request.path.relative_to(Path(__file__).parent).parts):
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stack, "run_watched", stock_processes)
        yield
