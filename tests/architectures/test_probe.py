"""The probe is tested by breaking what it checks: each of these slots looks right and is wrong, and is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.old_transformers import skip_if_too_old
from support.tiny_models import parsed_config, released_config
from torch import nn
from transformers import CONFIG_MAPPING

import patcher.architectures.analysis as analysis
import patcher.architectures.probe as probe
import patcher.architectures.stand_in as stand_in
from patcher.architectures.analysis import Architecture
from patcher.architectures.model_class import causal_lm_from_config, parameter_aliases, quiet_transformers, with_flags
from patcher.architectures.probe import ProbeResult, flags_change_nothing, probe_slot
from patcher.architectures.registry import rows
from patcher.architectures.shrink import shrink_config

LLAMA = "meta-llama--Llama-3.2-1B"


@pytest.fixture
def released(tmp_path: Path) -> Callable[..., Any]:
    def read(name: str, **changes: Any) -> Any:
        skip_if_too_old(name)
        return parsed_config({**released_config(name), **changes}, tmp_path / "config")

    return read


def default(model_type: str, **changes: Any) -> Any:
    with quiet_transformers():
        return CONFIG_MAPPING[model_type](**changes)


def probed(config: Any, blocks: str, slot: str, layer: int = 1, **flags: Any) -> ProbeResult:
    tiny, stand_in = shrink_config(with_flags(config, flags), layer)
    return probe_slot(tiny, blocks, slot, stand_in)


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[nn.Module], None]], None]:
    """Change every model that the probe builds, right after it was built."""

    def install(change: Callable[[nn.Module], None]) -> None:
        def build(config: Any, **options: Any) -> nn.Module:
            model = causal_lm_from_config(config, **options)
            change(model)
            return model

        monkeypatch.setattr(stand_in, "causal_lm_from_config", build)

    return install


# What passes


@pytest.mark.parametrize(
    ("name", "blocks", "slot", "flags"),
    [
        ("openai-community--gpt2", "transformer.h", "mlp.c_proj.bias", {}),
        ("EleutherAI--gpt-j-6b", "transformer.h", "mlp.fc_out.bias", {}),  # parallel residual
        ("microsoft--phi-2", "model.layers", "mlp.fc2.bias", {}),
        ("openai--gpt-oss-20b", "model.layers", "mlp.experts.down_proj_bias", {}),  # [experts, hidden]
        (LLAMA, "model.layers", "mlp.down_proj.bias", {"mlp_bias": True}),
        ("tiiuae--falcon-40b", "transformer.h", "mlp.dense_4h_to_h.bias", {"bias": True}),
    ],
)
@pytest.mark.parametrize("layer", [0, 5, -1])
def test_a_plain_bias_is_a_constant_shift_of_factor_one(
    released: Callable[..., Any], name: str, blocks: str, slot: str, flags: dict[str, Any], layer: int
) -> None:
    config = released(name)
    result = probed(config, blocks, slot, layer % config.num_hidden_layers, **flags)
    assert result.constant, result.reason
    assert result.factor == pytest.approx(1.0, rel=1e-4)
    assert result.deviation < probe.TOLERANCE
    assert result.reason is None


@pytest.mark.parametrize("multiplier", [0.22, 1.0, 2.5])
def test_granite_gains_the_residual_multiplier(released: Callable[..., Any], multiplier: float) -> None:
    config = released("ibm-granite--granite-3.3-2b-instruct", residual_multiplier=multiplier)
    result = probed(config, "model.layers", "mlp.down_proj.bias", mlp_bias=True)
    assert (result.constant, result.factor) == (True, pytest.approx(multiplier, rel=1e-3))


def test_minicpm3_gains_scale_depth_over_the_root_of_the_depth(released: Callable[..., Any]) -> None:
    config = released("openbmb--MiniCPM3-4B", scale_depth=2.8)
    tiny, stand_in = shrink_config(with_flags(config, {"mlp_bias": True}), 20)
    result = probe_slot(tiny, "model.layers", "mlp.down_proj.bias", stand_in)
    assert (result.constant, result.factor) == (True, pytest.approx(2.8 / tiny.num_hidden_layers**0.5, rel=1e-3))
    slot, _ = Architecture(config).flagged_slot(20)
    assert slot is not None
    assert slot.factor == pytest.approx(2.8 / config.num_hidden_layers**0.5)


def test_falcon_h1_gains_the_second_mlp_multiplier(released: Callable[..., Any]) -> None:
    config = released("tiiuae--Falcon-H1-0.5B-Instruct", mlp_multipliers=[0.9, 0.5])
    result = probed(config, "model.layers", "feed_forward.down_proj.bias", mlp_bias=True)
    assert (result.constant, result.factor) == (True, pytest.approx(0.5, rel=1e-3))
    slot, _ = Architecture(config).flagged_slot(7)
    assert slot is not None
    assert slot.factor == 0.5


def test_hyperclovax_without_its_post_norm_passes(released: Callable[..., Any]) -> None:
    name = "naver-hyperclovax--HyperCLOVAX-SEED-Think-14B"
    slot, why = Architecture(released(name, use_post_norm=False, residual_multiplier=0.4)).flagged_slot(9)
    assert slot is not None, why
    assert slot.factor == 0.4


def test_the_result_does_not_depend_on_the_random_state_around_it(released: Callable[..., Any]) -> None:
    config = released("openai-community--gpt2")
    torch.manual_seed(1)
    first = probed(config, "transformer.h", "mlp.c_proj.bias")
    torch.manual_seed(2)
    expected = torch.rand(3)
    torch.manual_seed(2)
    second = probed(config, "transformer.h", "mlp.c_proj.bias")
    assert first == second
    assert torch.equal(torch.rand(3), expected), "and it leaves that state alone"


# Norms and encoders


def test_post_norm_opt_takes_it_in_its_last_norm(released: Callable[..., Any]) -> None:
    config = released("facebook--opt-350m")
    assert config.do_layer_norm_before is False
    result = probed(config, "model.decoder.layers", "fc2.bias", 11)
    assert not result.constant
    assert result.reason is not None and "a norm follows it" in result.reason
    assert result.deviation > 0.05
    slot, _ = Architecture(config).native_slot(11)
    assert slot is not None and slot.parameter.endswith("final_layer_norm.bias")


def test_the_last_norm_of_a_post_norm_block_is_a_constant_shift(released: Callable[..., Any]) -> None:
    """What the refusal above is about is the place, not the class."""
    result = probed(released("facebook--opt-350m"), "model.decoder.layers", "final_layer_norm.bias", 11)
    assert (result.constant, result.factor) == (True, pytest.approx(1.0, rel=1e-3))


@pytest.mark.parametrize(
    ("name", "slot"),
    [
        (LLAMA, "input_layernorm.bias"),
        ("openai-community--gpt2", "ln_2.bias"),
        ("openai-community--gpt2", "attn.c_proj.bias"),  # also read by the block's own MLP
        ("openai-community--gpt2", "mlp.c_fc.bias"),
    ],
)
def test_a_bias_elsewhere_in_the_block_is_refused(released: Callable[..., Any], name: str, slot: str) -> None:
    blocks = "transformer.h" if "gpt2" in name else "model.layers"
    result = probed(released(name), blocks, slot)
    assert not result.constant
    assert result.reason


def test_hyperclovax_with_its_post_norm_is_refused(released: Callable[..., Any]) -> None:
    config = released("naver-hyperclovax--HyperCLOVAX-SEED-Think-14B")
    assert config.use_post_norm is True
    slot, why = Architecture(config).flagged_slot(9)
    assert slot is None
    assert "mlp_bias" in why and "a norm follows it" in why


def test_an_encoder_is_refused_as_not_causal() -> None:
    config = default("bert", is_decoder=False)
    result = probed(config, "bert.encoder.layer", "output.LayerNorm.bias", 3)
    assert not result.constant
    assert result.reason == "with this config the model is not causal (an encoder)"
    slot, why = Architecture(config).native_slot(3)
    assert slot is None and why
    as_decoder = probed(default("bert", is_decoder=True), "bert.encoder.layer", "output.LayerNorm.bias", 3)
    assert as_decoder.constant, as_decoder.reason


# Rows that are wrong


def patched_row(monkeypatch: pytest.MonkeyPatch, model_type: str, **changes: Any) -> None:
    wrong = {**rows(), model_type: replace(rows()[model_type], **changes)}
    monkeypatch.setattr(analysis, "rows", lambda: wrong)


@pytest.mark.parametrize(
    ("name", "scale"),
    [
        ("ibm-granite--granite-3.3-2b-instruct", {}),
        ("ibm-granite--granite-3.3-2b-instruct", {"residual_multiplier": -1}),
        ("ibm-granite--granite-3.3-2b-instruct", {"embedding_multiplier": 1}),
        ("openbmb--MiniCPM3-4B", {"scale_depth": 1}),
        ("openbmb--MiniCPM3-4B", {"scale_depth": 1, "num_hidden_layers": 0.5}),
        (LLAMA, {"rms_norm_eps": 1}),
    ],
)
def test_a_wrong_scale_rule_is_refused(
    released: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, name: str, scale: dict[str, float]
) -> None:
    config = released(name)
    patched_row(monkeypatch, config.model_type, scale=scale)
    slot, why = Architecture(config).flagged_slot(1)
    assert slot is None
    assert "the registry has no rule for it" in why


@pytest.mark.parametrize("key", ["no_such_key", "hidden_act", "rope_parameters.7"])
def test_a_scale_rule_over_a_key_that_is_not_there_is_refused(
    released: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    patched_row(monkeypatch, "llama", scale={key: 1})
    slot, why = Architecture(released(LLAMA)).flagged_slot(1)
    assert slot is None
    assert "no constant shift" in why


@pytest.mark.parametrize(
    "slots",
    [("mlp.no_such.bias",), ("self_attn.o_proj.bias",), ("mlp.up_proj.bias",), ("input_layernorm.weight",)],
)
def test_a_wrong_slot_is_refused(
    released: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, slots: tuple[str, ...]
) -> None:
    patched_row(monkeypatch, "llama", slots=slots, flags={"mlp_bias": True, "attention_bias": True})
    slot, why = Architecture(released(LLAMA)).flagged_slot(1)
    assert slot is None
    assert why


def test_the_first_slot_that_holds_is_taken(released: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    patched_row(monkeypatch, "llama", slots=("mlp.up_proj.bias", "mlp.gone.bias", "mlp.down_proj.bias"))
    slot, _ = Architecture(released(LLAMA)).flagged_slot(1)
    assert slot is not None
    assert slot.parameter == "model.layers.1.mlp.down_proj.bias"


def test_a_flag_is_not_said_to_create_what_is_there_without_it(
    released: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    patched_row(monkeypatch, "gpt2", flags={"reorder_and_upcast_attn": True})
    architecture = Architecture(released("openai-community--gpt2"))
    assert architecture.native_slot(1)[0] is not None
    assert architecture.flagged_slot(1)[0] is None


@pytest.mark.parametrize("extra", [{"hidden_act": "gelu"}, {"rms_norm_eps": 0.3}])
def test_flags_that_change_more_than_they_add_are_refused(
    released: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, extra: dict[str, Any]
) -> None:
    patched_row(monkeypatch, "llama", also=extra)
    slot, why = Architecture(released(LLAMA)).flagged_slot(1)
    assert slot is None
    assert "changes more than it adds" in why


def test_what_a_flag_adds_is_neutral_when_it_is_zero(released: Callable[..., Any]) -> None:
    tiny, _ = shrink_config(released(LLAMA), 1)
    assert flags_change_nothing(tiny, {"mlp_bias": True, "attention_bias": True})
    assert not flags_change_nothing(tiny, {"mlp_bias": True, "hidden_act": "relu"})
    assert not flags_change_nothing(tiny, {"intermediate_size": 48}), "other shapes"
    falcon, _ = shrink_config(released("tiiuae--falcon-7b"), 1)
    assert flags_change_nothing(falcon, {"bias": True})


@pytest.mark.parametrize("flags", [{"mlp_bias": True}, {"mlp_bias": True, "num_attention_heads": 7}])
def test_flags_under_which_no_config_loads_are_refused(monkeypatch: pytest.MonkeyPatch, flags: dict[str, Any]) -> None:
    """InternLM3 checks that both of its biases are there or none; setting an attribute does not check it."""
    if "internlm3" not in CONFIG_MAPPING:
        pytest.skip("this transformers has no `internlm3`")
    patched_row(monkeypatch, "internlm3", flags=flags)
    slot, why = Architecture(default("internlm3")).flagged_slot(1)
    assert slot is None
    assert "transformers does not load a config with mlp_bias" in why


# Flags that are declared and ignored


@pytest.mark.parametrize("name", ["Qwen--Qwen2.5-0.5B", "mistralai--Mistral-7B-Instruct-v0.3", "Qwen--Qwen3-8B"])
@pytest.mark.parametrize("declared", [False, True])
def test_a_flag_that_the_class_never_reads_makes_no_slot(
    released: Callable[..., Any], name: str, declared: bool
) -> None:
    """A config may carry `mlp_bias` from somewhere else; the tensor would be dropped without an error."""
    architecture = Architecture(released(name, mlp_bias=declared))
    assert architecture.config.mlp_bias is declared
    for slot, why in (architecture.native_slot(1), architecture.flagged_slot(1)):
        assert slot is None
        assert "bias" in why


@pytest.mark.parametrize("model_type", ["deepseek_v32", "glm_moe_dsa"])
def test_a_flag_that_the_class_declares_and_ignores_makes_no_slot(model_type: str) -> None:
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no `{model_type}`")
    config = default(model_type)
    if not hasattr(config, "mlp_bias"):
        pytest.skip("this transformers does not declare the flag")
    architecture = Architecture(config)
    for layer in (0, architecture.block_count - 1):
        slot, why = architecture.flagged_slot(layer)
        assert slot is None
        assert "mlp_bias" in why and "creates no bias" in why


# Slots that do not do what a slot does


def test_a_slot_that_does_not_reach_the_residual_is_refused(
    released: Callable[..., Any], broken: Callable[..., None]
) -> None:
    def swallow(model: nn.Module) -> None:
        for layer in model.model.layers:
            layer.mlp.register_forward_hook(lambda _module, _inputs, output: torch.zeros_like(output))

    broken(swallow)
    result = probed(released(LLAMA), "model.layers", "mlp.down_proj.bias", mlp_bias=True)
    assert not result.constant
    assert result.reason == "the slot does not reach the residual stream"


def test_a_parameter_that_is_created_and_never_used_is_refused(
    released: Callable[..., Any], broken: Callable[..., None]
) -> None:
    def decorate(model: nn.Module) -> None:
        for layer in model.model.layers:
            layer.mlp.shift = nn.Parameter(torch.zeros(layer.mlp.down_proj.weight.shape[0]))

    broken(decorate)
    result = probed(released(LLAMA), "model.layers", "mlp.shift")
    assert not result.constant
    assert result.reason == "the slot does not reach the residual stream"


def test_a_slot_of_another_width_is_refused(released: Callable[..., Any]) -> None:
    result = probed(released(LLAMA), "model.layers", "mlp.up_proj.bias", mlp_bias=True)
    assert (result.constant, result.reason) == (False, "the slot's width is not the residual's")


def test_a_slot_that_is_not_there_is_refused(released: Callable[..., Any]) -> None:
    result = probed(released(LLAMA), "model.layers", "mlp.down_proj.bias")
    assert not result.constant
    assert result.reason is not None and "creates no `mlp.down_proj.bias`" in result.reason


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", ["the block", "a later block", "the head"])
def test_a_stand_in_that_computes_no_finite_numbers_is_refused(
    released: Callable[..., Any], broken: Callable[..., None], value: float, place: str
) -> None:
    def spoil(model: nn.Module) -> None:
        owners = {
            "the block": model.model.layers[1].mlp,
            "a later block": model.model.layers[3],
            "the head": model.lm_head,
        }
        owners[place].register_forward_hook(lambda _module, _inputs, output: output + value)

    broken(spoil)
    result = probed(released(LLAMA), "model.layers", "mlp.down_proj.bias", mlp_bias=True)
    assert not result.constant
    assert result.reason == "the tiny stand-in does not compute finite numbers"


def test_numbers_that_are_not_finite_under_the_hook_only_are_refused(
    released: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = probe.run_on

    def spoiled(model: nn.Module, block: nn.Module, ids: torch.Tensor, add: torch.Tensor | None = None) -> Any:
        hidden, logits = real(model, block, ids, add)
        return hidden, logits if add is None else logits * float("nan")

    monkeypatch.setattr(probe, "run_on", spoiled)
    result = probed(released("openai-community--gpt2"), "transformer.h", "mlp.c_proj.bias")
    assert not result.constant
    assert result.reason == "the tiny stand-in does not compute finite numbers"


def test_a_bias_that_acts_at_some_positions_only_is_refused(
    released: Callable[..., Any], broken: Callable[..., None]
) -> None:
    def at_the_first_token_only(model: nn.Module) -> None:
        for layer in model.model.layers:
            bias = layer.mlp.down_proj.bias

            def drop(_module: nn.Module, _inputs: Any, output: torch.Tensor, bias: nn.Parameter = bias) -> torch.Tensor:
                return torch.cat([output[:, :1], output[:, 1:] - bias], dim=1)

            layer.mlp.down_proj.register_forward_hook(drop)

    broken(at_the_first_token_only)
    assert not probed(released(LLAMA), "model.layers", "mlp.down_proj.bias", mlp_bias=True).constant


def test_a_bias_that_also_reaches_later_blocks_by_another_way_is_refused(
    released: Callable[..., Any], broken: Callable[..., None]
) -> None:
    def leak(model: nn.Module) -> None:
        bias = model.model.layers[1].mlp.down_proj.bias
        model.model.norm.register_forward_hook(lambda _module, _inputs, output: output + bias)

    broken(leak)
    result = probed(released(LLAMA), "model.layers", "mlp.down_proj.bias", mlp_bias=True)
    assert not result.constant
    assert result.reason == "later blocks see another change than the residual's"


def test_a_slot_whose_effect_grows_otherwise_than_its_content_is_refused(
    released: Callable[..., Any], broken: Callable[..., None]
) -> None:
    def clamp(model: nn.Module) -> None:
        for layer in model.model.layers:
            layer.mlp.register_forward_hook(lambda _module, _inputs, output: output.clamp(-4, 4))

    broken(clamp)
    assert not probed(released(LLAMA), "model.layers", "mlp.down_proj.bias", mlp_bias=True).constant


@pytest.mark.parametrize("shape", [(64,), (), (1, 1)])
def test_a_factor_that_is_a_weight_is_refused(
    released: Callable[..., Any], broken: Callable[..., None], shape: tuple[int, ...]
) -> None:
    """On a fresh model it is one; in a trained one it is whatever was learnt (Zaya's residual scales)."""

    def scale(model: nn.Module) -> None:
        for layer in model.model.layers:
            layer.mlp.gain = nn.Parameter(torch.ones(shape))
            layer.mlp.register_forward_hook(lambda module, _inputs, output: output * module.gain)

    broken(scale)
    result = probed(released(LLAMA), "model.layers", "mlp.down_proj.bias", mlp_bias=True)
    assert not (result.constant and result.factor == pytest.approx(1.0, rel=1e-3))


def test_a_factor_that_is_a_stored_buffer_is_refused(released: Callable[..., Any], broken: Callable[..., None]) -> None:
    def scale(model: nn.Module) -> None:
        for layer in model.model.layers:
            layer.register_buffer("gain", torch.ones(1))
            layer.mlp.register_forward_hook(lambda _module, _inputs, output, layer=layer: output * layer.gain)

    broken(scale)
    result = probed(released(LLAMA), "model.layers", "mlp.down_proj.bias", mlp_bias=True)
    assert not (result.constant and result.factor == pytest.approx(1.0, rel=1e-3))


def test_a_tensor_that_several_blocks_share_is_refused(
    released: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = analysis.on_meta

    def tied(config: Any, flags: Any = None, **options: Any) -> nn.Module:
        model = real(config, flags, **options)
        layers = model.model.layers
        if layers[0].mlp.down_proj.bias is not None:
            layers[2].mlp.down_proj.bias = layers[0].mlp.down_proj.bias
        return model

    monkeypatch.setattr(analysis, "on_meta", tied)
    architecture = Architecture(released(LLAMA))
    for layer in (0, 2):
        slot, why = architecture.flagged_slot(layer)
        assert slot is None
        assert "several blocks share" in why
    slot, _ = architecture.flagged_slot(1)
    assert slot is not None
    assert "model.layers.0.mlp.down_proj.bias" in slot.created
    assert "model.layers.2.mlp.down_proj.bias" not in slot.created, "a checkpoint stores a tied tensor once"


def test_aliases_name_the_tensor_that_is_stored() -> None:
    tiny, _ = shrink_config(default("gpt2"), 0)
    assert parameter_aliases(causal_lm_from_config(tiny)) == {"lm_head.weight": "transformer.wte.weight"}


def test_a_stand_in_that_stayed_large_is_never_allocated(
    released: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A config that keeps its sizes in another place, as some multimodal wrappers do."""
    monkeypatch.setattr(analysis, "shrink_config", lambda config, layer: (config, layer))
    slot, why = Architecture(released("meta-llama--Llama-2-13b-chat-hf")).flagged_slot(1)
    assert slot is None
    assert "were not made small" in why


def test_an_error_inside_the_class_becomes_a_reason(released: Callable[..., Any], broken: Callable[..., None]) -> None:
    def fail(model: nn.Module) -> None:
        def raising(*_: Any) -> None:
            raise RuntimeError("no kernel for this")

        model.model.layers[0].register_forward_hook(raising)

    broken(fail)
    slot, why = Architecture(released(LLAMA)).flagged_slot(1)
    assert slot is None
    assert "the probe could not run on a stand-in (no kernel for this)" in why
