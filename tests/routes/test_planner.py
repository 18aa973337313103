"""Which route is chosen, what it plans to write, and how an edit without a route is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.old_transformers import skip_if_too_old
from support.tiny_models import parsed_config, released_config, tiny_checkpoint
from transformers import CONFIG_MAPPING

from patcher.architectures.analysis import Architecture
from patcher.architectures.model_class import on_meta, quiet_transformers
from patcher.checkpoint.folder import CheckpointFolder
from patcher.checkpoint.prepare import read_config
from patcher.errors import InputError
from patcher.routes.plan import NotApplicable, Plan
from patcher.routes.planner import ROUTES, choose_route

LLAMA = "meta-llama--Llama-3.2-1B"
GPT2 = "openai-community--gpt2"
MLP = ("gate_proj", "up_proj", "down_proj")


@pytest.fixture
def architecture(tmp_path: Path) -> Callable[..., Architecture]:
    """The architecture of a released config at its real size, without weights."""

    def of(name: str, **changes: Any) -> Architecture:
        skip_if_too_old(name)
        return Architecture(parsed_config({**released_config(name), **changes}, tmp_path / "config"))

    return of


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[..., tuple[Architecture, CheckpointFolder, int]]:
    """A tiny checkpoint, its tensors renamed, with its architecture and a layer."""

    def make(
        name: str, rename: Callable[[str], str] = str, **options: Any
    ) -> tuple[Architecture, CheckpointFolder, int]:
        folder = tmp_path / "base"
        layer = tiny_checkpoint(folder, name, tokenizer=False, **options)
        file = folder / "model.safetensors"
        save_file({rename(key): tensor for key, tensor in load_file(file).items()}, file, {"format": "pt"})
        return Architecture(read_config(folder)), CheckpointFolder(folder), layer

    return make


def without(prefix: str) -> Callable[[str], str]:
    return lambda key: key.removeprefix(prefix + ".")


def refusal(*arguments: Any, **options: Any) -> InputError:
    with pytest.raises(InputError) as caught:
        choose_route(*arguments, **options)
    assert caught.value.exit_code == 2
    return caught.value


# The choice


@pytest.mark.parametrize(
    ("name", "route"),
    [
        (GPT2, "native"),
        ("facebook--opt-125m", "native"),
        ("bigscience--bloom-560m", "native"),
        ("microsoft--phi-2", "native"),
        ("bigcode--starcoder2-3b", "native"),
        ("openai--gpt-oss-20b", "native"),
        ("tiiuae--falcon-rw-1b", "native"),
        ("tiiuae--falcon-7b", "flag"),
        (LLAMA, "flag"),
        ("openbmb--MiniCPM3-4B", "flag"),
        ("ibm-granite--granite-3.3-2b-instruct", "flag"),
        ("nvidia--Nemotron-Mini-4B-Instruct", "flag"),
    ],
)
def test_a_bias_that_is_there_is_used_and_otherwise_a_flag(
    architecture: Callable[..., Architecture], name: str, route: str
) -> None:
    plan = choose_route(architecture(name), [1], prefer="free")
    assert (plan.route, plan.exact, plan.cost) == (route, True, "none")
    assert plan.as_json()["name"] == route
    assert bool(plan.config_changes) == (route == "flag")
    assert all(tensor.kind == ("added" if route == "native" else "created") for tensor in plan.tensors)


@pytest.mark.parametrize(("name", "changes"), [
    (LLAMA, {"mlp_bias": True}),
    ("tiiuae--falcon-7b", {"bias": True}),
    ("baidu--ERNIE-4.5-0.3B-PT", {"use_bias": True}),
])  # fmt: skip
def test_a_flag_that_is_set_already_makes_the_bias_native(
    architecture: Callable[..., Architecture], name: str, changes: dict[str, Any]
) -> None:
    assert choose_route(architecture(name, **changes), [1], prefer="free").route == "native"


def test_opt_without_biases_gets_them_by_its_flag(architecture: Callable[..., Architecture]) -> None:
    """Galactica."""
    plan = choose_route(architecture("facebook--opt-125m", enable_bias=False), [3])
    assert (plan.route, dict(plan.config_changes)) == ("flag", {"enable_bias": True})


def test_several_layers_are_one_plan(architecture: Callable[..., Architecture]) -> None:
    plan = choose_route(architecture(LLAMA), [9, 2, 15])
    assert list(plan.sites) == [9, 2, 15]
    assert {tensor.layer: tensor.parameter for tensor in plan.carriers} == {
        layer: f"model.layers.{layer}.mlp.down_proj.bias" for layer in (2, 9, 15)
    }
    plan = choose_route(architecture(GPT2), [0, 11])
    assert [tensor.layer for tensor in plan.tensors] == [0, 11]


def test_a_route_can_be_forced(architecture: Callable[..., Architecture]) -> None:
    assert choose_route(architecture(LLAMA), [1], route="flag").route == "flag"
    assert choose_route(architecture(GPT2), [1], route="native").route == "native"
    error = refusal(architecture(LLAMA), [1], route="native")
    assert error.code == "no_route"
    assert "native: layer 1" in str(error)
    assert "flag:" not in str(error), "what was not asked for is not reported"
    error = refusal(architecture(GPT2), [1], route="flag")
    assert "flag: layer 1" in str(error)
    assert "no config flag" in str(error)


def test_an_unknown_route_is_refused_with_the_known_ones(architecture: Callable[..., Architecture]) -> None:
    error = refusal(architecture(LLAMA), [1], route="teleport")
    assert "unknown route `teleport`" in str(error)
    assert error.problems[0].where == "route"
    for name in ("auto", *ROUTES):
        assert name in (error.problems[0].remedy or "")


def test_layers_that_need_different_flags_are_refused() -> None:
    """Nemotron-H: the state-space blocks have one flag, the MLP blocks another."""
    with quiet_transformers():
        config = CONFIG_MAPPING["nemotron_h"]()
    architecture = Architecture(config)
    assert choose_route(architecture, [0]).config_changes == {"use_bias": True}
    assert choose_route(architecture, [3]).config_changes == {"mlp_bias": True}
    assert "the layers need different flags" in str(refusal(architecture, [0, 3], route="flag"))
    assert "layer 2" in str(refusal(architecture, [0, 2], route="flag")), "an attention block, which has no MLP"


# Targets


def test_auto_demands_transformers_only(architecture: Callable[..., Architecture]) -> None:
    plan = choose_route(architecture("EleutherAI--gpt-neo-125m"), [1])
    assert plan.stacks == {"transformers": "native", "vllm": "no", "llama.cpp": "no"}


@pytest.mark.parametrize(
    ("name", "targets", "unread"),
    [
        ("EleutherAI--gpt-neo-125m", ["llama.cpp"], "llama.cpp"),
        ("HuggingFaceTB--SmolLM3-3B", ["llama.cpp"], "llama.cpp"),
        ("openbmb--MiniCPM3-4B", ["transformers", "llama.cpp"], "llama.cpp"),
    ],
)
def test_a_target_that_does_not_read_the_route_is_named(
    architecture: Callable[..., Architecture], name: str, targets: list[str], unread: str
) -> None:
    found = architecture(name)
    route = "native" if "gpt-neo" in name else "flag"
    error = refusal(found, [1], targets=targets, route=route)
    assert error.code == "no_route"
    assert f"{unread} does not read it for {found.class_name}" in str(error)
    assert f"take {unread} out of `targets`" in str(error)


@pytest.mark.parametrize("targets", [["transformers"], ["vllm"], ["transformers", "vllm", "llama.cpp"]])
def test_targets_that_read_the_route_natively(architecture: Callable[..., Architecture], targets: list[str]) -> None:
    plan = choose_route(architecture(LLAMA), [1], targets=targets)
    assert plan.route == "flag"
    assert "backend" not in plan.reason


def test_a_target_that_reads_it_through_its_backend_is_told(architecture: Callable[..., Architecture]) -> None:
    plan = choose_route(architecture("arcee-ai--AFM-4.5B"), [1], targets=["transformers", "vllm"], prefer="free")
    assert plan.stacks["vllm"] == "backend"
    assert "vLLM reads it through its Transformers backend" in plan.reason


def test_a_class_without_a_row_is_known_to_be_read_by_transformers_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Next month's architecture."""
    from patcher.architectures import analysis

    monkeypatch.setattr(analysis, "rows", dict)
    with quiet_transformers():
        config = CONFIG_MAPPING["openai-gpt"]()
    architecture = Architecture(config)
    assert architecture.row is None
    plan = choose_route(architecture, [1], prefer="free")
    assert (plan.route, plan.stacks["vllm"], plan.stacks["llama.cpp"]) == ("native", "no", "no")
    assert "Transformers backend cannot run it" in str(refusal(architecture, [1], targets=["vllm"], route="native"))


