"""Tiny random model -> recipe -> folder -> stock load equals the hook, for every architecture with the slot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.building import build_recipe
from support.old_transformers import skip_if_too_old
from support.stock_loading import hooked_against_folder
from support.tiny_models import PAIRS, VOCABULARY, default_checkpoint, tiny_checkpoint, write_recipe

NATIVE, FLAG, RELABEL = "native", "flag", "relabel"
# Falcon-H1 and HyperCLOVAX shrink their logits; without that the effect can be seen on a random model as well.
# (released config, route, sharded, changes of the config)
CASES = [
    ("openai-community--gpt2", NATIVE, False, {}),
    ("EleutherAI--gpt-j-6b", NATIVE, True, {}),
    ("EleutherAI--pythia-70m", NATIVE, False, {}),
    ("EleutherAI--gpt-neox-20b", NATIVE, True, {}),
    ("microsoft--phi-2", NATIVE, False, {}),
    ("facebook--opt-125m", NATIVE, True, {}),
    ("bigscience--bloom-560m", NATIVE, False, {}),
    ("bigcode--starcoder2-3b", NATIVE, True, {}),
    ("bigcode--gpt_bigcode-santacoder", NATIVE, False, {}),
    ("tiiuae--falcon-rw-1b", NATIVE, False, {}),
    ("tiiuae--falcon-7b", FLAG, True, {}),
    ("tiiuae--falcon-40b", FLAG, False, {}),
    ("meta-llama--Llama-2-7b-chat-hf", FLAG, False, {}),
    ("meta-llama--Llama-2-7b-chat-hf", FLAG, True, {"tie_word_embeddings": True}),
    ("meta-llama--Llama-3.1-8B-Instruct", FLAG, True, {}),
    ("meta-llama--Llama-3.2-1B", FLAG, False, {}),
    ("HuggingFaceTB--SmolLM2-135M", FLAG, True, {"tie_word_embeddings": False}),
    ("HuggingFaceTB--SmolLM3-3B", RELABEL, False, {}),
    ("ibm-granite--granite-3.3-2b-instruct", FLAG, True, {}),
    ("nvidia--Nemotron-Mini-4B-Instruct", FLAG, False, {}),
    ("ByteDance-Seed--Seed-OSS-36B-Instruct", RELABEL, True, {}),
    ("baidu--ERNIE-4.5-0.3B-PT", RELABEL, False, {}),
    ("openai--gpt-oss-20b", NATIVE, True, {"quantization_config": None}),
    ("arcee-ai--AFM-4.5B", FLAG, False, {}),
    ("kyutai--helium-1-preview-2b", FLAG, False, {}),
    ("Salesforce--codegen-350M-mono", NATIVE, False, {}),
    ("EleutherAI--gpt-neo-125m", NATIVE, False, {}),
    ("microsoft--biogpt", NATIVE, False, {}),
    ("openbmb--MiniCPM3-4B", FLAG, True, {}),
    ("tiiuae--Falcon-H1-0.5B-Instruct", FLAG, False, {"lm_head_multiplier": 1.0}),
    (
        "naver-hyperclovax--HyperCLOVAX-SEED-Think-14B",
        FLAG,
        False,
        {"use_post_norm": False, "logits_scaling": 1.0, "residual_multiplier": 0.3},
    ),
]


@pytest.mark.slow_but(
    "openai-community--gpt2-single",
    "meta-llama--Llama-3.2-1B-single",
    "facebook--opt-125m-sharded",
    "tiiuae--falcon-7b-sharded",
)
@pytest.mark.parametrize(
    ("name", "route", "sharded", "changes"),
    CASES,
    ids=[f"{case[0]}-{'sharded' if case[2] else 'single'}" for case in CASES],
)
def test_the_folder_equals_the_hook(tmp_path: Path, name: str, route: str, sharded: bool, changes: dict) -> None:
    skip_if_too_old(name)
    base = tmp_path / "base"
    layer = tiny_checkpoint(base, name, sharded=sharded, **changes)
    path = write_recipe(tmp_path / "recipe.yaml", base, layer, tmp_path / "out", prefer="free")
    before = {item.name: item.read_bytes() for item in base.iterdir()}

    result = build_recipe(path, tmp_path / "out")

    entry = result.manifest["verification"][0]
    assert result.manifest["route"]["name"] == route
    assert entry["status"] == "passed"
    assert entry["max_abs_logprob_diff"] <= 2e-5
    assert entry["steering_effect"] > 0.05
    assert entry["vector_rel_error"] <= 1e-3
    assert {check["name"]: check["passed"] for check in entry["checks"]}["greedy decoding with a cache"] is True
    assert {item.name: item.read_bytes() for item in base.iterdir()} == before

    ids = torch.randint(3, VOCABULARY, (2, 19), generator=torch.Generator().manual_seed(5))
    difference, effect, info = hooked_against_folder(base, tmp_path / "out", result.manifest["route"]["blocks"], ids)
    assert difference <= 2e-5
    assert effect > 0.05
    assert not info["missing_keys"] and not info["mismatched_keys"]


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["mamba2", "mbart", "xglm"])
def test_classes_that_count_their_blocks_in_their_own_way(tmp_path: Path, model_type: str) -> None:
    """Mamba's hidden states leave the embedding out; mBART's layers are those of its encoder."""
    layer = default_checkpoint(tmp_path / "base", model_type)
    path = write_recipe(tmp_path / "recipe.yaml", tmp_path / "base", layer, tmp_path / "out")
    entry = build_recipe(path, tmp_path / "out").manifest["verification"][0]
    assert entry["passed"] and entry["steering_effect"] > 0.1 and entry["vector_rel_error"] < 1e-5


def test_the_decoder_of_a_multimodal_wrapper_is_looked_at_in_the_whole_class(tmp_path: Path) -> None:
    from support.tiny_models import parsed_config, released_config

    from patcher.architectures.analysis import Architecture

    architecture = Architecture(parsed_config(released_config("google--gemma-3-4b-it"), tmp_path))
    assert architecture.wraps and architecture.class_name == "Gemma3ForConditionalGeneration"
    assert (architecture.model_type, architecture.checkpoint_type) == ("gemma3_text", "gemma3")
    assert architecture.auto_class == "AutoModelForImageTextToText"
    assert architecture.blocks == "model.language_model.layers"


def test_two_vectors_and_several_layers_add_up(tmp_path: Path) -> None:
    base = tmp_path / "base"
    tiny_checkpoint(base, "meta-llama--Llama-3.2-1B", sharded=True)
    path = write_recipe(tmp_path / "recipe.yaml", base, [0, 2, 3], tmp_path / "out")
    raw = json.loads(path.read_text())
    raw["vectors"].append({**raw["vectors"][0], "name": "other", "pairs": PAIRS[:1], "layer": 2, "coefficient": -0.3})
    path.write_text(json.dumps(raw))
    result = build_recipe(path, tmp_path / "out")
    assert [(edit["name"], edit["layer"]) for edit in result.manifest["edits"]] == [
        ("love", 0), ("love", 2), ("love", 3), ("other", 2)
    ]  # fmt: skip
    ids = torch.randint(3, VOCABULARY, (2, 19), generator=torch.Generator().manual_seed(5))
    difference, effect, _ = hooked_against_folder(base, tmp_path / "out", "model.layers", ids)
    assert difference <= 2e-5
    assert effect > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True], ids=["single", "sharded"])
def test_experts_in_half_precision_all_carry_the_same_vector(tmp_path: Path, sharded: bool) -> None:
    """Rounded to bf16 beside different biases, the gain would depend on which experts a token is routed to."""
    base = tmp_path / "base"
    layer = tiny_checkpoint(
        base, "openai--gpt-oss-20b", dtype=torch.bfloat16, sharded=sharded, quantization_config=None
    )
    path = write_recipe(tmp_path / "recipe.yaml", base, layer, tmp_path / "out")
    result = build_recipe(path, tmp_path / "out")
    assert result.manifest["edits"][0]["stored_rel_error"] < 1e-6
    ids = torch.randint(3, VOCABULARY, (2, 19), generator=torch.Generator().manual_seed(5))
    difference, effect, info = hooked_against_folder(base, tmp_path / "out", "model.layers", ids)
    assert difference <= 2e-5 and effect > 0.1
    assert not info["missing_keys"] and not info["unexpected_keys"]
