"""Experts that are too narrow alone: the selected ones share the coordinates, and the selection is the same for all."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file
from support.default_configs import default_config
from support.stock_loading import stock_model
from support.tiny_models import tiny_tokenizer
from support.tiny_patch import patch_tiny, planned
from transformers import AutoConfig, AutoModelForCausalLM

from patcher.architectures.analysis import Architecture
from patcher.routes.carrier.disk import disk_tensors
from patcher.routes.carrier.fills import Fill, content
from patcher.routes.carrier.insertion import CannotInsert
from patcher.routes.carrier.pinned import find_pinned
from patcher.routes.carrier.probe import Form, constant_gain
from patcher.routes.carrier.search import choose_insertion
from patcher.routes.carrier.shared import find_shared
from patcher.routes.carrier.trial import InsertionTrial, Stage

# model type, changes of its default config, selected experts, what selects them, gain per unit
QWEN3 = {"norm_topk_prob": True}
FORMS: list[tuple[str, dict[str, Any], int, str, float]] = [
    ("qwen3_moe", QWEN3, 8, "mlp.gate.weight", 1 / 8),
    ("minimax_m2", {}, 8, "mlp.e_score_correction_bias", 1 / 8),
    ("deepseek_v3", {}, 8, "mlp.gate.e_score_correction_bias", 2.5 / 8),
    ("glm4_moe_lite", {}, 4, "mlp.gate.e_score_correction_bias", 1.8 / 4),
    ("longcat_flash", {}, 12, "mlp.router.e_score_correction_bias", 6 / (512 + 256)),
]


def found(model_type: str, selected: int, **changes: Any) -> tuple[InsertionTrial, Form | None]:
    config = default_config(model_type)
    for name, value in changes.items():
        setattr(config, name, value)
    architecture = Architecture(config)
    trial = InsertionTrial(config, architecture.blocks, 5, Stage(split=selected))
    wide = {name: (*tensor.shape[:-2], 10_000, 10_000) for name, tensor in trial.parameters.items() if tensor.ndim > 2}
    shapes = {name: tuple(tensor.shape) for name, tensor in trial.parameters.items()} | wide
    return trial, next(find_pinned(trial, shapes, architecture.hidden, selected), None)


@pytest.mark.parametrize(("model_type", "changes", "selected", "selector", "unit"), FORMS)
def test_selected_experts_share_the_coordinates(
    model_type: str, changes: dict[str, Any], selected: int, selector: str, unit: float
) -> None:
    trial, form = found(model_type, selected, **changes)
    assert form is not None and form.source == "norm"
    assert trial.parameters[form.sink].shape[-1] < trial.hidden * 2 / selected + 16
    assert form.fills[selector].kind == ("opposed" if selector.endswith("weight") else "pinned")
    assert form.unit == pytest.approx(unit, rel=1e-5)
    assert form.difference <= 2e-5 * max(1.0, form.effect) and form.effect > 0.01


@pytest.mark.parametrize(
    ("model_type", "selected", "changes"),
    [("qwen3_moe", 8, {}), ("olmoe", 8, {}), ("qwen3_moe", 8, {**QWEN3, "num_experts": 15})],
)
def test_weights_that_follow_the_residual_are_no_constant(
    model_type: str, selected: int, changes: dict[str, Any]
) -> None:
    """Not renormalised; or too few experts for two teams."""
    _, form = found(model_type, selected, **changes)
    assert form is None


class TestWhatSelects:
    """Each fault in what makes all tokens use a full set of experts is seen."""

    @pytest.fixture(scope="class")
    def teams(self) -> tuple[InsertionTrial, Form]:
        trial, form = found("qwen3_moe", 8, **QWEN3)
        assert form is not None
        return trial, form

    @pytest.fixture(scope="class")
    def pins(self) -> tuple[InsertionTrial, Form]:
        trial, form = found("deepseek_v3", 8)
        assert form is not None
        return trial, form

    @staticmethod
    def fails(case: tuple[InsertionTrial, Form], **changes: Any) -> bool:
        """Whether a form in which a fill is changed is no constant, and the whole model another one than the hook's."""
        trial, form = case
        name = changes.pop("name")
        changed = {**form.fills, name: replace(form.fills[name], **changes)}
        difference, effect, _ = trial.prove(changed)
        return constant_gain(trial, changed, trial.vector) is None and difference > 0.01 * effect

    def test_no_bias_on_the_scores(self, pins: tuple[InsertionTrial, Form]) -> None:
        assert self.fails(pins, name="mlp.gate.e_score_correction_bias", holders=4)

    def test_one_team_without_its_opposite(self, teams: tuple[InsertionTrial, Form]) -> None:
        assert self.fails(teams, name="mlp.experts.down_proj", holders=8)

    def test_a_router_of_zeros(self, teams: tuple[InsertionTrial, Form]) -> None:
        # Then all experts tie, and which of them are taken is not said anywhere.
        trial, form = teams
        order = torch.randperm(128, generator=torch.Generator().manual_seed(0))
        trial.set({**form.fills, "mlp.gate.weight": Fill("zeros")}, trial.vector)
        with torch.no_grad():
            for name in ("mlp.experts.gate_up_proj", "mlp.experts.down_proj"):
                trial.parameters[name].copy_(trial.parameters[name][order])
        gains = trial.gains()
        assert max(float((gain - gains[0].mean(dim=(0, 1))).abs().max()) for gain in gains) > 0.01

    def test_rows_of_a_team_that_differ(self, teams: tuple[InsertionTrial, Form]) -> None:
        trial, form = teams
        trial.set(form.fills, trial.vector)
        with torch.no_grad():
            trial.parameters["mlp.gate.weight"][3] *= 1.5
        shares = torch.cat([(gain @ trial.vector).flatten() for gain in trial.gains()])
        assert float(shares.std() / shares.mean().abs()) > 0.01

    def test_members_with_another_share(self, teams: tuple[InsertionTrial, Form]) -> None:
        assert self.fails(teams, name="mlp.experts.gate_up_proj", shares=7)


