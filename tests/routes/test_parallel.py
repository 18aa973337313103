"""The attention's output bias of parallel blocks, and the last norm's bias of post-LN blocks."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.tiny_models import default_checkpoint, parsed_config, released_config, tiny_checkpoint
from support.tiny_patch import architecture_of, patch_tiny

from patcher.architectures.analysis import Architecture
from patcher.routes import parallel
from patcher.routes.plan import NotApplicable


@pytest.mark.parametrize("model_type", ["cohere", "cohere2", "cohere2_moe"])
def test_a_parallel_block_takes_it_beside_its_mlp(tmp_path: Path, model_type: str) -> None:
    layer = default_checkpoint(tmp_path / "base", model_type)
    patched = patch_tiny(tmp_path / "base", tmp_path / "copy", [layer], route="parallel")
    assert [tensor.parameter for tensor in patched.plan.carriers] == [f"model.layers.{layer}.self_attn.o_proj.bias"]
    assert patched.plan.config_changes == {"attention_bias": True}
    assert all("self_attn" in tensor.name for tensor in patched.plan.tensors)
    assert patched.difference <= 2e-5 < 0.05 < patched.effect
    assert not patched.report


@pytest.mark.parametrize("name", ["Qwen--Qwen3-8B", "meta-llama--Llama-3.2-1B", "openai-community--gpt2"])
def test_a_sequential_block_would_feed_it_to_its_mlp(tmp_path: Path, name: str) -> None:
    architecture = Architecture(parsed_config(released_config(name), tmp_path))
    with pytest.raises(NotApplicable, match="the block's MLP reads it too"):
        parallel.plan(architecture, [2], None)


def test_vllm_is_served_through_its_transformers_backend_when_asked(tmp_path: Path) -> None:
    layer = default_checkpoint(tmp_path / "base", "cohere")
    patched = patch_tiny(
        tmp_path / "base", tmp_path / "copy", [layer], route="parallel", targets=["transformers", "vllm"]
    )
    assert patched.plan.config_changes["architectures"] == ["TransformersForCausalLM"]
    assert patched.plan.stacks == {"transformers": "native", "vllm": "backend", "llama.cpp": "no"}
    assert "its own class drops the bias" in patched.plan.reason
    assert patched.difference <= 2e-5 < 0.05 < patched.effect


def test_the_last_norm_of_a_post_ln_block_takes_it(tmp_path: Path) -> None:
    layer = tiny_checkpoint(tmp_path / "base", "facebook--opt-350m", tokenizer=False)
    patched = patch_tiny(tmp_path / "base", tmp_path / "copy", [layer])
    assert [tensor.parameter for tensor in patched.plan.carriers] == [
        f"model.decoder.layers.{layer}.final_layer_norm.bias"
    ]
    assert patched.plan.route == "native"
    assert patched.difference <= 2e-5 < 0.05 < patched.effect


def test_a_decoder_of_the_bert_family_takes_it_in_its_output_norm(tmp_path: Path) -> None:
    layer = default_checkpoint(tmp_path / "base", "bert")
    architecture = architecture_of(tmp_path / "base")
    assert architecture.config.is_decoder
    patched = patch_tiny(tmp_path / "base", tmp_path / "copy", [layer])
    assert [tensor.parameter for tensor in patched.plan.carriers] == [
        f"bert.encoder.layer.{layer}.output.LayerNorm.bias"
    ]
    assert patched.difference <= 2e-5 < 0.05 < patched.effect
