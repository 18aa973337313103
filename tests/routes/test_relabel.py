"""The relabel route: what it plans, and that stock transformers reads the copy as the hooked base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.default_configs import default_config
from support.tiny_models import VOCABULARY, randomise, tiny_checkpoint
from support.writing import write_steered
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer

from patcher.architectures.analysis import Architecture
from patcher.architectures.model_class import quiet_transformers
from patcher.architectures.shrink import shrink_config
from patcher.checkpoint.folder import CheckpointFolder
from patcher.checkpoint.prepare import read_config
from patcher.routes.plan import NotApplicable, Plan
from patcher.routes.relabel import route as relabel
from patcher.routes.relabel.config import config_class
from patcher.routes.relabel.tokenizer import tokenizer_changes

MISTRAL = "mistralai--Mistral-7B-Instruct-v0.3"
QWEN2 = "Qwen--Qwen2.5-0.5B"
QWEN3 = "Qwen--Qwen3-8B"
PARTIAL_LONG: dict[str, Any] = {
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.75,
        "short_factor": [1.0 + index / 10 for index in range(36)],
        "long_factor": [1.0 + index for index in range(36)],
        "original_max_position_embeddings": 4096,
    },
    "max_position_embeddings": 131072,
    "original_max_position_embeddings": 4096,
}
GRANITE_DENSE: dict[str, Any] = {
    "num_local_experts": 0, "layer_types": ["attention"] * 32, "position_embedding_type": "rope",
    "residual_multiplier": 0.22, "embedding_multiplier": 12.0, "logits_scaling": 2.0, "attention_multiplier": 0.25,
}  # fmt: skip
DEFAULTS: dict[str, tuple[str, dict[str, Any], str]] = {
    "mistral, window": ("mistral", {}, "GraniteSWAForCausalLM"),
    "ministral": ("ministral", {}, "GraniteSWAForCausalLM"),
    "qwen2, mixed windows": ("qwen2", {"use_sliding_window": True, "max_window_layers": 16}, "GraniteSWAForCausalLM"),
    "phi3": ("phi3", {}, "LlamaForCausalLM"),
    "phi3, partial longrope": ("phi3", PARTIAL_LONG, "LlamaForCausalLM"),
    "glm": ("glm", {}, "LlamaForCausalLM"),
    "seed_oss": ("seed_oss", {}, "LlamaForCausalLM"),
    "ernie4_5": ("ernie4_5", {}, "LlamaForCausalLM"),
    "helium": ("helium", {}, "LlamaForCausalLM"),
    "exaone": ("exaone", {}, "LlamaForCausalLM"),
    "smollm3": ("smollm3", {}, "GraniteSWAForCausalLM"),
    "gemma": ("gemma", {}, "GraniteForCausalLM"),
    "granitemoehybrid, dense": ("granitemoehybrid", GRANITE_DENSE, "GraniteForCausalLM"),
    "olmo": ("olmo", {}, "LlamaForCausalLM"),
    "olmo, tied": ("olmo", {"tie_word_embeddings": True}, "LlamaForCausalLM"),
    "youtu": ("youtu", {}, "DeepseekV2ForCausalLM"),
    "mixtral": ("mixtral", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, "AriaTextForCausalLM"),
    "granitemoe, multipliers": (
        "granitemoe",
        {"residual_multiplier": 0.25, "embedding_multiplier": 16.0, "logits_scaling": 8.0, "attention_multiplier": 0.5},
        "AriaTextForCausalLM",
    ),
    "glm4_moe": ("glm4_moe", {"use_qk_norm": True}, "HYV3ForCausalLM"),
    "gpt_neox_japanese": ("gpt_neox_japanese", {}, "GPTNeoXForCausalLM"),
}


def default_model(folder: Path, model_type: str, changes: dict[str, Any], dtype: torch.dtype, *, sharded: bool) -> int:
    if config_class(model_type) is None:
        pytest.skip(f"this transformers has no {model_type}")
    with quiet_transformers():
        config = CONFIG_MAPPING[model_type](**changes) if changes else default_config(model_type)
        tiny, layer = shrink_config(config, 2)
        tiny.vocab_size = VOCABULARY
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(tiny).float().eval()
        randomise(model, 0)
        model.to(dtype).save_pretrained(folder, max_shard_size="150KB" if sharded else "5GB")
    return layer


def planned(folder: Path, layers: list[int]) -> Plan:
    return relabel.plan(Architecture(read_config(folder)), layers, CheckpointFolder(folder))


def written(base: Path, plan: Plan, vectors: dict[int, torch.Tensor]) -> Path:
    copy = base.parent / "copy"
    write_steered(plan, vectors, CheckpointFolder(base), copy)
    return copy


def log_probs(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return torch.log_softmax(model(input_ids=ids, use_cache=False).logits.float(), -1)


def compared(base: Path, layers: list[int], dtype: torch.dtype = torch.float32) -> tuple[Plan, float, float, Path]:
    """The plan, max |Δ log-prob| of the stock-loaded copy against the hooked base, the effect, and the copy."""
    plan = planned(base, layers)
    generator = torch.Generator().manual_seed(1)
    hidden = read_config(base).hidden_size
    vectors = {layer: torch.randn(hidden, generator=generator) for layer in layers}
    copy = written(base, plan, vectors)
    with quiet_transformers():
        candidate, info = AutoModelForCausalLM.from_pretrained(copy, dtype=dtype, output_loading_info=True)
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=dtype).eval()
    assert not any(info.values()), info
    assert type(candidate).__name__ == plan.architecture
    ids = torch.randint(3, VOCABULARY, (2, 48), generator=generator)
    unsteered = log_probs(plain, ids)
    for layer, vector in vectors.items():

        def add(_module: Any, _inputs: Any, output: Any, vector: torch.Tensor = vector) -> Any:
            vector = vector.to(dtype)
            return output + vector if isinstance(output, torch.Tensor) else (output[0] + vector, *output[1:])

        plain.get_submodule(f"{plan.blocks}.{layer}").register_forward_hook(add)
    hooked = log_probs(plain, ids)
    apart = float((log_probs(candidate.eval(), ids) - hooked).abs().max())
    return plan, apart, float((hooked - unsteered).abs().max()), copy


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize(
    ("name", "target"), [(MISTRAL, "LlamaForCausalLM"), (QWEN2, "LlamaForCausalLM"), (QWEN3, "HYV3ForCausalLM")]
)
def test_released_configs_are_read_as_the_hooked_base(tmp_path: Path, name: str, target: str, sharded: bool) -> None:
    base = tmp_path / "base"
    layer = tiny_checkpoint(base, name, sharded=sharded, tokenizer=False)
    plan, apart, effect, copy = compared(base, [layer])
    assert plan.architecture == target
    assert apart <= 2e-5
    assert effect > 0.1
    config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == plan.config["model_type"]  # type: ignore[index]
    assert "auto_map" not in config


@pytest.mark.slow_but("stored0-*")
@pytest.mark.parametrize("name", DEFAULTS)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_default_configs_are_read_as_the_hooked_base(tmp_path: Path, name: str, stored: torch.dtype) -> None:
    model_type, changes, target = DEFAULTS[name]
    base = tmp_path / "base"
    layer = default_model(base, model_type, changes, stored, sharded=stored == torch.bfloat16)
    plan, apart, effect, _ = compared(base, [layer])
    assert plan.architecture == target
    assert apart <= 2e-5
    assert effect > 0.1


def test_a_bias_that_the_class_has_itself_is_added_to(tmp_path: Path) -> None:
    """X-MOD's last norm of a block is also its adapter's first; a switch gives the adapter a norm of its own."""
    layer = default_model(tmp_path / "base", "xmod", {}, torch.float32, sharded=False)
    plan, apart, effect, _ = compared(tmp_path / "base", [layer])
    assert [(write.kind, write.parameter.rpartition("output.")[2]) for write in plan.carriers] == [
        ("added", "LayerNorm.bias")
    ]
    assert apart <= 2e-5
    assert effect > 0.1


@pytest.mark.parametrize("name", ["mixtral", "glm4_moe"])
def test_experts_that_are_stored_one_by_one_are_read_in_their_order(tmp_path: Path, name: str) -> None:
    layer = default_model(tmp_path / "base", name, DEFAULTS[name][1], torch.float32, sharded=False)
    stored = load_file(tmp_path / "base" / "model.safetensors")
    one_by_one = [key for key in stored if ".experts.1." in key]
    plan = planned(tmp_path / "base", [layer])
    assert one_by_one
    if name == "mixtral":
        assert set(one_by_one) <= plan.dropped
        assert any("turned round" in write.holds for write in plan.tensors)
    else:
        assert not set(one_by_one) & (plan.dropped | set(plan.renamed)), "both classes store them under these names"


@pytest.mark.slow_but("olmo", "phi3")
@pytest.mark.parametrize("name", ["phi3", "glm", "gemma", "olmo"])
def test_in_half_precision_the_copy_differs_by_rounding(tmp_path: Path, name: str) -> None:
    model_type, changes, _ = DEFAULTS[name]
    layer = default_model(tmp_path / "base", model_type, changes, torch.bfloat16, sharded=False)
    _, apart, effect, _ = compared(tmp_path / "base", [layer], torch.bfloat16)
    assert apart <= 0.05 * effect


def test_several_layers_are_one_plan(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "base", QWEN2, tokenizer=False)
    plan, apart, _, _ = compared(tmp_path / "base", [0, 2])
    assert apart <= 2e-5
    assert [write.layer for write in plan.carriers] == [0, 2]


def test_what_qwen2_s_plan_holds(tmp_path: Path) -> None:
    base = tmp_path / "base"
    layer = tiny_checkpoint(base, QWEN2, dtype=torch.bfloat16, tokenizer=False)
    plan = planned(base, [layer])
    assert plan.exact
    assert plan.free
    assert plan.stacks == {"transformers": "native", "vllm": "native", "llama.cpp": "native"}
    assert plan.config is not None
    assert plan.config["architectures"] == ["LlamaForCausalLM"]
    assert plan.config["attention_bias"] is True
    assert plan.config["torch_dtype"] == "bfloat16"
    assert not plan.dropped
    assert not plan.renamed
    assert plan.sites == {layer: f"model.layers.{layer}.mlp.down_proj"}
    (carrier,) = plan.carriers
    assert (carrier.dtype, carrier.factor, carrier.layer) == ("F32", 1.0, layer)
    zeros = {write.name: write.dtype for write in plan.tensors if write.layer is None}
    blocks = plan.config["num_hidden_layers"]
    wanted = {
        f"model.layers.{block}.{module}.bias"
        for block in range(blocks)
        for module in ("self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    }
    assert zeros.keys() == wanted - {carrier.name}
    assert set(zeros.values()) == {"BF16"}
    assert "checked equal on a tiny stand-in" in plan.reason


def test_only_what_would_be_rounded_is_widened(tmp_path: Path) -> None:
    layer = default_model(tmp_path / "base", "gemma", {}, torch.bfloat16, sharded=False)
    plan = planned(tmp_path / "base", [layer])
    wide = {write.name for write in plan.tensors if write.dtype == "F32"} - {plan.carriers[0].name}
    assert wide == plan.dropped
    assert all("norm" in name for name in wide)
    assert any("half precision" in warning for warning in plan.warnings)
    norms = load_file(tmp_path / "base" / "model.safetensors")
    copy = written(tmp_path / "base", plan, {layer: torch.ones(64)})
    index = json.loads((copy / "model.safetensors.index.json").read_text(encoding="utf-8"))["weight_map"]
    name = "model.layers.0.input_layernorm.weight"
    assert torch.equal(load_file(copy / index[name])[name], norms[name].float() + 1)


def test_split_tensors_are_slices_of_the_fused_ones(tmp_path: Path) -> None:
    layer = default_model(tmp_path / "base", "phi3", {}, torch.bfloat16, sharded=False)
    plan = planned(tmp_path / "base", [layer])
    fused = {name for name in plan.dropped if "qkv_proj" in name or "gate_up_proj" in name}
    assert plan.dropped == fused
    before = load_file(tmp_path / "base" / "model.safetensors")
    copy = written(tmp_path / "base", plan, {layer: torch.ones(64)})
    after = {key: value for file in copy.glob("*.safetensors") for key, value in load_file(file).items()}
    for block in range(plan.config["num_hidden_layers"]):  # type: ignore[index]
        attention = [after[f"model.layers.{block}.self_attn.{part}_proj.weight"] for part in "qkv"]
        assert torch.equal(torch.cat(attention), before[f"model.layers.{block}.self_attn.qkv_proj.weight"])
        mlp = [after[f"model.layers.{block}.mlp.{part}_proj.weight"] for part in ("gate", "up")]
        assert torch.equal(torch.cat(mlp), before[f"model.layers.{block}.mlp.gate_up_proj.weight"])
    derived = plan.as_json()["derived"]
    assert derived["model.layers.0.self_attn.k_proj.weight"] == (
        "`model.layers.0.self_attn.qkv_proj.weight`, its rows of k"
    )


def test_a_checkpoint_of_the_bare_model_gets_full_names(tmp_path: Path) -> None:
    base = tmp_path / "base"
    layer = tiny_checkpoint(base, MISTRAL, tokenizer=False, tie_word_embeddings=True)
    file = base / "model.safetensors"
    tensors = {name.removeprefix("model."): tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    plan, apart, _, _ = compared(base, [layer])
    assert apart <= 2e-5
    assert plan.renamed["embed_tokens.weight"] == "model.embed_tokens.weight"


def test_stored_tensors_that_no_class_reads_do_not_travel(tmp_path: Path) -> None:
    base = tmp_path / "base"
    layer = tiny_checkpoint(base, MISTRAL, tokenizer=False)
    file = base / "model.safetensors"
    odd = "model.layers.0.self_attn.rotary_emb.inv_freq"
    save_file({**load_file(file), odd: torch.ones(8)}, file, {"format": "pt"})
    assert planned(base, [layer]).dropped == {odd}


def test_tied_embeddings_that_are_stored_twice(tmp_path: Path) -> None:
    for name, kept in (("mistral", True), ("olmo", False)):
        base = tmp_path / name / "base"
        changes = {"tie_word_embeddings": True, **({"sliding_window": None} if name == "mistral" else {})}
        layer = default_model(base, name, changes, torch.float32, sharded=False)
        file = base / "model.safetensors"
        tensors = load_file(file)
        save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file, {"format": "pt"})
        plan, apart, _, _ = compared(base, [layer])
        assert apart <= 2e-5
        assert ("lm_head.weight" not in plan.dropped) is kept


def test_without_a_checkpoint_the_classes_own_names_are_planned() -> None:
    with quiet_transformers():
        architecture = Architecture(CONFIG_MAPPING["phi3"]())
    plan = relabel.plan(architecture, [13], None)
    assert "model.layers.31.self_attn.qkv_proj.weight" in plan.dropped
    assert plan.carriers[0].name == "model.layers.13.mlp.down_proj.bias"


@pytest.mark.slow
def test_vllm_is_led_past_its_own_class_where_that_would_drop_the_bias() -> None:
    with quiet_transformers():
        architectures = {name: Architecture(CONFIG_MAPPING[name]()) for name in ("qwen3", "qwen2", "gemma")}
    plans = {name: relabel.plan(architecture, [3], None) for name, architecture in architectures.items()}
    stated = {name: plan.config["architectures"] for name, plan in plans.items()}  # type: ignore[index]
    assert stated["qwen2"] == ["LlamaForCausalLM"]
    assert stated["qwen3"] == stated["gemma"] == ["TransformersForCausalLM"]
    assert plans["qwen3"].stacks["vllm"] == "backend"
    assert plans["qwen3"].stacks["llama.cpp"] == "no"


def test_a_checkpoint_with_its_own_code_is_refused(tmp_path: Path) -> None:
    base = tmp_path / "base"
    layer = tiny_checkpoint(base, MISTRAL, tokenizer=False)
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    (base / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModelForCausalLM": "m.M"}}))
    architecture = Architecture(read_config(base))
    architecture.trust_remote_code = True
    with pytest.raises(NotApplicable, match="own code"):
        relabel.plan(architecture, [layer], CheckpointFolder(base))


def test_a_checkpoint_that_lacks_a_tensor_is_refused(tmp_path: Path) -> None:
    base = tmp_path / "base"
    layer = tiny_checkpoint(base, MISTRAL, tokenizer=False)
    file = base / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.0.self_attn.q_proj.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(NotApplicable, match=r"does not store `model\.layers\.0\.self_attn\.q_proj\.weight`"):
        planned(base, [layer])


def sentencepiece_like(folder: Path, model_type: str, tokenizer_class: str | None) -> None:
    """tokenizer.json as Llama-2-era models have it: a prefix space by a normalizer, after special tokens as well."""
    folder.mkdir(parents=True)
    bytes_ = [f"<0x{number:02X}>" for number in range(256)]
    pieces = ["<unk>", "<s>", "</s>", "[INST]", *bytes_, "▁", *"abcdefghijklmnopqrstuvwxyz"]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece: number for number, piece in enumerate(pieces)},
            merges=[],
            byte_fallback=True,
            unk_token="<unk>",
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens([AddedToken("[INST]", special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    stated = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "extra_special_tokens": ["[INST]"]}
    if tokenizer_class is not None:
        stated["tokenizer_class"] = tokenizer_class
    (folder / "tokenizer_config.json").write_text(json.dumps(stated), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}), encoding="utf-8")


@pytest.mark.parametrize("tokenizer_class", ["LlamaTokenizer", None])
def test_the_model_type_can_change_ids_and_what_prevents_it(tmp_path: Path, tokenizer_class: str | None) -> None:
    base, copy = tmp_path / "base", tmp_path / "copy"
    sentencepiece_like(base, "mistral", tokenizer_class)
    sentencepiece_like(copy, "llama", tokenizer_class)
    text = "one [INST] two"

    def ids(folder: Path) -> list[int]:
        with quiet_transformers():
            return list(AutoTokenizer.from_pretrained(folder)(text)["input_ids"])

    changes = tokenizer_changes(base, {"model_type": "llama"})
    assert changes is not None
    assert bool(changes) == (ids(base) != ids(copy))
    stated = json.loads((copy / "tokenizer_config.json").read_text(encoding="utf-8"))
    (copy / "tokenizer_config.json").write_text(json.dumps({**stated, **changes}), encoding="utf-8")
    assert ids(base) == ids(copy)


def test_a_folder_without_a_tokenizer_needs_no_change(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "base", MISTRAL, tokenizer=False)
    assert tokenizer_changes(tmp_path / "base", {"model_type": "llama"}) == {}


def test_a_tokenizer_that_every_model_type_reads_alike_travels(tmp_path: Path) -> None:
    base = tmp_path / "base"
    layer = tiny_checkpoint(base, MISTRAL)
    assert planned(base, [layer]).architecture == "LlamaForCausalLM"


def test_ids_that_would_change_are_kept_by_the_tokenizer_s_config(tmp_path: Path) -> None:
    # For the model type qwen2 AutoTokenizer builds a tokenizer of its own, whatever tokenizer.json holds.
    layer = tiny_checkpoint(tmp_path / "base", QWEN2)
    assert planned(tmp_path / "base", [layer]).tokenizer_changes == {"tokenizer_class": "Qwen2Tokenizer"}


def test_ids_that_would_change_in_any_case_are_a_reason_against_the_route(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relabel, "tokenizer_changes", lambda *_arguments: None)
    layer = tiny_checkpoint(tmp_path / "base", QWEN2)
    with pytest.raises(NotApplicable, match=r"AutoTokenizer reads .* whatever tokenizer_config\.json says"):
        planned(tmp_path / "base", [layer])