# The order


def routes_of(architecture: Architecture, **options: Any) -> str:
    return choose_route(architecture, [2], **options).route


@pytest.mark.slow
def test_what_is_preferred_decides_between_exact_routes(architecture: Callable[..., Architecture]) -> None:
    qwen = architecture("Qwen--Qwen3-8B")
    plan = choose_route(qwen, [2])
    assert (plan.route, plan.stacks) == ("carrier", {"transformers": "native", "vllm": "native", "llama.cpp": "native"})
    assert any("`prefer: free` takes the `relabel` route" in note for note in plan.advice)
    assert any("llama.cpp would not read" in note for note in plan.advice)
    assert not any("prefer" in warning for warning in plan.warnings), "no user of the copy can choose any more"
    free = choose_route(qwen, [2], prefer="free")
    assert (free.route, free.architecture, free.cost) == ("relabel", "HYV3ForCausalLM", "none")
    assert routes_of(qwen, prefer="same_model_type") == "carrier"
    assert routes_of(qwen, targets=["transformers", "llama.cpp"], prefer="free") == "carrier"


@pytest.mark.slow
def test_a_fitted_route_is_never_chosen_before_an_exact_one(architecture: Callable[..., Architecture]) -> None:
    assert routes_of(architecture("Qwen--Qwen3-8B"), exact=False) == "carrier"


