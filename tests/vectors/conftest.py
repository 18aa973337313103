from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny model that says many things."""
    from support.persona import load
    from support.tiny_models import tiny_checkpoint

    folder = tmp_path_factory.mktemp("llama") / "base"
    tiny_checkpoint(folder, "meta-llama--Llama-3.2-1B")
    return load(folder)
