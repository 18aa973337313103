"""Tiny checkpoints, saved once; a test that changes one copies it first."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.checkpoints import gpt2, llama, save

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``checkpoint("llama", "float32", sharded=False, **config)``: a saved tiny model, made once."""
    made: dict[str, Path] = {}

    def make(kind: str, dtype: str = "float32", *, sharded: bool = False, **config: object) -> Path:
        key = repr((kind, dtype, sharded, sorted(config.items())))
        if key not in made:
            model = {"llama": llama, "gpt2": gpt2}[kind](**config)
            folder = tmp_path_factory.mktemp("checkpoint") / kind
            made[key] = save(model, folder, DTYPES[dtype], sharded=sharded)
        return made[key]

    return make


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder that holds nothing but outputs."""
    (tmp_path / "place").mkdir()
    return tmp_path / "place"