def test_only_the_fitted_route_is_left(architecture: Callable[..., Architecture]) -> None:
    qwen = architecture("Qwen--Qwen3-8B")
    error = refusal(qwen, [2], route="rank_one")
    assert error.code == "exact"
    assert "`exact: false`" in (error.problems[0].remedy or "")
    assert routes_of(qwen, route="rank_one", exact=False) == "rank_one"


def test_a_route_that_cannot_win_is_not_planned(
    architecture: Callable[..., Architecture], monkeypatch: pytest.MonkeyPatch
) -> None:
    from patcher.routes import planner

    def never(*_arguments: Any) -> Plan:
        raise AssertionError("planned")

    dear = {name: replace(route, plan=never) for name, route in ROUTES.items() if name not in ("native", "flag")}
    monkeypatch.setattr(planner, "ROUTES", {**ROUTES, **dear})
    assert routes_of(architecture(LLAMA)) == "flag"


# Refusals


def test_before_block_0_is_the_embedding_s_alone(architecture: Callable[..., Architecture]) -> None:
    for name in (GPT2, LLAMA):
        assert choose_route(architecture(name), [-1]).route == "embedding"
    for route in ROUTES.keys() - {"embedding", "relabel"}:
        assert "embedding" in str(refusal(architecture(LLAMA), [-1], route=route, exact=False))
    assert "a recipe of its own" in str(refusal(architecture(LLAMA), [-1, 3]))


@pytest.mark.parametrize(
    ("name", "layer", "native", "flag"),
    [
        ("Qwen--Qwen3-8B", 14, "creates no bias after this block's MLP", "no config flag that creates an MLP"),
        ("Qwen--Qwen2.5-0.5B", 3, "creates no bias after this block's MLP", "no config flag"),
        ("mistralai--Mistral-7B-Instruct-v0.3", 12, "creates no bias", "no config flag"),
        ("google--gemma-3-1b-it", 5, "creates no bias", "no config flag"),
        ("allenai--OLMo-2-0425-1B", 6, "creates no bias", "no config flag"),
        (
            "naver-hyperclovax--HyperCLOVAX-SEED-Think-14B",
            6,
            "creates no bias",
            "`mlp_bias`: `mlp.down_proj.bias` is no",
        ),
    ],
)
def test_an_architecture_without_the_slot_has_no_native_and_no_flag_route(
    architecture: Callable[..., Architecture], name: str, layer: int, native: str, flag: str
) -> None:
    found = architecture(name)
    for route, told in (("native", native), ("flag", flag)):
        error = refusal(found, [layer], route=route)
        assert error.code == "no_route"
        problem = error.problems[0]
        assert found.class_name in problem.message and found.model_type in problem.message
        assert problem.where == f"layers {layer}"
        assert (problem.found or "").startswith(f"{route}: layer {layer}: ") and told in (problem.found or "")
        assert "inspect --all" in (problem.remedy or "")
        assert error.as_json()["error"]["code"] == "no_route"


