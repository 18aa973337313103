"""From a recipe to a verified folder for architectures without the slot, by the route that the planner chooses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.building import build_recipe
from support.stock_loading import hooked_against_folder
from support.tiny_models import VOCABULARY, default_checkpoint, write_recipe

from patcher.architectures.registry import rows

FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"
WINDOW = {"use_sliding_window": True, "sliding_window": 24}
# (model type, layer of the default config, route, the class that reads the copy, changes of the config)
CASES: list[tuple[str, int, str, str, dict[str, Any]]] = [
    ("qwen2", 2, "relabel", "LlamaForCausalLM", {}),
    ("qwen2", 2, "relabel", "GraniteSWAForCausalLM", {**WINDOW, "layer_types": [FULL, SLIDING] * 16}),
    ("qwen3", 2, "carrier", "Qwen3ForCausalLM", {"tie_word_embeddings": True}),
    ("qwen3", 2, "carrier", "Qwen3ForCausalLM", {**WINDOW, "layer_types": [FULL, SLIDING] * 16}),
    ("mistral", 2, "relabel", "LlamaForCausalLM", {"sliding_window": None}),
    ("mistral", 2, "relabel", "GraniteSWAForCausalLM", {"sliding_window": 24}),
    ("phi3", 2, "relabel", "LlamaForCausalLM", {"sliding_window": None}),
    ("gemma", 2, "carrier", "GemmaForCausalLM", {}),
    ("gemma2", 2, "carrier", "Gemma2ForCausalLM", {"sliding_window": 24}),
    ("gemma2", 3, "carrier", "Gemma2ForCausalLM", {"sliding_window": 24}),
    ("gemma3_text", 2, "carrier", "Gemma3ForCausalLM", {"sliding_window": 24}),
    ("gemma3_text", 5, "carrier", "Gemma3ForCausalLM", {"sliding_window": 24}),
    ("olmo2", 2, "carrier", "Olmo2ForCausalLM", {}),
    ("olmo3", 3, "carrier", "Olmo3ForCausalLM", {"sliding_window": 24}),
    ("glm4", 2, "carrier", "Glm4ForCausalLM", {}),
    ("mixtral", 2, "carrier", "MixtralForCausalLM", {}),
    ("mixtral", 2, "carrier", "MixtralForCausalLM", {"sliding_window": 24}),
    ("qwen3_moe", 2, "carrier", "Qwen3MoeForCausalLM", {}),
    ("qwen3_next", 2, "carrier", "Qwen3NextForCausalLM", {}),
    ("deepseek_v3", 2, "carrier", "DeepseekV3ForCausalLM", {}),
    ("deepseek_v3", 5, "carrier", "DeepseekV3ForCausalLM", {}),
]


def named(case: tuple[str, int, str, str, dict[str, Any]]) -> str:
    return f"{case[0]}-{case[1]}" + "".join(f"-{key}" for key in case[4])


@pytest.mark.slow_but("qwen2-2", "qwen3-2-tie_word_embeddings", "gemma-2", "mixtral-2")
@pytest.mark.parametrize("case", CASES, ids=named)
def test_the_folder_equals_the_hook(tmp_path: Path, case: tuple[str, int, str, str, dict[str, Any]]) -> None:
    model_type, layer, route, reader, changes = case
    base, out = tmp_path / "base", tmp_path / "out"
    place = default_checkpoint(base, model_type, layer, trained_scale=True, **changes)
    before = {item.name: item.read_bytes() for item in base.iterdir()}
    path = write_recipe(tmp_path / "recipe.yaml", base, place, out)

    manifest = build_recipe(path, out).manifest

    assert (manifest["route"]["name"], manifest["route"]["architecture"]) == (route, reader)
    entry = manifest["verification"][0]
    assert entry["status"] == "passed"
    assert entry["max_abs_logprob_diff"] <= max(2e-5, 5e-5 * entry["steering_effect"])
    assert entry["steering_effect"] > 0.1
    checks = {check["name"]: check["passed"] for check in entry["checks"]}
    assert checks["greedy decoding with a cache"] is True
    assert {item.name: item.read_bytes() for item in base.iterdir()} == before

    ids = torch.randint(3, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(5))
    difference, effect, info = hooked_against_folder(base, out, manifest["route"]["blocks"], ids)
    assert difference <= max(2e-5, 5e-5 * effect) and effect > 0.1
    assert not info["missing_keys"] and not info["mismatched_keys"] and not info["unexpected_keys"]


@pytest.mark.slow_but("olmo2")
@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "phi3", "olmo2", "qwen3_moe"])
def test_half_precision_keeps_the_route_exact(tmp_path: Path, model_type: str) -> None:
    place = default_checkpoint(tmp_path / "base", model_type, dtype=torch.bfloat16, trained_scale=True)
    path = write_recipe(tmp_path / "recipe.yaml", tmp_path / "base", place, tmp_path / "out")
    entry = build_recipe(path, tmp_path / "out").manifest["verification"][0]
    assert entry["status"] == "passed" and entry["max_abs_logprob_diff"] <= 1e-4 and entry["steering_effect"] > 0.1


def test_every_type_here_is_in_the_registry() -> None:
    assert {case[0] for case in CASES} <= rows().keys()
