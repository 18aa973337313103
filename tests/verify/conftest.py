from __future__ import annotations

from pathlib import Path

import pytest
from support.building import build_recipe
from support.tiny_models import tiny_checkpoint, write_recipe

from patcher.build.result import BuildResult


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, BuildResult]:
    """A base and its finished, verified folder (bf16, so that the check of the own dtype is made)."""
    import torch

    place = tmp_path_factory.mktemp("built")
    layer = tiny_checkpoint(place / "base", "meta-llama--Llama-3.2-1B", dtype=torch.bfloat16)
    path = write_recipe(place / "recipe.yaml", place / "base", layer, place / "out")
    return place / "base", build_recipe(path, place / "out")
