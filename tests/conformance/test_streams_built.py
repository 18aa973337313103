"""From a recipe to a verified folder where blocks hand on several streams: the first, a middle and the last block."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.building import build_recipe
from support.families import families, family_base
from support.stock_loading import hooked_against_folder
from support.tiny_models import VOCABULARY, default_checkpoint, write_recipe
from transformers import AutoModelForCausalLM

DEEPSEEK = next(family for family in families() if family.model_type == "deepseek_v4")
LAST = 5


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny DeepSeek-V4 in the release's spelling, with streams that differ and are mixed unevenly."""
    folder = tmp_path_factory.mktemp("deepseek") / "base"
    family_base(DEEPSEEK, folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if name.endswith(("_hc.base", "hc_base")):
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
        for name, buffer in model.named_buffers():
            if name.endswith("tid2eid"):
                rows = [torch.randperm(8, generator=generator)[: buffer.shape[1]] for _ in range(len(buffer))]
                buffer.copy_(torch.stack(rows))
    config = (folder / "config.json").read_text(encoding="utf-8")
    model.save_pretrained(folder)
    (folder / "config.json").write_text(config, encoding="utf-8")
    return folder


def copy_of(base: Path, folder: Path, *, dtype: torch.dtype, sharded: bool) -> Path:
    if dtype == torch.float32 and not sharded:
        return base
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    model.save_pretrained(folder, max_shard_size="400KB" if sharded else "5GB")
    config = {**json.loads((base / "config.json").read_text(encoding="utf-8")), "torch_dtype": str(dtype)[6:]}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((base / name).read_bytes())
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layer", "dtype", "sharded"),
    [
        (0, torch.float32, False),
        (0, torch.bfloat16, True),
        (3, torch.float32, True),
        (3, torch.bfloat16, False),
        (LAST, torch.float32, False),
        (LAST, torch.bfloat16, True),
    ],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_a_released_deepseek_v4_with_small_sizes(
    released: Path, tmp_path: Path, layer: int, dtype: torch.dtype, sharded: bool
) -> None:
    base = copy_of(released, tmp_path / "base", dtype=dtype, sharded=sharded)
    assert len(list(base.glob("*.safetensors"))) > 1 or not sharded
    # In half precision the experts that share the vector round it, as a hook rounds the sum.
    built(base, layer, tmp_path, coefficient=0.5 if dtype == torch.float32 else 0.2)


@pytest.mark.slow
@pytest.mark.parametrize("layer", [0, 17, 33])
def test_hy_v4(tmp_path: Path, layer: int) -> None:
    place = default_checkpoint(tmp_path / "base", "hy_v4", layer, trained_scale=True)
    built(tmp_path / "base", place, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("layer", [0, 19, 39])
def test_qwen4_exp(tmp_path: Path, layer: int) -> None:
    place = default_checkpoint(tmp_path / "base", "qwen4_exp_text", layer, trained_scale=True)
    built(tmp_path / "base", place, tmp_path)


def built(base: Path, layer: int, scratch: Path, coefficient: float = 0.5) -> None:
    """Build, and hold what the build measured and what is measured here to what a hook does."""
    vector = {"coefficient": coefficient}
    recipe = write_recipe(scratch / "recipe.yaml", base, layer, scratch / "out", vector=vector)
    manifest = build_recipe(recipe, scratch / "out").manifest
    route, entry = manifest["route"], manifest["verification"][0]
    assert (route["name"], route["exact"], route["streams"]) == ("carrier", True, 4)
    assert entry["status"] == "passed" and entry["steering_effect"] > 0.05
    assert entry["max_abs_logprob_diff"] <= max(2e-5, 5e-5 * entry["steering_effect"])
    rounded = manifest["edits"][0]["stored_rel_error"]
    checks = {check["name"]: check["passed"] for check in entry["checks"]}
    assert checks["residual stream"] and checks["greedy decoding with a cache"] and checks["left padding"]
    ids = torch.randint(3, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(5))
    difference, effect, info = hooked_against_folder(base, scratch / "out", route["blocks"], ids)
    # The proof adds what the file holds; here it is the vector before it was rounded.
    assert rounded > 1e-4 or (difference <= max(2e-5, 5e-5 * effect) and effect > 0.05)
    assert not info["missing_keys"] and not info["mismatched_keys"] and not info["unexpected_keys"]
    card = (scratch / "out" / "README.md").read_text(encoding="utf-8")
    assert "4 residual streams" in card
