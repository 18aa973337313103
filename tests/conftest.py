"""No test reads or writes what is kept between a user's runs."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

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