class TestWithASharedExpert:
    """As in DeepSeek V2: weights that are not renormalised, but a zero router's are known."""

    SIZES: ClassVar[dict[str, Any]] = {
        "hidden_size": 2048, "moe_intermediate_size": 1408, "n_shared_experts": 2, "n_routed_experts": 64,
        "num_experts_per_tok": 6, "topk_method": "greedy", "norm_topk_prob": False,
    }  # fmt: skip
    STAGE = Stage(split=1, narrow=True)

    def architecture(self, **changes: Any) -> Architecture:
        config = default_config("deepseek_v2")
        for name, value in {**self.SIZES, **changes}.items():
            setattr(config, name, value)
        return Architecture(config)

    @pytest.mark.slow
    def test_it_holds_the_first_coordinates(self) -> None:
        form = choose_insertion(self.architecture(), [5], [self.STAGE]).forms[5]
        shared = "mlp.shared_experts.down_proj.weight"
        assert form.after == 1408 and list(form.units) == [shared]
        # 6 experts of 64 weigh 6 / 64 = 1.5 / 16, and both parts round the vector alike.
        assert form.unit == pytest.approx(6 / 64, rel=1e-5)
        assert form.units[shared] == 16 * form.unit
        assert form.factor(2048, shared) == 16 * form.factor(2048)
        assert form.difference <= 2e-5 * max(1.0, form.effect) and form.effect > 0.01

    def test_both_together_must_be_wide_enough(self) -> None:
        with pytest.raises(CannotInsert):
            choose_insertion(self.architecture(moe_intermediate_size=1360), [5], [self.STAGE])

    def test_a_share_that_is_held_twice_is_no_constant(self) -> None:
        architecture = self.architecture()
        trial = InsertionTrial(architecture.config, architecture.blocks, 5, self.STAGE)
        shapes = {name: tuple(tensor.shape) for name, tensor in trial.parameters.items()}
        form = next(find_shared(trial, shapes, trial.hidden))
        assert constant_gain(trial, form.fills, trial.vector) is not None
        twice = {**form.fills, form.sink: replace(form.fills[form.sink], after=0)}
        assert constant_gain(trial, twice, trial.vector) is None


class TestContents:
    def test_shares_cover_every_coordinate_once(self) -> None:
        for hidden, selected in ((64, 6), (2048, 8), (7168, 12), (10, 10)):
            fill = Fill("pairs", shares=selected, holders=2 * selected)
            for first in (0, selected):
                spans = [fill.share(first + number, hidden) for number in range(selected)]
                assert [at for at, _ in spans] == [sum(count for _, count in spans[:at]) for at in range(selected)]
                assert sum(count for _, count in spans) == hidden
            assert fill.share(2 * selected, hidden) == (0, 0) and fill.share(None, hidden) == (0, hidden)

    def test_an_expert_alone_is_what_it_is_among_all(self) -> None:
        vector = torch.randn(12, generator=torch.Generator().manual_seed(0))
        for fill, shape in (
            (Fill("pairs", parts=("gate", "up"), shares=3, holders=6), (8, 20, 12)),
            (Fill("carrier", right="gated", factor=2.0, shares=3, holders=6), (8, 12, 10)),
        ):
            whole = content(fill, shape, 12, vector)
            for expert in range(8):
                assert torch.equal(whole[expert], content(fill, shape[1:], 12, vector, expert))
            assert whole[:6].any() and not whole[6:].any()
        right = Fill("carrier", right="gated", shares=3, holders=6).rights((8, 12, 10), 12)
        assert right.shape == (8, 10) and torch.equal(right[0], torch.tensor([1.0] * 4 + [-1.0] * 4 + [0.0] * 2))

    def test_teams_are_each_others_negative_in_half_precision_too(self) -> None:
        rows = content(Fill("opposed", 8.0, shares=3), (8, 64), 64).bfloat16()
        assert (rows[:3] == rows[0]).all() and (rows[3:6] == -rows[0]).all() and not rows[6:].any()
        assert len(rows[0].abs().unique()) > 32


