"""What an inserted block holds, found and proven on stand-ins; and what must not pass as a constant."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.default_configs import default_config

from patcher.architectures.analysis import Architecture
from patcher.routes.carrier import fills as contents
from patcher.routes.carrier.fills import Fill, balance, content, matches, right_of
from patcher.routes.carrier.insertion import CannotInsert
from patcher.routes.carrier.neutral import neutral_fills
from patcher.routes.carrier.probe import constant_gain, find_forms, why_none
from patcher.routes.carrier.search import choose_insertion
from patcher.routes.carrier.trial import InsertionTrial, Stage

# model type, template, source of the constant, what carries the vector, gain per unit
FORMS = [
    ("qwen3", 0, "norm", "mlp.down_proj.weight", 1.0),
    ("phi3", 0, "norm", "mlp.down_proj.weight", 1.0),
    ("nanochat", 0, "norm", "mlp.fc2.weight", 1.0),
    ("olmo", 0, "norm", "mlp.down_proj.weight", 1.0),
    ("cohere2", 3, "norm", "mlp.down_proj.weight", 1.0),
    ("mixtral", 0, "norm", "mlp.experts.down_proj", 1.0),
    ("granitemoe", 0, "norm", "block_sparse_moe.experts.down_proj", 1.0),
    ("gemma", 0, "norm", "mlp.down_proj.weight", 1.0),
    ("gemma3_text", 0, "norm", "post_feedforward_layernorm.weight", 0.0152571),
    ("olmo2", 0, "norm", "post_feedforward_layernorm.weight", 1.0),
    ("glm4", 0, "bias", "post_self_attn_layernorm.weight", 1.0),
    ("qwen2", 0, "bias", "self_attn.o_proj.weight", 1.0),
    ("qwen2_moe", 0, "bias", "self_attn.o_proj.weight", 1.0),
    ("stablelm", 0, "norm bias", "mlp.down_proj.weight", 0.731059),
    ("gpt_neox_japanese", 0, "norm bias", "mlp.dense_4h_to_h.weight", 0.841345),
]


@pytest.mark.parametrize(("model_type", "template", "source", "carrier", "unit"), FORMS)
def test_a_content_is_found_and_proven(model_type: str, template: int, source: str, carrier: str, unit: float) -> None:
    config = default_config(model_type)
    trial = InsertionTrial(config, Architecture(config).blocks, template)
    form = next(find_forms(trial))
    assert (form.source, form.carrier) == (source, carrier)
    assert form.unit == pytest.approx(unit, rel=1e-4)
    assert form.difference <= 2e-5 * max(1.0, form.effect) and form.effect > 0.01


@pytest.mark.parametrize("model_type", ["dbrx", "mpt", "diffllama"])
def test_no_content_is_made_up(model_type: str) -> None:
    config = default_config(model_type)
    trial = InsertionTrial(config, Architecture(config).blocks, config.num_hidden_layers - 1, Stage(narrow=True))
    assert next(find_forms(trial), None) is None
    assert why_none(trial) == "no content of the block makes its output constant"


def test_a_norm_at_the_end_is_refused() -> None:
    config = default_config("xmod")
    trial = InsertionTrial(config, Architecture(config).blocks, 0)
    assert neutral_fills(trial) is None and "not the identity" in why_none(trial)


@pytest.mark.parametrize(("model_type", "epsilon"), [("qwen3", 1e-6), ("phi3", 1e-5), ("qwen2", 0.0), ("olmo2", 0.0)])
def test_what_the_norms_epsilon_takes_is_measured(model_type: str, epsilon: float) -> None:
    form = next(find_forms(InsertionTrial(default_config(model_type), "model.layers", 0)))
    assert form.epsilon == pytest.approx(epsilon, rel=0.1, abs=1e-7)


class TestWhatIsNoConstant:
    @pytest.fixture
    def trial(self) -> InsertionTrial:
        return InsertionTrial(default_config("qwen3"), "model.layers", 1)

    def test_without_the_negative_neurons(self, trial: InsertionTrial, monkeypatch: pytest.MonkeyPatch) -> None:
        whole = right_of

        def half(right: contents.Right, inner: int, hidden: int) -> torch.Tensor:
            return whole(right, inner, hidden).clamp(min=0.0)

        form = next(find_forms(trial))
        assert constant_gain(trial, form.fills, trial.vector) is not None
        monkeypatch.setattr(contents, "right_of", half)
        assert constant_gain(trial, form.fills, trial.vector) is None
        assert next(find_forms(trial), None) is None

    def test_behind_a_norm_that_scales(self, trial: InsertionTrial) -> None:
        form = next(find_forms(trial))
        fills = {**form.fills, "post_attention_layernorm.weight": Fill("copied")}
        assert constant_gain(trial, fills, trial.vector) is None

    def test_with_fewer_neurons_than_the_identity_needs(self) -> None:
        narrow = InsertionTrial(default_config("qwen3"), "model.layers", 1, Stage(narrow=True))
        assert next(find_forms(narrow), None) is None
        after_norm = InsertionTrial(default_config("olmo2"), "model.layers", 1, Stage(narrow=True))
        assert next(find_forms(after_norm)).carrier == "post_feedforward_layernorm.weight"

    def test_a_norm_behind_the_projection_does_not_pass_for_a_gain(self) -> None:
        trial = InsertionTrial(default_config("olmo2"), "model.layers", 1)
        form = next(find_forms(trial))
        sink = Fill("carrier", right="gated", factor=contents.gain("gated", trial.hidden))
        fills = {**form.fills, form.carrier: Fill("constant", 1.0), form.sink: sink}
        assert constant_gain(trial, fills, trial.vector) is None

    def test_half_the_vector_is_another_model(self, trial: InsertionTrial) -> None:
        form = next(find_forms(trial))
        fills = {**form.fills, form.carrier: replace(form.fills[form.carrier], factor=2 * form.factor(trial.hidden))}
        difference, effect, _ = trial.prove(fills)
        assert difference > 0.2 * effect


class TestChoice:
    def test_narrow_experts_make_way_for_a_dense_block(self) -> None:
        # The default config does not renormalise the weights of the selected experts.
        choice = choose_insertion(Architecture(default_config("qwen3_moe")), [5])
        assert choice.insertion.dense and choice.forms[5].sink == "mlp.down_proj.weight"

    @pytest.mark.slow
    def test_another_blocks_type_may_serve(self) -> None:
        choice = choose_insertion(Architecture(default_config("glm4_moe_lite")), [5], [Stage()])
        assert choice.insertion.templates == {5: 0} and not choice.insertion.dense

    @pytest.mark.slow
    def test_a_flag_is_the_last_resort(self) -> None:
        choice = choose_insertion(Architecture(default_config("olmoe")), [5])
        assert choice.flags == {"attention_bias": True}
        flagged = [Stage(flags=(("attention_bias", True),))]
        assert choose_insertion(Architecture(default_config("qwen3")), [5], flagged).forms[5].epsilon == 0.0

    @pytest.mark.slow
    def test_an_index_that_counts_in_the_forward_pass_is_found_in_full_depth(self) -> None:
        with pytest.raises(CannotInsert, match="computes something from a block's index"):
            choose_insertion(Architecture(default_config("rwkv")), [10])

    def test_the_weight_of_an_expert_is_measured_with_all_of_them(self) -> None:
        config = default_config("hunyuan_v1_moe")
        config.num_experts = 8
        config.moe_topk = 4
        choice = choose_insertion(Architecture(config), [5])
        assert choice.forms[5].unit == pytest.approx(1.0)


class TestContents:
    def test_pairs(self) -> None:
        fused = content(Fill("pairs", parts=("gate", "up")), (14, 3), 3)
        gate, up = fused[:7], fused[7:]
        assert torch.equal(gate[:3], torch.eye(3)) and torch.equal(gate[3:6], -torch.eye(3)) and not gate[6].any()
        assert torch.equal(up[:3], balance(3) * torch.eye(3)) and torch.equal(up[3:6], up[:3])
        turns = content(Fill("pairs", parts=("gate", "up"), interleaved=True), (14, 3), 3)
        assert torch.equal(turns[0::2], gate) and torch.equal(turns[1::2], up)
        assert torch.equal(content(Fill("pairs", parts=("gate",), transposed=True), (2, 3, 7), 3)[1], gate.T)

    def test_a_carrier(self) -> None:
        vector = torch.tensor([1.0, -2.0, 3.0])
        matrix = content(Fill("carrier", right="gated", factor=4.0), (3, 7), 3, vector)
        assert torch.equal(matrix, torch.outer(vector / 4, torch.tensor([1.0, 1, 1, -1, -1, -1, 0])))
        assert torch.equal(content(Fill("carrier", factor=0.5, offset=-1.0), (3,), 3, vector), 2 * vector - 1)

    def test_parts_are_recognised(self) -> None:
        vector = torch.randn(3, generator=torch.Generator().manual_seed(0))
        fill = Fill("pairs", parts=("gate", "up"))
        fused = content(fill, (14, 3), 3)
        for tensor, parts in ((fused, ("gate", "up")), (fused[:7], ("gate",)), (fused[7:], ("up",))):
            found = matches(tensor, 3, fill, vector)
            assert found is not None and found.parts == parts
        turned = matches(fused.T.contiguous(), 3, fill, vector)
        assert turned is not None and turned.transposed
        assert matches(fused + 1, 3, fill, vector) is None
