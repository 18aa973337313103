"""Patched folders to export: built from a vector file, without the verification, which is tested elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.building import build_recipe
from support.tiny_models import write_recipe

PASSED = {
    "stack": "transformers", "version": "0", "status": "passed", "passed": True, "reference": "", "dtype": "float32",
    "max_abs_logprob_diff": 0.0, "noise_floor": 0.0, "steering_effect": 1.0, "vector_rel_error": 0.0,
    "tolerance": 1e-4, "checks": [],
}  # fmt: skip


def vectors_for(layers: list[int], hidden: int) -> dict[int, torch.Tensor]:
    """A random vector a layer."""
    generator = torch.Generator().manual_seed(3)
    return {layer: torch.randn(hidden, generator=generator) for layer in layers}


def unverified(monkeypatch: pytest.MonkeyPatch) -> None:
    """Builds take the verification as passed."""
    monkeypatch.setattr("patcher.build.local.verify_build", lambda *_, **__: [dict(PASSED)])


def patched(
    base: Path, vectors: dict[int, torch.Tensor], output: Path, monkeypatch: pytest.MonkeyPatch, **keys: Any
) -> Path:
    """The folder that a recipe with these vectors (layer of the base -> [hidden]) builds."""
    file = output.with_suffix(".vectors.safetensors")
    save_file({f"layer.{layer}": vector for layer, vector in vectors.items()}, file)
    place = {"before_layer": 0, "layer": None} if min(vectors) < 0 else {"layer": sorted(vectors)}
    vector = {"pairs": None, "method": "file", "file": str(file), "scale": "raw", "coefficient": 1.0, **place}
    path = write_recipe(
        output.with_suffix(".yaml"), base, 0, output, vector=vector, evaluate={"enabled": False}, **keys
    )
    unverified(monkeypatch)
    build_recipe(path, output)
    return output
