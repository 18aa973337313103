"""Relabels: another stock class that computes the same function, proven on stand-ins, and refused where it does not."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING

from patcher.architectures.analysis import Architecture
from patcher.architectures.model_class import on_meta, quiet_transformers
from patcher.routes.relabel.config import config_class, own_fields, parsed, target_config
from patcher.routes.relabel.finding import Relabel, find_relabel
from patcher.routes.relabel.guards import GUARDS
from patcher.routes.relabel.proof import LIMIT, NoRelabel, prove
from patcher.routes.relabel.rows import candidates
from patcher.routes.relabel.tensors import OPERATIONS, derivations, derive

LAYER = 2
FULL = {"rope_type": "default", "rope_theta": 10000.0}
SEED = {"hidden_size": 5120}
HALF_YARN = {
    **FULL, "rope_type": "yarn", "factor": 4.0, "partial_rotary_factor": 0.5, "original_max_position_embeddings": 2048,
}  # fmt: skip
PARTIAL = {**FULL, "partial_rotary_factor": 0.75}
LONG_FACTORS = {
    "rope_type": "longrope",
    "short_factor": [1.0 + index / 10 for index in range(36)],
    "long_factor": [1.0 + index for index in range(36)],
    "original_max_position_embeddings": 4096,
}
NO_CAPS = {"attn_logit_softcapping": None, "final_logit_softcapping": None}
GRANITE_DENSE = {
    "num_local_experts": 0, "layer_types": ["attention"] * 32, "position_embedding_type": "rope",
    "residual_multiplier": 0.22, "embedding_multiplier": 12.0, "logits_scaling": 8.0, "attention_multiplier": 0.0078125,
}  # fmt: skip
DOTS_DENSE = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 62}
DOTS_EXPERTS = {**DOTS_DENSE, "first_k_dense_replace": 1}
MULTIPLIERS = {
    "residual_multiplier": 0.22, "embedding_multiplier": 12.0, "logits_scaling": 6.0, "attention_multiplier": 0.015625,
}  # fmt: skip
MIXED = ["sliding_attention", "full_attention"] * 16

PAIRS: dict[str, tuple[str, dict[str, Any], str]] = {
    "mistral": ("mistral", {"sliding_window": None}, "llama"),
    "mistral, tied": ("mistral", {"sliding_window": None, "tie_word_embeddings": True}, "llama"),
    "mistral, wide heads": ("mistral", {"sliding_window": None, "head_dim": 256}, "llama"),
    "mistral, window": ("mistral", {}, "granite_swa"),
    "mistral, window, wide heads": ("mistral", {"head_dim": 256}, "cwm"),
    "ministral, window beyond its positions": ("ministral", {"head_dim": 128, "sliding_window": 131072}, "llama"),
    "ministral, mixed windows": ("ministral", {"head_dim": 128, "layer_types": MIXED}, "granite_swa"),
    "ministral3, short": ("ministral3", {"max_position_embeddings": 16384}, "llama"),
    "qwen2": ("qwen2", {}, "llama"),
    "qwen2, tied": ("qwen2", {"tie_word_embeddings": True}, "llama"),
    "qwen2, mixed windows": ("qwen2", {"use_sliding_window": True, "max_window_layers": 16}, "granite_swa"),
    "qwen3": ("qwen3", {}, "hy_v3"),
    "qwen3, tied, biases": ("qwen3", {"tie_word_embeddings": True, "attention_bias": True}, "hy_v3"),
    "dots1, dense": ("dots1", DOTS_DENSE, "hy_v3"),
    "phi3": ("phi3", {}, "llama"),
    "phi3, window": ("phi3", {"sliding_window": 2047}, "cwm"),
    "phi3, partial rotary": ("phi3", {"rope_parameters": PARTIAL}, "llama"),
    "phi3, partial rotary, window": ("phi3", {"rope_parameters": PARTIAL, "sliding_window": 2047}, "cwm"),
    "phi3, partial longrope": (
        "phi3",
        {
            "rope_parameters": {**PARTIAL, **LONG_FACTORS},
            "max_position_embeddings": 131072,
            "original_max_position_embeddings": 4096,
        },
        "llama",
    ),
    "glm": ("glm", {}, "llama"),
    "glm, yarn": ("glm", {"rope_parameters": HALF_YARN}, "llama"),
    "seed_oss": ("seed_oss", SEED, "llama"),
    "seed_oss, output biases alone": (
        "seed_oss",
        {**SEED, "attention_bias": False, "attention_out_bias": True},
        "llama",
    ),
    "seed_oss, no biases": ("seed_oss", {**SEED, "attention_bias": False}, "llama"),
    "ernie4_5": ("ernie4_5", {}, "llama"),
    "helium": ("helium", {}, "llama"),
    "exaone": ("exaone", {}, "llama"),
    "smollm3": ("smollm3", {}, "granite_swa"),
    "smollm3, windows": ("smollm3", {"use_sliding_window": True, "sliding_window": 4096}, "granite_swa"),
    "gemma": ("gemma", {}, "granite"),
    "gemma, wide heads, biases": ("gemma", {"hidden_size": 2048, "attention_bias": True}, "granite"),
    "vaultgemma": (
        "vaultgemma",
        {**NO_CAPS, "sliding_window": 8192},
        "granite",
    ),
    "vaultgemma, windows": ("vaultgemma", NO_CAPS, "granite_swa"),
    "granitemoehybrid, dense": ("granitemoehybrid", GRANITE_DENSE, "granite"),
    "granitemoehybrid, dense, no positions": (
        "granitemoehybrid",
        {**GRANITE_DENSE, "position_embedding_type": None},
        "granite_swa",
    ),
    "olmo": ("olmo", {}, "llama"),
    "olmo, tied, biases": ("olmo", {"tie_word_embeddings": True, "attention_bias": True}, "llama"),
    "youtu": ("youtu", {}, "deepseek_v2"),
    "mixtral": ("mixtral", {}, "aria_text"),
    "granitemoe": ("granitemoe", {}, "aria_text"),
    "granitemoe, multipliers, tied": ("granitemoe", {**MULTIPLIERS, "tie_word_embeddings": True}, "aria_text"),
    "granitemoeshared, shared": ("granitemoeshared", {**MULTIPLIERS, "shared_intermediate_size": 22016}, "aria_text"),
    "dots1, experts": ("dots1", {**DOTS_EXPERTS, "norm_topk_prob": True}, "hy_v3"),
    "glm4_moe": ("glm4_moe", {"use_qk_norm": True, "attention_bias": True}, "hy_v3"),
    "glm4_moe, full rotary": ("glm4_moe", {"use_qk_norm": True, "rope_parameters": FULL}, "hy_v3"),
    "gpt_neox_japanese": ("gpt_neox_japanese", {"is_decoder": True}, "gpt_neox"),
    "xmod": ("xmod", {"is_decoder": True, "default_language": "en_XX", "languages": ("en_XX", "fr_XX")}, "xmod"),
}

REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "qwen3, window": ("qwen3", {"use_sliding_window": True, "max_window_layers": 16}, "sliding window"),
    "ministral3, long": ("ministral3", {}, "scaled by position from 16384 on"),
    "dots1, experts": ("dots1", {**DOTS_DENSE, "first_k_dense_replace": 1}, "routes tokens to 4 experts"),
    "glm, dynamic": (
        "glm",
        {"rope_parameters": {**FULL, "rope_type": "dynamic", "factor": 2.0, "partial_rotary_factor": 0.5}},
        "change with the text's length",
    ),
    "gemma, bidirectional": ("gemma", {"use_bidirectional_attention": True}, "later tokens"),
    "vaultgemma, soft caps": ("vaultgemma", {}, "squashes logits"),
    "granitemoehybrid, experts": ("granitemoehybrid", {}, "routes tokens to 8 experts"),
    "granitemoehybrid, mamba": (
        "granitemoehybrid",
        {**GRANITE_DENSE, "layer_types": ["linear_attention", "attention"] * 16},
        "blocks are linear_attention",
    ),
    "granitemoehybrid, other positions": (
        "granitemoehybrid", {**GRANITE_DENSE, "position_embedding_type": "alibi"}, "no rotary.* embedded",
    ),
    "seed_oss, its own bias": ("seed_oss", {**SEED, "mlp_bias": True}, "has a bias that would become"),
    "seed_oss, heads that Llama refuses": ("seed_oss", {}, "not a multiple of the number of attention heads"),
    "ernie4_5, its own biases": ("ernie4_5", {"use_bias": True}, "has a bias that would become"),
    "ernie4_5, partial": (
        "ernie4_5", {"rope_parameters": PARTIAL}, "only a part",
    ),
    "smollm3, wide heads": ("smollm3", {"head_dim": 256}, "wider or narrower"),
    "smollm3, GELU": ("smollm3", {"hidden_act": "gelu"}, "activation is `gelu`"),
    "olmo, clipped": ("olmo", {"clip_qkv": 8.0}, "clip_qkv"),
    "youtu, halves": ("youtu", {"rope_interleave": False}, "not interleaved"),
    "mixtral, window": ("mixtral", {"sliding_window": 4096}, "sliding window"),
    "mixtral, gelu": ("mixtral", {"hidden_act": "gelu"}, "activation is `gelu`"),
    "dots1, weights as they are": ("dots1", {**DOTS_EXPERTS, "norm_topk_prob": False}, "norm_topk_prob"),
    "glm4_moe, no head norms": ("glm4_moe", {"use_qk_norm": False}, "use_qk_norm"),
    "glm4_moe, groups": ("glm4_moe", {"use_qk_norm": True, "n_group": 8, "topk_group": 4}, "chosen in groups"),
    "granitemoeshared, narrow": ("granitemoeshared", {"shared_intermediate_size": 1024}, "does not divide"),
    "xmod, norm in front": ("xmod", {"is_decoder": True, "default_language": "en_XX", "pre_norm": True}, "pre_norm"),
    "xmod, own norm": (
        "xmod", {"is_decoder": True, "default_language": "en_XX", "adapter_layer_norm": True}, "adapter_reuse",
    ),
    "llama": ("llama", {}, "no other class is known"),
}  # fmt: skip


def config_of(model_type: str, changes: dict[str, Any], target: str = "llama") -> Any:
    if config_class(model_type) is None or config_class(target) is None:
        pytest.skip(f"this transformers has no {model_type} or no {target}")
    with quiet_transformers():
        return CONFIG_MAPPING[model_type](**changes)


@functools.cache
def relabel_of(name: str) -> tuple[Any, Relabel]:
    model_type, changes, target = PAIRS[name]
    config = config_of(model_type, changes, target)
    return config, find_relabel(Architecture(config), [LAYER])


@pytest.mark.slow_but("mistral", "qwen2", "qwen3", "phi3", "glm", "gemma", "olmo")
@pytest.mark.parametrize("name", PAIRS)
def test_the_target_computes_the_same_and_is_steered_like_the_hook(name: str) -> None:
    _, found = relabel_of(name)
    assert found.target.model_type == PAIRS[name][2]
    assert found.proof.difference <= LIMIT
    assert found.proof.residual <= LIMIT
    assert found.proof.steered <= LIMIT
    assert found.proof.effect > 0.1


@pytest.mark.parametrize("name", PAIRS)
def test_no_field_of_the_target_is_left_to_its_default(name: str) -> None:
    _, found = relabel_of(name)
    unstated = set(own_fields(found.config["model_type"])) - set(found.config)
    assert not unstated
    assert found.config["architectures"] == [found.target.class_name]
    assert "auto_map" not in found.config
    read = parsed(found.config)
    for field in own_fields(found.config["model_type"]):
        if field != "rope_parameters":
            assert getattr(read, field) == found.config[field], field


@pytest.mark.parametrize("name", PAIRS)
def test_every_parameter_of_the_target_has_an_origin_or_is_a_zero_bias(name: str) -> None:
    _, found = relabel_of(name)
    stored = set(found.target.parameters) - set(found.target.aliases) | set(found.target.buffers)
    given = {each.target for each in found.derivations}
    assert given | set(found.zeros) == stored
    assert not given & set(found.zeros)
    assert all(zero.endswith("bias") for zero in found.zeros)


ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 2048},
    "llama3": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 2048,
    },
    "longrope": {"original_max_position_embeddings": 2048},
}  # fmt: skip


@pytest.mark.slow_but("mistral-*", "gemma-longrope")
@pytest.mark.parametrize("kind", ROPES)
@pytest.mark.parametrize("model_type", ["mistral", "qwen2", "qwen3", "gemma", "glm", "olmo"])
def test_six_rope_types(model_type: str, kind: str) -> None:
    if (model_type, kind) == ("glm", "dynamic"):
        pytest.skip("refused: see REFUSED")
    plain = config_of(model_type, {})
    parameters = {"rope_type": kind, "rope_theta": 500000.0, **ROPES[kind]}
    width = getattr(plain, "head_dim", None) or plain.hidden_size // plain.num_attention_heads
    if model_type == "glm":
        parameters["partial_rotary_factor"] = 0.5
        width //= 2
    if kind == "longrope":
        parameters["short_factor"] = [1.0 + index / 10 for index in range(width // 2)]
        parameters["long_factor"] = [1.0 + index for index in range(width // 2)]
    window = {"sliding_window": None} if model_type == "mistral" else {}
    config = config_of(model_type, {"rope_parameters": parameters, "max_position_embeddings": 8192, **window}, "hy_v3")
    found = find_relabel(Architecture(config), [LAYER])
    assert found.proof.difference <= (LIMIT if model_type in ("glm", "olmo") else 0.0)
    if kind in ("dynamic", "longrope"):
        assert found.stacks["llama.cpp"] == "no", "its converter does not know this rope type for the target"


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_says_why(name: str) -> None:
    model_type, changes, words = REFUSED[name]
    with pytest.raises(NoRelabel, match=words):
        find_relabel(Architecture(config_of(model_type, changes)), [LAYER])


def test_every_guard_is_used() -> None:
    used = {guard for rows in candidates().values() for row in rows for guard in row.guards}
    assert used == set(GUARDS)


@pytest.mark.parametrize(
    ("name", "vllm", "llama_cpp"),
    [
        ("seed_oss", "native", "native"),
        ("ernie4_5", "native", "native"),
        ("olmo", "native", "native"),
        ("glm", "native", "native"),
        ("glm, yarn", "backend", "no"),  # as factors of type longrope
        ("smollm3", "native", "native"),
        ("mistral, window", "native", "native"),
        ("mistral, window, wide heads", "backend", "no"),
        ("granitemoehybrid, dense", "native", "native"),
        ("granitemoehybrid, dense, no positions", "native", "no"),
        ("vaultgemma, windows", "backend", "no"),
    ],
)
def test_what_stacks_are_said_to_read(name: str, vllm: str, llama_cpp: str) -> None:
    stacks = relabel_of(name)[1].stacks
    assert (stacks["vllm"], stacks["llama.cpp"]) == (vllm, llama_cpp)


def test_a_window_that_cuts_nothing_off_is_no_window() -> None:
    config = config_of("phi3", {"sliding_window": 262144, "max_position_embeddings": 4096})
    assert find_relabel(Architecture(config), [LAYER]).target.model_type == "llama"


def test_mistral_with_a_window_has_a_second_target() -> None:
    config = config_of("mistral", {}, "cwm")
    row = next(row for row in candidates()["mistral"] if row.to == "smollm3")
    slot = find_relabel(Architecture(config), [LAYER]).slots[LAYER]
    assert prove(config, row, slot).difference <= LIMIT


WITHOUT: dict[str, Any] = {"do": []}
BROKEN: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    # name -> pair, changed tensor rules, changed config rules
    "queries and keys swapped": (
        "phi3",
        {
            "model.layers.*.self_attn.q_proj.weight": {
                "from": "model.layers.*.self_attn.qkv_proj.weight",
                "do": [["rows", "k"]],
            }
        },
        {},
    ),
    "gate and up swapped": (
        "phi3",
        {
            "model.layers.*.mlp.gate_proj.weight": {
                "from": "model.layers.*.mlp.gate_up_proj.weight",
                "do": [["rows", "second half"]],
            },
            "model.layers.*.mlp.up_proj.weight": {
                "from": "model.layers.*.mlp.gate_up_proj.weight",
                "do": [["rows", "first half"]],
            },
        },
        {},
    ),
    "keys not permuted": ("glm", {"model.layers.*.self_attn.k_proj.weight": WITHOUT}, {}),
    "queries' biases not permuted": ("glm", {"model.layers.*.self_attn.q_proj.bias": WITHOUT}, {}),
    "the rotary scale forgotten": (
        "phi3, partial longrope",
        {
            "model.layers.*.self_attn.q_proj.weight": {
                "from": "model.layers.*.self_attn.qkv_proj.weight",
                "do": [["rows", "q"], ["rotary", "halves"]],
            }
        },
        {},
    ),
    "an offset forgotten": ("gemma", {"model.layers.*.input_layernorm.weight": WITHOUT}, {}),
    "the last norm's offset forgotten": ("gemma", {"model.norm.weight": WITHOUT}, {}),
    "the embedding not centred": ("olmo", {"model.embed_tokens.weight": WITHOUT}, {}),
    "an MLP not centred": ("olmo", {"model.layers.*.mlp.down_proj.weight": WITHOUT}, {}),
    "an attention not centred": ("olmo", {"model.layers.*.self_attn.o_proj.weight": WITHOUT}, {}),
    "a bias that is not zero": ("qwen2", {"model.layers.*.self_attn.o_proj.bias": {"fill": 0.1}}, {}),
    "sinks that draw attention": ("vaultgemma, windows", {"model.layers.*.self_attn.sinks": {"fill": 0.0}}, {}),
    "another epsilon": ("qwen3", {}, {"rms_norm_eps": 1e-2}),
    "another theta": ("mistral", {}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}),
    "another activation": ("gemma", {}, {"hidden_act": "silu"}),
    "the window lost": ("mistral, window", {}, {"layer_types": ["full_attention"] * 4}),
    "a block without positions": ("qwen2, mixed windows", {}, {"layer_rope_theta": [1e4, 1e4, 0, 1e4]}),
    "positions where there are none": ("smollm3", {}, {"layer_rope_theta": {"per_layer": 2e6}}),
    "interleaved rows left as they were": ("ernie4_5", {"model.layers.*.self_attn.q_proj.weight": WITHOUT}, {}),
    "the unrotated part rotated": ("glm", {}, {"rope_parameters": {**FULL, "rope_theta": 1e8}}),
    "the wrong rows rotated": ("glm", {"model.layers.*.self_attn.k_proj.weight": {"do": [["rotary", "halves"]]}}, {}),
    "scores unscaled": ("smollm3", {}, {"attention_multiplier": 1.0}),
    "the embedding unscaled": ("gemma", {}, {"embedding_multiplier": 1.0}),
    "biases lost": ("qwen2", {}, {"attention_bias": False}),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_relabel_is_not_proven(name: str) -> None:
    pair, tensors, config = BROKEN[name]
    source, found = relabel_of(pair)
    row = dataclasses.replace(
        found.candidate,
        tensors={**found.candidate.tensors, **tensors},
        config={**found.candidate.config, **config},
    )
    with pytest.raises(NoRelabel, match=r"computes otherwise|would be lost"):
        prove(source, row, found.slots[LAYER])


def test_a_vector_at_the_wrong_scale_is_not_proven() -> None:
    source, found = relabel_of("granitemoehybrid, dense")
    wrong = dataclasses.replace(found.slots[LAYER], factor=1.0)
    with pytest.raises(NoRelabel, match="steered off"):
        prove(source, found.candidate, wrong)


def test_an_uncentred_vector_is_not_proven() -> None:
    source, found = relabel_of("olmo")
    row = dataclasses.replace(found.candidate, residual="same")
    with pytest.raises(NoRelabel, match="computes otherwise"):
        prove(source, row, found.slots[LAYER])


def test_a_parameter_that_nothing_gives_is_missing() -> None:
    found, missing = derivations({"a.*.b": {"from": "x.*.y"}}, {"x.0.y": 0}, {"a.0.b": 0, "a.1.b": 0, "c": 0})
    assert [(each.target, each.source) for each in found] == [("a.0.b", "x.0.y")]
    assert missing == ["a.1.b", "c"]


def test_a_field_that_nothing_states_is_an_error() -> None:
    with pytest.raises(LookupError, match="mlp_bias"):
        target_config(config_of("mistral", {}), "llama", {"attention_bias": False, "pretraining_tp": 1})


def test_older_readers_find_the_rotary_parameters_under_their_names() -> None:
    scaled = {"rope_type": "linear", "rope_theta": 7.0, "factor": 2.0}
    config = config_of("mistral", {"sliding_window": None, "rope_parameters": scaled})
    written = find_relabel(Architecture(config), [LAYER]).config
    assert written["rope_theta"] == 7.0
    assert written["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    read = parsed(written)
    assert read.rope_parameters == {"rope_type": "linear", "rope_theta": 7.0, "factor": 2.0}


def test_keys_that_describe_the_checkpoint_are_carried_over() -> None:
    config = config_of("qwen2", {})
    raw = {"torch_dtype": "bfloat16", "transformers_version": "4.40.1", "eos_token_id": 7, "auto_map": {}, "mine": 1}
    config.eos_token_id = 7
    written = find_relabel(Architecture(config), [LAYER], raw).config
    assert written["torch_dtype"] == "bfloat16"
    assert written["transformers_version"] == "4.40.1"
    assert written["eos_token_id"] == 7
    assert not {"auto_map", "mine", "max_window_layers"} & set(written)


@pytest.mark.parametrize("layout", ["halves", "pairs"])
def test_reordering_for_a_full_rotary_embedding_loses_no_row(layout: str) -> None:
    config = config_of("glm", {"head_dim": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 32})
    rows = torch.arange(32.0).unsqueeze(1)
    moved = OPERATIONS["rotary"](rows, layout, config)
    assert sorted(moved.flatten().tolist()) == rows.flatten().tolist()
    first_head = moved[:16].flatten().tolist()
    # Row i is rotated with row i + 8.
    partners = [(first_head[index], first_head[index + 8]) for index in range(4)]
    assert partners == ([(0, 4), (1, 5), (2, 6), (3, 7)] if layout == "halves" else [(0, 1), (2, 3), (4, 5), (6, 7)])


@pytest.mark.parametrize("kind", ["default", "llama3", "yarn"])
def test_factors_give_the_source_s_own_frequencies(kind: str) -> None:
    parameters = {"rope_type": kind, "rope_theta": 10000.0, "partial_rotary_factor": 0.5, **ROPES[kind]}
    config = config_of("glm", {"rope_parameters": parameters})
    found = find_relabel(Architecture(config), [LAYER])
    with quiet_transformers():
        wanted, given = (type(on_meta(each).model.rotary_emb)(each).inv_freq for each in (config, parsed(found.config)))
    rotated = len(wanted)
    assert (given[:rotated] - wanted).abs().max() <= 2.0**-24 * wanted.max()
    assert float((given[:rotated] == wanted).float().mean()) >= 0.8
    assert float(given[rotated:].max()) * config.max_position_embeddings < 1e-20


def test_what_half_precision_would_round_is_known() -> None:
    def rounded(name: str) -> set[str]:
        config, found = relabel_of(name)
        return {each.target.rpartition(".layers.0.")[2] for each in found.derivations if each.rounds(config)}

    assert not rounded("phi3")
    assert not rounded("glm")
    assert "self_attn.q_proj.weight" in rounded("phi3, partial longrope")
    assert "input_layernorm.weight" in rounded("gemma")
    assert {"mlp.down_proj.weight", "self_attn.o_proj.weight", "model.embed_tokens.weight"} <= rounded("olmo")


def test_centring_is_exact_in_fp32_for_half_precision() -> None:
    matrix = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    centred = derive(matrix, [["centre", 0]], None)
    assert centred.dtype == torch.float32
    assert float(centred.mean(0).abs().max()) < 1e-7
    assert torch.allclose(centred + matrix.float().mean(0), matrix.float(), atol=1e-6)