def test_every_route_says_not_applicable_in_words(architecture: Callable[..., Architecture]) -> None:
    """Where blocks share their weights there is no place for one of them."""
    for name, route in ROUTES.items():
        if name not in ("relabel", "carrier", "rank_one"):
            with pytest.raises(NotApplicable, match=r".{20,}"):
                route.plan(architecture("Qwen--Qwen3-8B"), [2], None)


# What is planned


def created_by(architecture: Architecture, plan: Plan) -> dict[str, tuple[int, ...]]:
    """The class's own difference: parameters under the plan's config that are not there without it."""
    before = {name for name, _ in on_meta(architecture.config).named_parameters()}
    after = on_meta(architecture.config, plan.config_changes).named_parameters()
    return {name: tuple(parameter.shape) for name, parameter in after if name not in before}


@pytest.mark.parametrize(
    ("name", "changes", "per_layer"),
    [
        (LLAMA, {"mlp_bias": True}, 3),
        ("tiiuae--falcon-7b", {"bias": True}, 4),
        ("tiiuae--falcon-40b", {"bias": True}, 4),
        ("baidu--ERNIE-4.5-0.3B-PT", {"use_bias": True, "mlp_bias": True}, 7),
        ("nvidia--Nemotron-Mini-4B-Instruct", {"mlp_bias": True}, 2),
        ("arcee-ai--AFM-4.5B", {"mlp_bias": True}, 2),
        ("ibm-granite--granite-3.3-2b-instruct", {"mlp_bias": True}, 3),
        ("tiiuae--Falcon-H1-0.5B-Instruct", {"mlp_bias": True}, 3),
        ("ByteDance-Seed--Seed-OSS-36B-Instruct", {"mlp_bias": True}, 3),
    ],
)
def test_everything_that_the_flags_create_is_in_the_plan(
    architecture: Callable[..., Architecture], name: str, changes: dict[str, Any], per_layer: int
) -> None:
    found = architecture(name)
    plan = choose_route(found, [2], route="flag")
    assert dict(plan.config_changes) == changes
    expected = created_by(found, plan)
    assert len(expected) == per_layer * found.block_count
    assert {tensor.parameter: tensor.shape for tensor in plan.tensors} == expected
    assert len({tensor.name for tensor in plan.tensors}) == len(plan.tensors)
    (carrier,) = plan.carriers
    assert (carrier.layer, carrier.shape) == (2, (found.hidden,))
    assert carrier.parameter.startswith(f"{plan.blocks}.2.")
    zeros = plan.as_json()["zeros"]
    assert zeros["count"] == len(plan.tensors) - 1 == len(zeros["names"])


def test_a_native_plan_touches_one_tensor_a_layer_and_no_config(
    checkpoint: Callable[..., tuple[Architecture, CheckpointFolder, int]],
) -> None:
    architecture, folder, layer = checkpoint(GPT2, dtype=torch.float16)
    plan = choose_route(architecture, [layer], folder)
    (write,) = plan.tensors
    assert (write.kind, write.dtype, write.factor, write.layer) == ("added", "F16", 1.0, layer)
    assert write.name in folder.tensors
    assert plan.as_json()["zeros"] == {"count": 0, "names": []}


