"""An inserted block in a class with several residual streams: it mixes none of them, and each gains the vector."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from patcher.architectures.analysis import Architecture
from patcher.architectures.default_configs import default_config
from patcher.routes.carrier import neutral, route
from patcher.routes.carrier.fills import Fill, content
from patcher.routes.carrier.neutral import neutral_fills
from patcher.routes.carrier.pinned import find_pinned
from patcher.routes.carrier.probe import constant_gain, find_forms, unclamped
from patcher.routes.carrier.trial import InsertionTrial, Stage
from patcher.routes.plan import NotApplicable
from patcher.routes.rank_one import route as rank_one

DEEPSEEK, HY, QWEN = "deepseek_v4", "hy_v4", "qwen4_exp_text"


PLAIN = Stage()


def trial_of(model_type: str, template: int, stage: Stage = PLAIN) -> InsertionTrial:
    config = default_config(model_type)
    return InsertionTrial(config, Architecture(config).blocks, template, stage)


def test_what_mixes_the_streams_is_made_the_identity() -> None:
    trial = trial_of(DEEPSEEK, 5)
    fills = neutral_fills(trial)
    assert fills is not None and trial.streams == 4
    assert {name for name, fill in fills.items() if fill.kind == "unmixed"} == {"attn_hc.base", "ffn_hc.base"}
    # Softmax, Sinkhorn and their epsilon leave a trace of the other streams.
    assert trial.leak is not None and 0 < float(trial.leak.abs().max()) < 1e-4


def test_a_uniform_mixing_is_not_the_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neutral, "_ways_to_do_nothing", lambda _trial, others: [dict.fromkeys(others, Fill("zeros"))])
    assert neutral_fills(trial_of(DEEPSEEK, 5)) is None


def test_the_matrix_that_does_not_mix() -> None:
    row = content(Fill("unmixed", 50.0, streams=4), (24,), 64)
    assert not row[:8].any()
    torch.testing.assert_close(torch.softmax(row[8:].view(4, 4), -1), torch.eye(4))


def test_a_norm_over_all_streams_lets_one_through() -> None:
    """The sum of squares of a mean of normalised streams is no constant; that of one of them is."""
    trial = trial_of(QWEN, 0)
    fills = neutral_fills(trial)
    assert fills is not None
    kinds = {name: fill.kind for name, fill in fills.items() if name.endswith("hc_norm.weight")}
    assert set(kinds.values()) == {"first stream"} and len(kinds) == 2
    weight = content(Fill("first stream", 0.0), (256,), 64)
    assert not weight[:64].any() and bool((weight[64:] == -1).all())


@pytest.mark.parametrize(("model_type", "template", "stage"), [(HY, 0, PLAIN), (QWEN, 0, Stage(split=10))])
def test_a_content_adds_the_vector_to_every_stream(model_type: str, template: int, stage: Stage) -> None:
    trial = trial_of(model_type, template, stage)
    shapes = {name: tuple(tensor.shape) for name, tensor in trial.parameters.items()}
    forms = find_pinned(trial, shapes, 64, stage.split) if stage.split else find_forms(trial)
    form = next(forms)
    trial.set(form.fills, trial.vector)
    (gained,) = trial.gains((3.0,))
    assert gained.ndim == 4 and gained.shape[2] == 4
    torch.testing.assert_close(gained, trial.vector.expand_as(gained), atol=1e-4, rtol=1e-4)
    assert form.difference <= 1e-4 * form.effect * 5 and form.effect > 0.01


class TestActivationsThatAreCutOff:
    """A token may have sqrt(hidden) in one coordinate behind a norm: 64 of 4096, where gates are cut off at 10."""

    @pytest.fixture(scope="class")
    def trial(self) -> InsertionTrial:
        return trial_of(DEEPSEEK, 5, Stage(split=6))

    def test_the_rows_stay_below_the_limit(self, trial: InsertionTrial) -> None:
        shapes = {name: tuple(tensor.shape) for name, tensor in trial.parameters.items()}
        real = dict(shapes)
        for name, shape in shapes.items():
            if len(shape) == 3:
                real[name] = (shape[0], 4096, 2048) if "down" in name else (shape[0], 4096, 4096)
        form = next(find_pinned(trial, real, 4096, 6))
        slope = form.fills["mlp.experts.gate_up_proj"].slope
        assert slope == 0.125 and slope * 4096**0.5 < 10 < 2 * slope * 4096**0.5
        assert form.unit == pytest.approx(slope * 1.5 / 6, rel=1e-5)

    def test_where_nothing_is_cut_off_nothing_changes(self) -> None:
        trial = trial_of(HY, 0)
        form = next(find_forms(trial))
        assert unclamped(trial, form, 4096) is form

    def test_it_is_seen_though_all_tokens_are_cut_off_alike(self, trial: InsertionTrial) -> None:
        shapes = {name: tuple(tensor.shape) for name, tensor in trial.parameters.items()}
        form = next(find_pinned(trial, shapes, 64, 6))
        gate = form.fills["mlp.experts.gate_up_proj"]
        loud = {**form.fills, "mlp.experts.gate_up_proj": replace(gate, slope=8.0)}
        found = constant_gain(trial, loud, trial.vector, peaked=True)
        assert found is not None and found[0] < 0.2 * 8.0 and gate.slope == 1.0
        assert unclamped(trial, form, 64) is form


@pytest.mark.slow
@pytest.mark.parametrize(("layer", "before"), [(5, "full"), (6, "shared"), (8, "shared")])
def test_what_later_blocks_share_is_not_made_by_the_inserted_one(layer: int, before: str) -> None:
    """A block that chooses tokens for those after it would choose others; one that shares a choice hands it on."""
    config = default_config(HY)
    assert config.indexer_types[layer] == before
    plan = route.plan(Architecture(config), [layer], None)
    kinds = plan.config_changes["indexer_types"]
    assert len(kinds) == config.num_hidden_layers + 1
    if config.indexer_types[layer + 1] == "shared":
        assert kinds[layer + 1] == "shared"
    assert [*kinds[: layer + 1], *kinds[layer + 2 :]] == config.indexer_types


def test_what_is_claimed_is_what_was_run() -> None:
    plan = route.plan(Architecture(default_config(HY)), [0], None)
    assert plan.streams == 4 and plan.as_json()["streams"] == 4
    assert plan.stacks == {"transformers": "native", "vllm": "no", "llama.cpp": "no"}


def test_other_routes_say_why_not() -> None:
    with pytest.raises(NotApplicable, match="4 residual streams"):
        rank_one.plan(Architecture(default_config(HY)), [0], None)
