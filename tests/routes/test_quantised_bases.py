"""Quantised checkpoints: which routes serve them, under which names and dtypes, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.quantised_models import METHODS, quantise
from support.tiny_models import default_checkpoint, tiny_checkpoint
from support.writing import write_steered

from patcher.architectures.analysis import Architecture
from patcher.architectures.quantised import FORMATS, quantisation_of
from patcher.capture.model import load_causal_lm
from patcher.checkpoint.folder import CheckpointFolder
from patcher.checkpoint.prepare import prepared_base, read_config
from patcher.checkpoint.source import Source
from patcher.errors import InputError
from patcher.routes.plan import Plan
from patcher.routes.planner import ROUTES, choose_route, survey

LLAMA, GPT_OSS = "meta-llama--Llama-3.2-1B", "openai--gpt-oss-20b"
QWEN = "Qwen--Qwen3-8B"
LAYER = 1


def quantised(folder: Path, method: str, name: str = LLAMA) -> CheckpointFolder:
    dense = {"quantization_config": None} if name == GPT_OSS else {}
    tiny_checkpoint(folder, name, dtype=torch.bfloat16, tokenizer=False, **dense)
    quantise(folder, method)
    return CheckpointFolder(folder)


def planned(checkpoint: CheckpointFolder, **options: Any) -> Plan:
    return choose_route(Architecture(read_config(checkpoint.path)), [LAYER], checkpoint, **options)


@pytest.mark.parametrize("method", [method for method in METHODS if method != "mxfp4"])
def test_a_created_bias_lies_beside_the_quantised_weight(tmp_path: Path, method: str) -> None:
    checkpoint = quantised(tmp_path / "base", method)
    plan = planned(checkpoint)
    assert plan.route == "flag"
    dtype = FORMATS[method.split()[0]].bias
    assert [(tensor.name, tensor.dtype) for tensor in plan.carriers] == [
        (f"model.layers.{LAYER}.mlp.down_proj.bias", dtype)
    ]
    assert {tensor.dtype for tensor in plan.tensors} <= {dtype, "F32", "BF16"}
    assert len(plan.tensors) == 4 * 3

    vector = {LAYER: torch.randn(64, generator=torch.Generator().manual_seed(0))}
    write_steered(plan, vector, checkpoint, tmp_path / "out")
    copied = CheckpointFolder(tmp_path / "out")
    for name, info in checkpoint.tensors.items():
        now = copied.tensors[name]
        assert (now.dtype, now.shape) == (info.dtype, info.shape)
        before, after = (x.file.read_bytes()[x.start : x.end] for x in (info, now))
        assert before == after
    assert copied.config["quantization_config"] == METHODS[method][1]


def test_the_experts_of_gpt_oss_have_the_bias_beside_their_blocks(tmp_path: Path) -> None:
    checkpoint = quantised(tmp_path / "base", "mxfp4", GPT_OSS)
    plan = planned(checkpoint)
    assert plan.route == "native"
    (carrier,) = plan.carriers
    assert carrier.name == f"model.layers.{LAYER}.mlp.experts.down_proj_bias"
    assert (carrier.kind, carrier.dtype) == ("added", "F32")
    assert f"model.layers.{LAYER}.mlp.experts.down_proj_blocks" in checkpoint.tensors


def test_routes_that_rewrite_weights_refuse_it(tmp_path: Path) -> None:
    checkpoint = quantised(tmp_path / "base", "gptq", "Qwen--Qwen2.5-0.5B")
    architecture = Architecture(read_config(checkpoint.path))
    findings = {finding.name: finding for finding in survey(architecture, [LAYER], checkpoint)}
    keep = ("native", "flag", "relabel", "carrier")
    for name in ROUTES:
        assert (name in keep) != ("the checkpoint is quantised (gptq)" in findings[name].why_not)
    assert findings["carrier"].plan is not None and findings["relabel"].plan is not None
    with pytest.raises(InputError, match="has no route"):
        planned(checkpoint, exact=False, route="rank_one")


@pytest.mark.parametrize("method", [method for method in METHODS if method != "mxfp4"])
def test_another_class_reads_quantised_weights_that_keep_their_names(tmp_path: Path, method: str) -> None:
    checkpoint = quantised(tmp_path / "base", method, "Qwen--Qwen2.5-0.5B")
    plan = planned(checkpoint)
    assert (plan.route, plan.architecture, plan.stacks["vllm"]) == ("relabel", "LlamaForCausalLM", "no")
    assert not plan.renamed and not plan.dropped
    assert plan.config is not None and plan.config["quantization_config"] == METHODS[method][1]
    assert {tensor.dtype for tensor in plan.carriers} == {FORMATS[method.split()[0]].bias}
    vector = {LAYER: torch.randn(64, generator=torch.Generator().manual_seed(0))}
    write_steered(plan, vector, checkpoint, tmp_path / "out")
    copied = CheckpointFolder(tmp_path / "out").tensors
    for name, info in checkpoint.tensors.items():
        now = copied[name]
        assert info.file.read_bytes()[info.start : info.end] == now.file.read_bytes()[now.start : now.end]


@pytest.mark.parametrize(("name", "route"), [("Qwen--Qwen2.5-0.5B", "relabel"), (QWEN, "carrier")])
def test_a_stack_that_no_test_runs_is_not_promised(tmp_path: Path, name: str, route: str) -> None:
    with pytest.raises(InputError, match="vllm does not read it") as caught:
        planned(quantised(tmp_path / "base", "fp8", name), route=route, targets=["vllm"])
    assert caught.value.problems[0].remedy == "take vllm out of `targets`"
    assert planned(CheckpointFolder(tmp_path / "base"), route=route).route == route


def test_the_unquantised_version_has_the_route_that_a_refusal_points_to(tmp_path: Path) -> None:
    default_checkpoint(tmp_path / "base", "diffllama", dtype=torch.bfloat16, tokenizer=False)
    assert not planned(CheckpointFolder(tmp_path / "base"), exact=False).exact
    quantise(tmp_path / "base", "fp8 8")
    with pytest.raises(InputError, match="has no route for this edit") as caught:
        planned(CheckpointFolder(tmp_path / "base"), exact=False)
    remedy = "use the unquantised version of this model; where that has only a fitted route, add `exact: false`"
    assert caught.value.problems[0].remedy == remedy


@pytest.mark.parametrize("name", ["Qwen--Qwen3-30B-A3B-FP8", "deepseek-ai--DeepSeek-V3"])
def test_loaded_as_on_a_gpu_the_inserted_block_alone_is_plain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """There FP8 weights are not dequantised; linear layers and experts are replaced by classes that hold them."""
    from transformers import AutoModelForCausalLM
    from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

    tiny_checkpoint(tmp_path / "base", name, dtype=torch.bfloat16, tokenizer=False, quantization_config=None)
    quantise(tmp_path / "base", "fp8 8")
    checkpoint = CheckpointFolder(tmp_path / "base")
    plan = planned(checkpoint)
    assert plan.route == "carrier"
    write_steered(plan, {LAYER: torch.randn(64)}, checkpoint, tmp_path / "out")
    monkeypatch.setattr(FineGrainedFP8HfQuantizer, "validate_environment", lambda *_args, **_options: None)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto", output_loading_info=True)
    assert not any(info.values())
    for place, block in enumerate(model.model.layers):
        held = {parameter.dtype for parameter in block.parameters()}
        assert (torch.float8_e4m3fn in held) == (place != LAYER + 1)


def test_no_class_that_vllm_lacks_takes_the_place_of_a_quantised_one(tmp_path: Path) -> None:
    checkpoint = quantised(tmp_path / "base", "fp8", QWEN)
    plan = planned(checkpoint)
    assert (plan.route, plan.architecture) == ("carrier", "Qwen3ForCausalLM")
    with pytest.raises(InputError, match="the other class is one that vLLM does not have"):
        planned(checkpoint, route="relabel")


def test_another_class_that_splits_quantised_weights_is_refused(tmp_path: Path) -> None:
    default_checkpoint(tmp_path / "base", "phi3", tokenizer=False, dtype=torch.bfloat16, pad_token_id=None)
    quantise(tmp_path / "base", "fp8 8")
    with pytest.raises(InputError, match="is quantised, and the other class has it in another form or place"):
        planned(CheckpointFolder(tmp_path / "base"), route="relabel")


@pytest.mark.parametrize("method", [method for method in METHODS if method != "mxfp4"])
def test_an_inserted_block_is_left_out_of_the_quantisation(tmp_path: Path, method: str) -> None:
    checkpoint = quantised(tmp_path / "base", method, QWEN)
    plan = planned(checkpoint, route="carrier")
    skip = FORMATS[method.split()[0]].skip
    listed = plan.config_changes["quantization_config"][skip]
    assert plan.stacks == {"transformers": "native", "vllm": "no", "llama.cpp": "no"}
    assert any("the inserted block is not quantised" in warning for warning in plan.warnings)
    modules = {tensor.parameter.rpartition(".")[0] for tensor in plan.tensors if len(tensor.shape) == 2}
    assert len(modules) == 7 and all(name.startswith(f"model.layers.{LAYER + 1}.") for name in modules)
    if method == "gptq":
        (quantised_modules,) = listed
        assert len(quantised_modules) == 4 * 7 and not modules & set(quantised_modules)
        assert f"model.layers.{LAYER + 2}.mlp.up_proj" in quantised_modules
    else:
        assert set(listed) == modules | {"lm_head"}
    vector = {LAYER: torch.randn(64, generator=torch.Generator().manual_seed(0))}
    write_steered(plan, vector, checkpoint, tmp_path / "out")
    copied = CheckpointFolder(tmp_path / "out").tensors
    assert {info.dtype for name, info in copied.items() if f".layers.{LAYER + 1}." in name} == {"BF16", "F32"}
    for name, info in checkpoint.tensors.items():
        now = copied[plan.renamed.get(name, name)]
        assert info.file.read_bytes()[info.start : info.end] == now.file.read_bytes()[now.start : now.end]


@pytest.mark.parametrize(("method", "reads"), [("gptq", "native"), ("fp8", "native"), ("awq", "no")])
def test_what_llama_cpp_converts(tmp_path: Path, method: str, reads: str) -> None:
    plan = planned(quantised(tmp_path / "base", method))
    assert plan.stacks["llama.cpp"] == reads


def test_biases_of_zero_that_the_class_does_not_read_are_replaced(tmp_path: Path) -> None:
    """Some tools store one for every layer that they quantised, whether the class has it or not."""
    checkpoint = quantised(tmp_path / "base", "gptq")
    file = tmp_path / "base" / "model.safetensors"
    names = [f"model.layers.{layer}.mlp.down_proj.bias" for layer in range(4)]
    stored = load_file(file)
    save_file({**stored, **{name: torch.zeros(64).half() for name in names}}, file, {"format": "pt"})
    checkpoint = CheckpointFolder(tmp_path / "base")
    plan = planned(checkpoint)
    assert plan.dropped == set(names)
    vector = torch.randn(64, generator=torch.Generator().manual_seed(0))
    write_steered(plan, {LAYER: vector}, checkpoint, tmp_path / "out")
    copied = CheckpointFolder(tmp_path / "out").tensors
    assert set(copied) == set(stored) | {tensor.name for tensor in plan.tensors}

    save_file({**stored, names[2]: torch.ones(64).half()}, file, {"format": "pt"})
    with pytest.raises(InputError, match="which the class does not read without the flag"):
        planned(CheckpointFolder(tmp_path / "base"), route="flag")


@pytest.mark.parametrize(
    ("stated", "method"),
    [
        ({"quant_method": "hqq"}, "hqq"),
        ({"bits": 4}, "unknown"),
        (["odd"], "unknown"),
        ("odd", "unknown"),
        ({"quant_method": ["odd"]}, "odd"),
    ],
)
def test_other_formats_are_refused(stated: Any, method: str) -> None:
    with pytest.raises(InputError, match="the checkpoint is quantised") as caught:
        quantisation_of({"quantization_config": stated})
    assert caught.value.code == "quantised" and method in str(caught.value)
    assert "gptq" in str(caught.value.problems[0].remedy)


@pytest.mark.parametrize("stated", [None, {}])
def test_what_is_not_quantised(stated: Any) -> None:
    assert quantisation_of({"quantization_config": stated}) is None
    assert quantisation_of({}) is None


def test_older_bitsandbytes_configs_state_no_method() -> None:
    found = quantisation_of({"quantization_config": {"load_in_4bit": True}})
    assert found is not None and found.method == "bitsandbytes"


def test_no_adapter_is_merged_into_quantised_weights(tmp_path: Path) -> None:
    folder = quantised(tmp_path / "base", "fp8").path
    recipe = SimpleNamespace(adapter="somewhere", trust_remote_code=False)
    loaded: Any = SimpleNamespace(recipe=recipe, folder=tmp_path)
    source = Source("base", False, None, folder)
    with (
        pytest.raises(InputError, match="no adapter can be merged into quantised weights"),
        prepared_base(source, loaded, tmp_path / "out", lambda _line: None),
    ):
        pass


def test_a_package_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers.quantizers.quantizer_gptq as loader

    monkeypatch.setattr(loader, "is_optimum_available", lambda: False)
    folder = quantised(tmp_path / "base", "gptq").path
    with pytest.raises(InputError, match="needs a package that is not installed") as caught:
        load_causal_lm(folder, dtype=torch.float32)
    assert caught.value.problems[0].remedy == "pip install optimum gptqmodel"
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"] == "gptq"
