"""A bias that the class multiplies entry by entry: the vector is divided by what it is multiplied by."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_models import default_checkpoint
from support.tiny_patch import patch_tiny, planned

from patcher.errors import InputError
from patcher.routes.relabel.config import config_class


@pytest.fixture
def zaya(tmp_path: Path) -> tuple[Path, int]:
    if config_class("zaya") is None:
        pytest.skip("this transformers has no zaya")
    base = tmp_path / "base"
    layer = default_checkpoint(base, "zaya", 2, tokenizer=False, trained_scale=True)
    stored = load_file(base / "model.safetensors")
    generator = torch.Generator().manual_seed(3)
    for name, tensor in stored.items():
        if name.endswith("_scale"):
            tensor.add_(0.2 * torch.randn(tensor.shape, generator=generator))
    save_file(stored, base / "model.safetensors", {"format": "pt"})
    return base, layer


def test_the_copy_is_the_hooked_base(tmp_path: Path, zaya: tuple[Path, int]) -> None:
    base, layer = zaya
    patched = patch_tiny(base, tmp_path / "copy", [layer], exact=True)
    assert (patched.plan.route, patched.plan.cost) == ("native", "none")
    assert patched.difference <= max(2e-5, 5 * patched.noise)
    assert patched.effect > 0.1
    (write,) = patched.plan.carriers
    assert write.spread is not None
    assert float(write.spread.std()) > 0.05


def test_entries_that_let_nothing_through_are_refused(zaya: tuple[Path, int]) -> None:
    base, layer = zaya
    stored = load_file(base / "model.safetensors")
    for name, tensor in stored.items():
        if name.endswith("_scale"):
            tensor[0] = 0.0
    save_file(stored, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="entries of zero"):
        planned(base, [layer], route="native")
