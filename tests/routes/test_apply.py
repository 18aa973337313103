"""The values that are written: divided by the factor, added in float32 and rounded once, or refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.old_transformers import skip_if_too_old
from support.tiny_models import VOCABULARY, tiny_checkpoint
from support.writing import write_steered
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from patcher.architectures.analysis import Architecture
from patcher.architectures.model_class import causal_lm_from_config, quiet_transformers
from patcher.architectures.shrink import shrink_config
from patcher.checkpoint.folder import CheckpointFolder
from patcher.checkpoint.prepare import read_config
from patcher.checkpoint.safetensors_file import read_tensor
from patcher.errors import CheckFailed
from patcher.routes.apply import tensors_to_write
from patcher.routes.plan import STORED_LIMIT, Plan, TensorWrite
from patcher.routes.planner import choose_route

WIDTH = 48
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def plan_of(*writes: TensorWrite) -> Plan:
    return Plan("native", "X", "h", {}, writes, {}, "")


def written(name: str, kind: Any, layer: int | None, shape: tuple[int, ...], dtype: str, factor: float) -> TensorWrite:
    return TensorWrite(name, f"model.{name}", kind, layer, factor, shape, dtype)


def folder_with(path: Path, **tensors: torch.Tensor) -> CheckpointFolder:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text("{}")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "model.safetensors")
    return CheckpointFolder(path)


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Created


@pytest.mark.parametrize("factor", [1.0, 0.22, 12.0, 1.4 / 62**0.5])
def test_a_created_bias_is_the_vector_over_the_factor(tmp_path: Path, factor: float) -> None:
    base = folder_with(tmp_path / "base", weight=random(2, 2))
    vector = random(WIDTH, seed=1)
    created, replaced = tensors_to_write(
        plan_of(written("b", "created", 3, (WIDTH,), "F32", factor)), {3: vector}, base
    )
    assert replaced == {}
    assert created["b"].dtype == torch.float32
    assert torch.equal(created["b"], (vector.double() / factor).float())
    assert torch.allclose(created["b"].double() * factor, vector.double(), rtol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_have_the_planned_dtype_and_shape(tmp_path: Path, dtype: str) -> None:
    base = folder_with(tmp_path / "base", weight=random(2, 2))
    plan = plan_of(written("z", "created", None, (7, 5), dtype, 1.0), written("b", "created", 0, (WIDTH,), "F32", 1.0))
    created, _ = tensors_to_write(plan, {0: random(WIDTH)}, base)
    assert created["z"].dtype == DTYPES[dtype]
    assert created["z"].shape == (7, 5)
    assert not created["z"].any()


def test_each_layer_gets_its_own_vector(tmp_path: Path) -> None:
    base = folder_with(tmp_path / "base", old=random(WIDTH))
    vectors = {2: random(WIDTH, seed=2), 5: random(WIDTH, seed=5)}
    plan = plan_of(
        written("five", "created", 5, (WIDTH,), "F32", 2.0),
        written("two", "created", 2, (WIDTH,), "F32", 1.0),
    )
    created, _ = tensors_to_write(plan, vectors, base)
    assert torch.equal(created["two"], vectors[2])
    assert torch.equal(created["five"], vectors[5] / 2)
    assert list(created) == ["five", "two"]


def test_created_experts_all_carry_the_vector(tmp_path: Path) -> None:
    base = folder_with(tmp_path / "base", weight=random(2, 2))
    vector = random(WIDTH, seed=1)
    created, _ = tensors_to_write(plan_of(written("b", "created", 0, (4, WIDTH), "F32", 1.0)), {0: vector}, base)
    assert created["b"].shape == (4, WIDTH)
    assert created["b"].is_contiguous()
    assert all(torch.equal(row, vector) for row in created["b"])


# Added


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor", [1.0, 0.3])
def test_an_existing_bias_is_added_to_in_float32_and_rounded_once(tmp_path: Path, dtype: str, factor: float) -> None:
    before = random(WIDTH, seed=3, scale=0.2).to(DTYPES[dtype])
    base = folder_with(tmp_path / "base", b=before)
    vector = random(WIDTH, seed=4)
    created, replaced = tensors_to_write(plan_of(written("b", "added", 1, (WIDTH,), dtype, factor)), {1: vector}, base)
    assert created == {}
    after = replaced["b"]
    assert after.dtype == before.dtype
    assert torch.equal(after, (before.float() + (vector.double() / factor).float()).to(before.dtype))
    exact = before.double() + vector.double() / factor
    units = (after.double() - exact).abs() / (exact.abs() + before.double().abs())
    assert float(units.max()) <= torch.finfo(before.dtype).eps
    if dtype != "F32":
        # Rounding the vector first gives other values somewhere.
        assert not torch.equal(after, before + (vector / factor).to(before.dtype))
        assert float(((after.double() - exact).abs() / exact.abs()).max()) <= torch.finfo(before.dtype).eps * 0.5001


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_expert_gains_the_vector(tmp_path: Path, dtype: str) -> None:
    before = random(4, WIDTH, seed=3, scale=0.2).to(DTYPES[dtype])
    base = folder_with(tmp_path / "base", b=before)
    vector = random(WIDTH, seed=4)
    _, replaced = tensors_to_write(plan_of(written("b", "added", 0, (4, WIDTH), dtype, 1.0)), {0: vector}, base)
    assert replaced["b"].shape == before.shape
    gained = replaced["b"].double() - before.double()
    assert float((gained - vector.double()).norm(dim=-1).max() / vector.double().norm()) < STORED_LIMIT
    assert torch.equal(replaced["b"], (before.float() + vector).to(before.dtype))


def test_experts_stored_in_half_precision_can_be_planned_in_float32(tmp_path: Path) -> None:
    """Rounded beside different biases, the experts would gain different vectors."""
    before = random(4, WIDTH, seed=3, scale=30.0).to(torch.bfloat16)
    base = folder_with(tmp_path / "base", b=before)
    vector = random(WIDTH, seed=4)
    _, replaced = tensors_to_write(plan_of(written("b", "added", 0, (4, WIDTH), "F32", 1.0)), {0: vector}, base)
    assert replaced["b"].dtype == torch.float32
    assert torch.equal(replaced["b"], before.float() + vector)


@settings(deadline=None, max_examples=60)
@given(
    dtype=st.sampled_from(sorted(DTYPES)),
    bias=st.floats(0, 3),
    size=st.floats(1e-3, 100),
    factor=st.floats(0.05, 20),
    seed=st.integers(0, 1000),
)
def test_what_is_returned_always_holds_the_vector(
    tmp_path_factory: pytest.TempPathFactory, dtype: str, bias: float, size: float, factor: float, seed: int
) -> None:
    before = random(WIDTH, seed=seed, scale=bias).to(DTYPES[dtype])
    base = folder_with(tmp_path_factory.mktemp("base"), b=before)
    vector = random(WIDTH, seed=seed + 1, scale=size)
    plan = plan_of(written("b", "added", 0, (WIDTH,), dtype, factor))
    try:
        _, replaced = tensors_to_write(plan, {0: vector}, base)
    except CheckFailed as error:
        assert error.code == "half_precision"
        # Only where half a unit in the last place of the sum is large beside the vector.
        assert float(before.float().norm()) * torch.finfo(before.dtype).eps > STORED_LIMIT / 2 * float(
            (vector / factor).norm()
        )
        return
    gained = (replaced["b"].double() - before.double()) * factor
    assert float((gained - vector.double()).norm() / vector.double().norm()) <= STORED_LIMIT


# What half precision cannot hold


@pytest.mark.parametrize(("dtype", "bias"), [("BF16", 30.0), ("F16", 200.0)])
def test_a_vector_that_a_half_precision_bias_cannot_hold_is_refused(tmp_path: Path, dtype: str, bias: float) -> None:
    before = random(WIDTH, seed=3, scale=bias).to(DTYPES[dtype])
    base = folder_with(tmp_path / "base", b=before)
    plan = plan_of(written("b", "added", 7, (WIDTH,), dtype, 1.0))
    vector = random(WIDTH, seed=4, scale=0.5)
    with pytest.raises(CheckFailed) as caught:
        tensors_to_write(plan, {7: vector}, base)
    error = caught.value
    assert (error.code, error.exit_code) == ("half_precision", 1)
    problem = error.problems[0]
    rounded = (before.float() + vector).to(before.dtype)
    off = float((rounded.double() - before.double() - vector.double()).norm() / vector.double().norm())
    assert f"off by {off:.1%}" in problem.message and dtype in problem.message
    assert problem.where == "layer 7: b"
    assert f"{float(before.float().norm()):.3g}" in (problem.found or "")
    assert f"{float(vector.norm()):.3g}" in (problem.found or "")
    assert "float32" in (problem.remedy or "")


def test_one_expert_that_cannot_hold_it_is_enough(tmp_path: Path) -> None:
    before = random(4, WIDTH, seed=3, scale=0.1)
    before[2] *= 1000
    base = folder_with(tmp_path / "base", b=before.to(torch.bfloat16))
    with pytest.raises(CheckFailed) as caught:
        tensors_to_write(plan_of(written("b", "added", 0, (4, WIDTH), "BF16", 1.0)), {0: random(WIDTH, seed=4)}, base)
    assert caught.value.code == "half_precision"


def test_a_sum_beyond_the_largest_half_is_refused(tmp_path: Path) -> None:
    base = folder_with(tmp_path / "base", b=torch.zeros(WIDTH, dtype=torch.float16))
    with pytest.raises(CheckFailed) as caught:
        tensors_to_write(plan_of(written("b", "added", 0, (WIDTH,), "F16", 1.0)), {0: random(WIDTH, scale=1e5)}, base)
    assert caught.value.code == "half_precision"


def test_float32_holds_what_half_precision_could_not(tmp_path: Path) -> None:
    base = folder_with(tmp_path / "base", b=random(WIDTH, seed=3, scale=200.0))
    plan = plan_of(written("b", "added", 0, (WIDTH,), "F32", 1.0))
    _, replaced = tensors_to_write(plan, {0: random(WIDTH, seed=4, scale=0.5)}, base)
    assert replaced["b"].dtype == torch.float32


# Beside the copy


@pytest.mark.parametrize("remote", [False, True])
def test_what_is_kept_beside_a_copy_takes_the_vector_out_of_it_again(tmp_path: Path, remote: bool) -> None:
    """Of a copy that is made on the Hub as well: there the file with the other tensors is not here."""
    left, spread, bias = random(3, seed=1), random(WIDTH, seed=2), random(WIDTH, seed=3)
    base = folder_with(tmp_path / "base", other=random(2, 2)) if remote else folder_with(tmp_path / "base", b=bias)
    product = replace(written("m", "created", 0, (WIDTH, 3), "F32", 2.0), right=left, spread=spread)
    added = () if remote else (written("b", "added", 1, (WIDTH,), "F32", 1.0),)
    vectors = {layer: random(WIDTH, seed=4 + layer) for layer in range(1 + len(added))}
    write_steered(plan_of(product, *added), vectors, base, tmp_path / "copy", absent=["model.safetensors"] * remote)
    kept = load_file(tmp_path / "copy" / "steering.safetensors")
    wanted = {"v.layer.0": vectors[0], "right/m": left, "spread/m": spread}
    wanted |= {} if remote else {"v.layer.1": vectors[1], "original/b": bias}
    assert set(kept) == set(wanted) and all(torch.equal(kept[name], tensor) for name, tensor in wanted.items())
    made = CheckpointFolder(tmp_path / "copy", partial=True).tensors["m"]
    assert torch.equal(read_tensor(made), torch.outer((vectors[0] * spread).double().div(2).float(), left))


# Through a stock load: names without the prefix, tied blocks


def steered_by_hook(folder: Path, blocks: str, vectors: dict[int, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for layer, vector in vectors.items():

        def add(_module: Any, _inputs: Any, output: Any, vector: torch.Tensor = vector) -> Any:
            return output + vector if isinstance(output, torch.Tensor) else (output[0] + vector, *output[1:])

        model.get_submodule(f"{blocks}.{layer}").register_forward_hook(add)
    return logits(model, ids)


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits.float()


def assert_the_copy_is_steered(tmp_path: Path, base: Path, layers: list[int]) -> Plan:
    folder = CheckpointFolder(base)
    architecture = Architecture(read_config(base))
    plan = choose_route(architecture, layers, folder, prefer="free")
    vectors = {layer: random(architecture.hidden, seed=layer, scale=0.5) for layer in layers}
    copy = tmp_path / "copy"
    write_steered(plan, vectors, folder, copy)
    ids = torch.randint(3, architecture.config.vocab_size, (2, 13), generator=torch.Generator().manual_seed(1))
    with quiet_transformers():
        model, info = AutoModelForCausalLM.from_pretrained(copy, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    steered, hooked = logits(model.eval(), ids), steered_by_hook(base, plan.blocks, vectors, ids)
    effect = float((hooked - steered_by_hook(base, plan.blocks, {}, ids)).abs().max())
    assert effect > 0.05
    assert float((steered - hooked).abs().max()) < 1e-3 * effect
    return plan


@pytest.mark.parametrize(
    ("name", "prefix", "route"),
    [
        ("openai-community--gpt2", "transformer", "native"),
        ("bigscience--bloom-560m", "transformer", "native"),
        ("facebook--opt-125m", "model", "native"),
        ("meta-llama--Llama-3.2-1B", "model", "flag"),
        ("tiiuae--falcon-7b", "transformer", "flag"),
        ("ibm-granite--granite-3.3-2b-instruct", "model", "flag"),
    ],
)
def test_a_checkpoint_without_the_base_prefix_is_steered(tmp_path: Path, name: str, prefix: str, route: str) -> None:
    base = tmp_path / "base"
    tiny_checkpoint(base, name, tokenizer=False)
    file = base / "model.safetensors"
    renamed = {key.removeprefix(prefix + "."): tensor for key, tensor in load_file(file).items()}
    assert renamed.keys() != load_file(file).keys()
    save_file(renamed, file, {"format": "pt"})
    plan = assert_the_copy_is_steered(tmp_path, base, [1, 2])
    assert plan.route == route
    assert not any(tensor.name.startswith(prefix + ".") for tensor in plan.tensors)


def saved(folder: Path, config: Any, disturb: Callable[[torch.nn.Module], None] = lambda _model: None) -> None:
    torch.manual_seed(3)
    with quiet_transformers():
        model = causal_lm_from_config(config).float().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
        disturb(model)
        model.save_pretrained(folder)


@pytest.mark.parametrize("layers", [[1], [3], [6], [1, 2, 6, 7]])
def test_blocks_that_share_a_transformer_are_steered_one_by_one(tmp_path: Path, layers: list[int]) -> None:
    """Zamba2, with two shared transformers in four hybrid blocks."""
    skip_if_too_old("zamba2 with two shared transformers")
    kinds = ["mamba", "hybrid", "mamba", "hybrid", "mamba", "hybrid", "hybrid", "mamba"]
    with quiet_transformers():
        full = CONFIG_MAPPING["zamba2"](
            num_hidden_layers=8, layers_block_type=kinds, num_mem_blocks=2, vocab_size=VOCABULARY, hidden_size=64,
            num_attention_heads=4, intermediate_size=96, mamba_d_state=8, n_mamba_heads=8, adapter_rank=8,
            chunk_size=16,
        )  # fmt: skip
    saved(tmp_path / "base", full)
    plan = assert_the_copy_is_steered(tmp_path, tmp_path / "base", layers)
    assert plan.route == "flag"
    assert any("shared_transformer" in tensor.name for tensor in plan.tensors)


DENSE = {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}


@pytest.mark.slow_but("ernie4_5_moe-*", "internlm3-*", "openai-gpt-*", "opt-*", "jetmoe-*")
@pytest.mark.parametrize(
    ("model_type", "changes", "layers", "stored"),
    [
        # Biases in all layers, and one beside the output head, which is the embedding and is not stored.
        ("ernie4_5_moe", {}, [0, 1], "lm_head.bias"),
        # Stored under the names of their first release.
        ("nemotron_h", {}, [1, 3], "backbone.layers.3.mixer.down_proj.bias"),
        ("nemotron_h", {}, [0], "backbone.layers.0.mixer.out_proj.bias"),
        ("hy_v3", {}, [0, 2], "model.layers.2.mlp.shared_mlp.down_proj.bias"),
        # The class loads no config with one flag alone.
        ("internlm3", {}, [1], "model.layers.1.self_attn.o_proj.bias"),
        ("deepseek_v2", DENSE, [0, 2], "model.layers.2.mlp.shared_experts.down_proj.bias"),
        ("openai-gpt", {}, [1], "transformer.h.1.ln_2.bias"),  # post-norm, found without a row
        ("jetmoe", {}, [1], "model.layers.1.mlp.bias"),
        ("starcoder2", {"use_bias": False}, [2], "model.layers.2.mlp.c_proj.bias"),
        ("opt", {"enable_bias": False}, [2], "model.decoder.layers.2.fc2.bias"),
        ("falcon_mamba", {}, [1], "backbone.layers.1.mixer.out_proj.bias"),
        ("xlstm", {}, [1], "backbone.blocks.1.ffn.proj_down.bias"),
        ("blenderbot", {}, [1], "model.decoder.layers.1.fc2.bias"),
    ],
)
def test_other_kinds_of_slots_are_steered(
    tmp_path: Path, model_type: str, changes: dict[str, Any], layers: list[int], stored: str
) -> None:
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no `{model_type}`")
    with quiet_transformers():
        config, _ = shrink_config(CONFIG_MAPPING[model_type](**changes), 1)
    saved(tmp_path / "base", config)
    plan = assert_the_copy_is_steered(tmp_path, tmp_path / "base", layers)
    assert stored in {tensor.name for tensor in plan.tensors}
    planned_by_class = choose_route(Architecture(read_config(tmp_path / "base")), layers)
    assert {tensor.name for tensor in planned_by_class.tensors} == {tensor.name for tensor in plan.tensors}


def test_a_flag_that_the_config_spells_in_another_way_is_changed_in_both_spellings(tmp_path: Path) -> None:
    """InternLM3 was released with `bias` and `qkv_bias`."""
    if "internlm3" not in CONFIG_MAPPING:
        pytest.skip("this transformers has no `internlm3`")
    with quiet_transformers():
        config, _ = shrink_config(CONFIG_MAPPING["internlm3"](), 1)
    saved(tmp_path / "base", config)
    file = tmp_path / "base" / "config.json"
    values = json.loads(file.read_text())
    values["bias"], values["qkv_bias"] = values.pop("mlp_bias"), values.pop("attention_bias")
    file.write_text(json.dumps(values))
    plan = assert_the_copy_is_steered(tmp_path, tmp_path / "base", [1])
    assert dict(plan.config_changes) == {"mlp_bias": True, "attention_bias": True, "bias": True, "qkv_bias": True}