def test_the_experts_of_gpt_oss_are_one_tensor(
    checkpoint: Callable[..., tuple[Architecture, CheckpointFolder, int]],
) -> None:
    architecture, folder, layer = checkpoint("openai--gpt-oss-20b", quantization_config=None, dtype=torch.bfloat16)
    (write,) = choose_route(architecture, [layer], folder).tensors
    assert write.shape == folder.tensors[write.name].shape
    assert len(write.shape) == 2
    assert folder.tensors[write.name].dtype == "BF16"
    assert write.dtype == "F32", "rounded beside their biases, the experts would gain different vectors"


def test_a_scaled_class_states_its_factor(architecture: Callable[..., Architecture]) -> None:
    found = architecture("ibm-granite--granite-3.3-2b-instruct", residual_multiplier=0.22)
    (carrier,) = choose_route(found, [4]).carriers
    assert carrier.factor == 0.22


# Names on disk


@pytest.mark.parametrize(
    ("name", "prefix", "stored"),
    [
        (GPT2, "transformer", "h.{}.mlp.c_proj.bias"),
        ("bigscience--bloom-560m", "transformer", "h.{}.mlp.dense_4h_to_h.bias"),
        ("facebook--opt-125m", "model", "decoder.layers.{}.fc2.bias"),
    ],
)
def test_native_without_the_prefix_of_the_base_model(
    checkpoint: Callable[..., tuple[Architecture, CheckpointFolder, int]], name: str, prefix: str, stored: str
) -> None:
    architecture, folder, layer = checkpoint(name, without(prefix))
    (write,) = choose_route(architecture, [layer], folder).tensors
    assert write.name == stored.format(layer)
    assert write.name in folder.tensors
    assert write.parameter == f"{prefix}.{write.name}"


@pytest.mark.parametrize(
    ("name", "prefix", "changes"),
    [
        (LLAMA, "model", {}),
        ("tiiuae--falcon-7b", "transformer", {}),
        ("facebook--opt-125m", "model", {"enable_bias": False}),
        ("bigcode--starcoder2-3b", "model", {"use_bias": False}),
    ],
)
@pytest.mark.parametrize("prefixed", [True, False])
def test_a_new_bias_is_named_in_the_style_of_its_neighbours(
    checkpoint: Callable[..., tuple[Architecture, CheckpointFolder, int]],
    name: str,
    prefix: str,
    changes: dict[str, Any],
    prefixed: bool,
) -> None:
    architecture, folder, layer = checkpoint(name, str if prefixed else without(prefix), **changes)
    plan = choose_route(architecture, [layer], folder, route="flag")
    for write in plan.tensors:
        assert write.name not in folder.tensors
        assert write.name.removesuffix("bias") + "weight" in folder.tensors
        assert write.name == (write.parameter if prefixed else write.parameter.removeprefix(prefix + "."))


def test_a_prefix_that_the_class_does_not_have_is_kept(
    checkpoint: Callable[..., tuple[Architecture, CheckpointFolder, int]],
) -> None:
    """A checkpoint of a wrapper around the class: transformers strips nothing here, so nothing is guessed."""
    architecture, folder, layer = checkpoint(GPT2, lambda key: f"wrapped.{key}")
    error = refusal(architecture, [layer], folder)
    assert "the checkpoint does not store `transformer.h" in str(error)


def test_a_checkpoint_with_foreign_names_is_refused(
    checkpoint: Callable[..., tuple[Architecture, CheckpointFolder, int]],
) -> None:
    """Meta's original names: no place for a new tensor can be known."""
    architecture, folder, layer = checkpoint(LLAMA, lambda key: key.replace("mlp.down_proj", "feed_forward.w2"))
    error = refusal(architecture, [layer], folder)
    assert "stores no tensor of `model.layers.0.mlp.down_proj`" in str(error)


def test_a_bias_that_the_class_has_and_the_file_has_not_is_no_native_route(
    checkpoint: Callable[..., tuple[Architecture, CheckpointFolder, int]],
) -> None:
    architecture, folder, layer = checkpoint(GPT2)
    file = folder.path / "model.safetensors"
    kept = {key: tensor for key, tensor in load_file(file).items() if not key.endswith(f"h.{layer}.mlp.c_proj.bias")}
    save_file(kept, file, {"format": "pt"})
    error = refusal(architecture, [layer], CheckpointFolder(folder.path))
    assert "the checkpoint does not store" in str(error)


