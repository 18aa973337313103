"""Tiny quantised model -> recipe -> folder: the stock loader of each format steers as the hook does.

FP8 and MXFP4 need nothing besides transformers (on a CPU it dequantises them); the other formats are run where their
packages are installed: compressed-tensors; bitsandbytes; optimum and gptqmodel.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.building import build_recipe
from support.old_transformers import skip_if_too_old
from support.quantised_models import bitsandbytes, quantise, trained_scale
from support.tiny_models import released_config, tiny_checkpoint, write_recipe
from support.verified import verify_folder

from patcher.checkpoint.folder import CheckpointFolder

LLAMA, NARROW = "meta-llama--Llama-3.2-1B", {"intermediate_size": 128}
QWEN = "Qwen--Qwen3-8B"
# (format, released config, changes, route, packages, whether a CPU runs the weights as they are stored)
CASES: list[tuple[str, str, dict[str, Any], str, tuple[str, ...], bool]] = [
    ("fp8", LLAMA, {}, "flag", (), False),
    ("fp8", "ibm-granite--granite-3.3-2b-instruct", NARROW, "flag", (), False),
    ("mxfp4", "openai--gpt-oss-20b", {"quantization_config": None}, "native", (), False),
    ("compressed-tensors int", LLAMA, {}, "flag", ("compressed_tensors",), True),
    ("compressed-tensors float", LLAMA, {}, "flag", ("compressed_tensors",), True),
    ("compressed-tensors packed", LLAMA, {}, "flag", ("compressed_tensors",), True),
    ("gptq", LLAMA, NARROW, "flag", ("optimum", "gptqmodel"), True),
    ("gptq", "facebook--opt-125m", {}, "native", ("optimum", "gptqmodel"), True),
    ("awq", LLAMA, NARROW, "flag", ("gptqmodel",), True),
    ("bitsandbytes 4", LLAMA, NARROW, "flag", ("bitsandbytes",), True),
    ("bitsandbytes 8", LLAMA, NARROW, "flag", ("bitsandbytes",), True),
    ("bitsandbytes 4", "openai-community--gpt2", {}, "native", ("bitsandbytes",), True),
    ("fp8 8", "Qwen--Qwen3-8B-FP8", {}, "carrier", (), False),
    ("fp8 8", "Qwen--Qwen3-30B-A3B-FP8", {}, "carrier", (), False),
    ("fp8 8", "deepseek-ai--DeepSeek-V3", {}, "carrier", (), False),
    ("fp8 8", "MiniMaxAI--MiniMax-M2", {}, "carrier", (), False),
    ("mxfp4", "openai--gpt-oss-20b", {}, "carrier", (), False),
    ("fp8 8", "Qwen--Qwen2.5-0.5B", {}, "relabel", (), False),
    ("compressed-tensors int", "Qwen--Qwen2.5-0.5B", {}, "relabel", ("compressed_tensors",), True),
    ("gptq", "Qwen--Qwen2.5-0.5B", NARROW, "relabel", ("optimum", "gptqmodel"), True),
    ("awq", "Qwen--Qwen2.5-0.5B", NARROW, "relabel", ("gptqmodel",), True),
    ("bitsandbytes 4", "Qwen--Qwen2.5-0.5B", NARROW, "relabel", ("bitsandbytes",), True),
    ("compressed-tensors int", QWEN, {}, "carrier", ("compressed_tensors",), True),
    ("compressed-tensors packed", QWEN, {}, "carrier", ("compressed_tensors",), True),
    ("gptq", QWEN, NARROW, "carrier", ("optimum", "gptqmodel"), True),
    ("awq", QWEN, NARROW, "carrier", ("gptqmodel",), True),
    ("bitsandbytes 4", QWEN, NARROW, "carrier", ("bitsandbytes",), True),
    ("bitsandbytes 8", QWEN, NARROW, "carrier", ("bitsandbytes",), True),
]


def quantised_base(folder: Path, method: str, name: str, changes: dict[str, Any], *, trained: bool = False) -> int:
    """A tiny quantised checkpoint, with the released exclusions; the layer to steer."""
    released = released_config(name).get("quantization_config")
    layer = tiny_checkpoint(folder, name, dtype=torch.bfloat16, **{**changes, "quantization_config": None})
    if trained:
        trained_scale(folder)
    if method.startswith("bitsandbytes"):
        bitsandbytes(folder, int(method.split()[1]))
    else:
        quantise(folder, method)
    if released is not None:
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] = {**released, **config["quantization_config"]}
        (folder / "config.json").write_text(json.dumps(config))
    return layer


def run(folder: Path, base: Path, layer: int, **keys: Any) -> dict[str, Any]:
    path = write_recipe(folder.with_suffix(".yaml"), base, layer, folder, **keys)
    return build_recipe(path, folder).manifest


@pytest.mark.slow_but("fp8-meta-llama--Llama-3.2-1B")
@pytest.mark.parametrize(
    ("method", "name", "changes", "route", "packages", "as_stored"),
    CASES,
    ids=[
        "-".join([*case[0].split(), case[1], *([case[3]] if case[3] in ("carrier", "relabel") else [])])
        for case in CASES
    ],
)
def test_the_folder_equals_the_quantised_base_under_a_hook(
    tmp_path: Path,
    method: str,
    name: str,
    changes: dict[str, Any],
    route: str,
    packages: tuple[str, ...],
    as_stored: bool,
) -> None:
    skip_if_too_old(name)
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    layer = quantised_base(tmp_path / "base", method, name, changes, trained=route == "carrier")
    before = {item.name: item.read_bytes() for item in (tmp_path / "base").iterdir()}

    manifest = run(tmp_path / "out", tmp_path / "base", layer, route=route)

    entry = manifest["verification"][0]
    assert manifest["route"]["name"] == route
    assert entry["status"] == "passed"
    assert entry["max_abs_logprob_diff"] <= 2e-5
    assert entry["steering_effect"] > 0.05
    assert entry["vector_rel_error"] <= 1e-5
    checks = {check["name"]: check for check in entry["checks"]}
    kind = method.split()[0]
    assert checks[f"quantised weights ({kind})"]["passed"] is (True if as_stored else None)
    assert checks["own dtype (bfloat16)"]["passed"] is True
    assert {item.name: item.read_bytes() for item in (tmp_path / "base").iterdir()} == before
    old, new = CheckpointFolder(tmp_path / "base").tensors, CheckpointFolder(tmp_path / "out").tensors
    for key, info in old.items():
        if key not in {tensor["name"] for tensor in manifest["route"]["tensors"]} or route == "carrier":
            there = new[manifest["route"]["renamed"].get(key, key)]
            assert info.file.read_bytes()[info.start : info.end] == there.file.read_bytes()[there.start : there.end]


@pytest.mark.slow
def test_a_quantised_folder_whose_bias_the_loader_drops_fails(tmp_path: Path) -> None:
    layer = quantised_base(tmp_path / "base", "fp8", LLAMA, {})
    run(tmp_path / "out", tmp_path / "base", layer)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    (tmp_path / "out" / "config.json").write_text(json.dumps({**config, "mlp_bias": False}))
    entry = verify_folder(tmp_path / "out")
    assert entry["status"] == "failed"
    failed = {check["name"] for check in entry["checks"] if check["passed"] is False}
    assert {"loading", "log-probabilities"} <= failed
