"""No test reads or writes what is kept between a user's runs."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest


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