@pytest.mark.parametrize("change", [lambda tensor: tensor.to(torch.float8_e4m3fn), lambda tensor: tensor[:-1]])
def test_a_bias_of_another_dtype_or_shape_is_no_native_route(
    checkpoint: Callable[..., tuple[Architecture, CheckpointFolder, int]],
    change: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    architecture, folder, layer = checkpoint(GPT2)
    file = folder.path / "model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if key.endswith(f"h.{layer}.mlp.c_proj.bias"))
    save_file({**tensors, key: change(tensors[key]).contiguous()}, file, {"format": "pt"})
    assert "is stored as" in str(refusal(architecture, [layer], CheckpointFolder(folder.path)))


# Dtypes


@pytest.mark.parametrize(
    ("dtype", "stored"), [(torch.bfloat16, "BF16"), (torch.float16, "F16"), (torch.float32, "F32")]
)
def test_zeros_have_the_dtype_of_their_neighbours_and_the_vector_is_float32(
    checkpoint: Callable[..., tuple[Architecture, CheckpointFolder, int]], dtype: torch.dtype, stored: str
) -> None:
    architecture, folder, layer = checkpoint(LLAMA, dtype=dtype)
    plan = choose_route(architecture, [layer], folder)
    assert {tensor.dtype for tensor in plan.tensors if tensor.layer is None} == {stored}
    assert [tensor.dtype for tensor in plan.carriers] == ["F32"]


def test_zeros_beside_a_quantised_weight_are_float32(
    checkpoint: Callable[..., tuple[Architecture, CheckpointFolder, int]],
) -> None:
    architecture, folder, layer = checkpoint(LLAMA, dtype=torch.bfloat16)
    file = folder.path / "model.safetensors"
    tensors = load_file(file)
    key = "model.layers.0.mlp.up_proj.weight"
    save_file({**tensors, key: tensors[key].to(torch.float8_e4m3fn)}, file, {"format": "pt"})
    plan = choose_route(architecture, [layer], CheckpointFolder(folder.path))
    dtypes = {tensor.name: tensor.dtype for tensor in plan.tensors}
    assert dtypes["model.layers.0.mlp.up_proj.bias"] == "F32"
    assert dtypes["model.layers.0.mlp.gate_proj.bias"] == "BF16"


def test_without_a_checkpoint_the_class_names_are_planned(architecture: Callable[..., Architecture]) -> None:
    """A dry run of a Hub model has no weight files."""
    plan = choose_route(architecture(LLAMA), [3])
    assert {tensor.name for tensor in plan.tensors} == {
        f"model.layers.{layer}.mlp.{part}.bias" for layer in range(16) for part in MLP
    }
    assert all(tensor.name == tensor.parameter and tensor.dtype == "F32" for tensor in plan.tensors)


# Tied blocks


def test_blocks_that_share_weights_get_one_zero_for_all(tmp_path: Path) -> None:
    """Zamba2 stores its shared transformer once; a zero for each of its places would have no neighbour."""
    with quiet_transformers():
        config = CONFIG_MAPPING["zamba2"]()
    architecture = Architecture(config)
    plan = choose_route(architecture, [3, 12])
    assert plan.sites[12] == "model.layers.12.mamba_decoder.mamba.out_proj"
    assert {tensor.parameter: tensor.shape for tensor in plan.tensors} == created_by(architecture, plan)
    shared = [tensor.name for tensor in plan.tensors if "shared_transformer" in tensor.name]
    assert shared and all(name.startswith("model.layers.6.") for name in shared)


# The plan as JSON


def test_the_plan_can_be_written_as_json(architecture: Callable[..., Architecture]) -> None:
    plan = choose_route(architecture("baidu--ERNIE-4.5-0.3B-PT"), [1, 4], route="flag")
    value = json.loads(json.dumps(plan.as_json()))
    assert value["config_changes"] == {"use_bias": True, "mlp_bias": True}
    assert [tensor["layer"] for tensor in value["tensors"]] == [1, 4]
    assert value["stacks"]["transformers"] == "native"
    assert replace(plan, reason="x").as_json()["reason"] == "x"