SMALL = {
    "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 400,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        **SMALL, "head_dim": 16, "moe_intermediate_size": 40, "num_experts": 12, "num_experts_per_tok": 4,
        "norm_topk_prob": True,
    },
    "deepseek_v3": {
        **SMALL, "num_key_value_heads": 4, "moe_intermediate_size": 40, "n_routed_experts": 16, "n_group": 4,
        "topk_group": 2, "num_experts_per_tok": 6, "first_k_dense_replace": 1, "q_lora_rank": 24, "kv_lora_rank": 16,
        "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16, "intermediate_size": 96,
    },
    "deepseek_v2": {
        **SMALL, "num_key_value_heads": 4, "moe_intermediate_size": 48, "n_routed_experts": 12, "n_shared_experts": 2,
        "num_experts_per_tok": 6, "first_k_dense_replace": 1, "q_lora_rank": 24, "kv_lora_rank": 16,
        "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16, "intermediate_size": 96,
    },
}  # fmt: skip


def base_of(folder: Any, model_type: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **MODELS[model_type])).eval()
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(50)
    model.to(dtype).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("model_type", MODELS)
def test_experts_stored_one_by_one(tmp_path: Any, model_type: str) -> None:
    base = base_of(tmp_path / "base", model_type)
    patched = patch_tiny(base, tmp_path / "copy", [1], exact=True, route="carrier")
    assert patched.difference <= 2e-5 * max(1.0, patched.effect) and patched.effect > 0.05 and not patched.report
    holders = {"qwen3_moe": 8, "deepseek_v3": 6, "deepseek_v2": 12}[model_type]
    indices = [write.index for write in patched.plan.carriers if write.index is not None]
    assert sorted(indices) == list(range(holders)) and all("experts." in write.name for write in patched.plan.carriers)
    # Only what was run is claimed.
    others = "no" if model_type == "deepseek_v2" else "native"
    assert patched.plan.stacks == {"transformers": "native", "vllm": others, "llama.cpp": others}


def test_experts_stored_in_one_tensor(tmp_path: Any) -> None:
    """As a checkpoint that holds the class's own form."""
    base = base_of(tmp_path / "base", "qwen3_moe")
    fused, _ = stock_model(base)
    folder = tmp_path / "fused"
    fused.save_pretrained(folder, save_original_format=False)
    tiny_tokenizer().save_pretrained(folder)
    names = [name for path in folder.glob("*.safetensors") for name in load_file(path)]
    assert "model.layers.1.mlp.experts.down_proj" in names
    patched = patch_tiny(folder, tmp_path / "copy", [1], exact=True, route="carrier")
    assert patched.difference <= 2e-5 * max(1.0, patched.effect) and patched.effect > 0.05 and not patched.report
    (write,) = patched.plan.carriers
    assert write.right is not None and write.right.shape == (12, 40) and write.shape == (12, 64, 40)


def test_half_precision_holds_one_rounding_in_all_experts(tmp_path: Any) -> None:
    base = base_of(tmp_path / "base", "deepseek_v3", torch.bfloat16)
    plan = planned(base, [1], exact=True, route="carrier")
    assert {write.dtype for write in plan.carriers} == {"BF16"}
    assert len({write.factor for write in plan.carriers}) == 1


def test_a_choice_names_every_tensor_of_the_block() -> None:
    config = default_config("qwen3_moe")
    config.norm_topk_prob = True
    architecture = Architecture(config)
    choice = choose_insertion(architecture, [5])
    tensors = disk_tensors(architecture, choice, choice.insertion.copy_layers[5])
    down = [tensor for name, tensor in tensors.items() if name.endswith("down_proj.weight")]
    assert len(down) == 128 and {tensor.fill.kind for tensor in down} == {"carrier"}
    assert [tensor.index for tensor in down] == list(range(128))


def test_experts_that_are_too_narrow_together_are_left_alone() -> None:
    config = default_config("qwen3_moe")
    config.norm_topk_prob, config.moe_intermediate_size = True, 510
    with pytest.raises(CannotInsert):
        choose_insertion(Architecture(config), [5], [Stage(split=8)])
