"""Which tensors blocks 0..k need: with all others spoilt, the residual stream after block k is what it was."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.old_transformers import skip_if_too_old
from support.quantised_models import quantise
from support.tiny_models import default_checkpoint, tiny_checkpoint
from transformers import AutoModelForCausalLM

from patcher.architectures.analysis import Architecture
from patcher.architectures.model_class import quiet_transformers
from patcher.checkpoint.block_names import BlockNames, block_names, tensors_for_blocks
from patcher.checkpoint.folder import CheckpointFolder
from patcher.checkpoint.prepare import read_config

IDS = torch.tensor([[5, 9, 60, 33, 17, 8]])
# (config, whether the tensors are saved as the bare model's, what runs after the blocks)
CASES: list[tuple[str, bool, set[str]]] = [
    ("meta-llama--Llama-3.1-8B-Instruct", False, {"model.norm.weight", "lm_head.weight"}),
    ("meta-llama--Llama-3.2-1B", False, {"model.norm.weight"}),
    ("meta-llama--Llama-3.1-8B-Instruct", True, {"norm.weight", "lm_head.weight"}),
    ("openai-community--gpt2", True, {"ln_f.weight", "ln_f.bias"}),
    ("EleutherAI--pythia-70m", False, {"gpt_neox.final_layer_norm.weight", "gpt_neox.final_layer_norm.bias"}),
    ("facebook--opt-350m", False, {"model.decoder.project_out.weight"}),
    ("facebook--opt-125m", False, {"model.decoder.final_layer_norm.weight", "model.decoder.final_layer_norm.bias"}),
    ("google--gemma-3-1b-it", False, {"model.norm.weight"}),
    ("openai--gpt-oss-20b", False, {"model.norm.weight", "lm_head.weight"}),
    ("tiiuae--Falcon-H1-0.5B-Instruct", False, {"model.final_layernorm.weight"}),
    ("bigscience--bloom-560m", True, {"ln_f.weight", "ln_f.bias"}),
    ("mixtral", False, {"model.norm.weight", "lm_head.weight"}),
    ("zamba2", False, {"model.final_layernorm.weight"}),
    ("gemma3n_text", False, {"model.norm.weight"}),
    ("rwkv", False, {"rwkv.ln_out.weight", "rwkv.ln_out.bias", "head.weight"}),
]


def make(folder: Path, name: str) -> None:
    skip_if_too_old(name)
    if "--" in name:
        plain = {"quantization_config": None} if "gpt-oss" in name else {}
        tiny_checkpoint(folder, name, tokenizer=False, **plain)
    else:
        default_checkpoint(folder, name, tokenizer=False)


def as_bare_model(folder: Path, prefix: str) -> None:
    file = folder / "model.safetensors"
    tensors = {name.removeprefix(f"{prefix}."): tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})


def residuals(folder: Path, blocks: str) -> list[torch.Tensor]:
    """What enters block 0, and what every block puts out."""
    with quiet_transformers():
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    seen: list[torch.Tensor] = []

    def enters(_module: Any, inputs: Any, keywords: Any) -> None:
        seen.append((inputs[0] if inputs else keywords["hidden_states"]).clone())

    def leaves(_module: Any, _inputs: Any, output: Any) -> None:
        seen.append((output if isinstance(output, torch.Tensor) else output[0]).clone())

    layers = model.get_submodule(blocks)
    layers[0].register_forward_pre_hook(enters, with_kwargs=True)
    for layer in layers:
        layer.register_forward_hook(leaves)
    with torch.no_grad(), quiet_transformers():
        model(input_ids=IDS, use_cache=False)
    return seen


@pytest.mark.parametrize(("name", "bare", "after"), CASES, ids=[f"{name}{'-bare' * bare}" for name, bare, _ in CASES])
def test_the_rest_can_be_anything(tmp_path: Path, name: str, bare: bool, after: set[str]) -> None:
    base = tmp_path / "base"
    make(base, name)
    architecture = Architecture(read_config(base))
    if bare:
        as_bare_model(base, architecture.base_prefix)
    names = block_names(architecture)
    stored = CheckpointFolder(base).tensors
    honest = residuals(base, architecture.blocks)
    assert len(honest) == architecture.block_count + 1
    count = 0
    for last in (-1, 1):
        needed = tensors_for_blocks(stored, names, last)
        spoilt = Path(shutil.copytree(base, tmp_path / f"spoilt{last}"))
        tensors = load_file(base / "model.safetensors")
        for key, tensor in tensors.items():
            if key not in needed and tensor.is_floating_point():
                tensor.fill_(torch.nan)
                count += 1
        save_file(tensors, spoilt / "model.safetensors", {"format": "pt"})
        found = residuals(spoilt, architecture.blocks)
        for place in range(last + 2):
            assert torch.equal(found[place], honest[place]), f"block {place - 1} needs more"
        assert not torch.isfinite(found[-1]).all(), "nothing of the rest was spoilt"
        assert after <= set(stored) - needed
        assert needed < tensors_for_blocks(stored, names, last + 1)
    assert count > 10
    everything = tensors_for_blocks(stored, names, architecture.block_count - 1)
    assert after <= set(stored) - everything and not any(names.block_of(key) is not None for key in after)


def test_quantised_pieces_go_with_their_block(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "base", "meta-llama--Llama-3.2-1B", dtype=torch.bfloat16, tokenizer=False)
    quantise(tmp_path / "base", "gptq")
    names = block_names(Architecture(read_config(tmp_path / "base")))
    stored = CheckpointFolder(tmp_path / "base").tensors
    needed = tensors_for_blocks(stored, names, 0)
    assert "model.layers.0.mlp.down_proj.qweight" in needed and "model.layers.1.mlp.down_proj.qweight" not in needed
    assert {name for name in needed if ".layers." not in name} == {"model.embed_tokens.weight"}


LLAMA = BlockNames(
    ("model.layers.", "layers."),
    ("model.norm.", "norm.", "lm_head."),
    (frozenset({"lm_head.weight", "model.embed_tokens.weight"}),),
)


def test_a_tied_embedding_under_the_name_of_the_head_is_taken() -> None:
    stored = {"lm_head.weight", "model.layers.0.a", "model.layers.1.a", "model.norm.weight"}
    assert tensors_for_blocks(stored, LLAMA, 0) == {"lm_head.weight", "model.layers.0.a"}
    both = {*stored, "model.embed_tokens.weight"}
    assert tensors_for_blocks(both, LLAMA, 0) == {"model.embed_tokens.weight", "model.layers.0.a"}


def test_names_that_are_not_understood_are_taken() -> None:
    stored = {"model.layers.0.a", "model.layers.12.a", "vision.layers.12.a", "model.layers_extra.12.a", "odd"}
    assert tensors_for_blocks(stored, LLAMA, 1) == stored - {"model.layers.12.a"}
    elsewhere = {"language_model.model.layers.0.a", "language_model.model.layers.9.a", "norm.weight"}
    assert tensors_for_blocks(elsewhere, LLAMA, 0) == elsewhere


def test_a_number_is_read_whole() -> None:
    assert LLAMA.block_of("model.layers.1.a") == 1 and LLAMA.block_of("layers.11.a") == 11
    assert LLAMA.block_of("model.layers.1") is None and LLAMA.block_of("model.layers.x.1.a") is None


def test_a_class_that_cannot_be_run_small_has_nothing_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from patcher.checkpoint import block_names as module

    tiny_checkpoint(tmp_path / "base", "meta-llama--Llama-3.1-8B-Instruct", tokenizer=False)

    def broken(*_arguments: Any, **_options: Any) -> None:
        raise RuntimeError("no stand-in")

    monkeypatch.setattr(module, "build_stand_in", broken)
    names = block_names(Architecture(read_config(tmp_path / "base")))
    needed = tensors_for_blocks(CheckpointFolder(tmp_path / "base").tensors, names, 0)
    assert {"model.norm.weight", "lm_head.weight", "model.embed_tokens.weight"} <= needed
