"""Builds on small residual streams: what a carrier's constant would be off by is known before the copy is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.small_stream_builds import built
from support.tiny_models import VOCABULARY, default_checkpoint, write_recipe

from patcher.build import local
from patcher.build.job import Job
from patcher.build.planning import plan_build
from patcher.build.small_streams import with_embedding_rows
from patcher.capture import opened
from patcher.capture.streaming.stored_tensors import StoredTensors
from patcher.errors import CheckFailed, InputError
from patcher.recipe.file import load_recipe
from patcher.routes import planner
from patcher.routes.constant import ConstantError, Loss

RMS = 0.02


@pytest.fixture
def no_other_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mixtral's constant may be short. No other class is looked at, so that nothing but the carrier is exact."""
    monkeypatch.setattr(planner, "ROUTES", {name: route for name, route in planner.ROUTES.items() if name != "relabel"})


def small_base(scratch: Path, model_type: str, layer: int = 0, **changes: Any) -> int:
    return default_checkpoint(scratch / "base", model_type, layer, embedding_rms=RMS, **changes)


def build(scratch: Path, layer: int, said: list[str] | None = None, **keys: Any) -> dict[str, Any]:
    recipe = write_recipe(scratch / "recipe.yaml", scratch / "base", layer, scratch / "out", **keys)
    say = (lambda _line: None) if said is None else (lambda line: said.append(str(line)))
    return local.build(Job(load_recipe(recipe), scratch / "out", say=say)).manifest


class TestTheConstantIsSet:
    def test_and_the_prediction_is_what_the_copy_does(self, tmp_path: Path) -> None:
        layer = small_base(tmp_path, "qwen3", 16)
        found = built(tmp_path, layer)
        constant = found.plan.constant
        assert found.plan.route == "carrier" and found.passes and constant is not None
        assert constant.measured_on == "captured activations" and constant.mean_squares is not None
        least, median, most = constant.mean_squares
        assert least < constant.set_for < most and least < median < most
        assert 0.3 * constant.expected < found.difference <= 1.2 * constant.expected
        assert 0.3 * constant.worst < found.residual <= 1.2 * constant.worst
        # Without it every token would lose this much.
        assert constant.epsilon / most > constant.typical

    @pytest.mark.slow
    def test_the_manifest_says_so_and_verifying_knows_it(self, tmp_path: Path) -> None:
        layer = small_base(tmp_path, "qwen3", 16)
        manifest = build(tmp_path, layer)
        recorded = manifest["route"]["constant"]
        assert recorded["measured_on"] == "captured activations" and recorded["layer"] == layer
        assert manifest["verification"][0]["passed"] and manifest["edits"][0]["stored_rel_error"] < 1e-6
        assert "losses" not in recorded and "settings" not in recorded
        (warning,) = [line for line in manifest["route"]["warnings"] if "typical token" in line]
        assert f"{recorded['worst']:.1g}" in warning and f"{recorded['set_for']:.2g}" in warning

    @pytest.mark.slow
    def test_in_a_streamed_build_too(self, tmp_path: Path) -> None:
        layer = small_base(tmp_path, "qwen3", 16)
        in_memory = built(tmp_path, layer).plan.constant
        (tmp_path / "streamed").mkdir()
        (tmp_path / "base").rename(tmp_path / "streamed" / "base")
        streamed = built(tmp_path / "streamed", layer, capture={"mode": "stream"})
        assert streamed.passes and streamed.plan.constant.worst == pytest.approx(in_memory.worst, rel=1e-3)

    def test_for_each_of_two_layers_the_second_of_which_is_steered_already(self, tmp_path: Path) -> None:
        layer = small_base(tmp_path, "qwen3", 16)
        found = built(tmp_path, [layer, layer + 1])
        assert found.passes and len(found.plan.constant.settings) == 2


class TestAnotherContentOrRoute:
    @pytest.mark.parametrize("model_type", ["ernie4_5", "olmo", "cohere"])
    @pytest.mark.slow_but("ernie4_5")
    def test_one_that_is_exact_is_taken_where_the_constant_would_fail(self, model_type: str, tmp_path: Path) -> None:
        layer = small_base(tmp_path, model_type)
        found = built(tmp_path, layer, prefer="same_model_type")
        assert found.passes and found.plan.constant is None
        assert any("off by 0.00" in line and "mean square" in line for line in found.plan.advice)

    def test_a_value_bias_is_a_constant_on_any_stream(self, tmp_path: Path) -> None:
        layer = small_base(tmp_path, "qwen3")
        found = built(tmp_path, layer, route="carrier")
        assert found.passes and found.plan.config_changes["attention_bias"] is True
        assert "a block that is made otherwise is inserted" in found.plan.advice[-1]

    @pytest.mark.slow
    def test_the_whole_build_says_so_and_passes_its_proof(self, tmp_path: Path) -> None:
        layer, said = small_base(tmp_path, "ernie4_5"), list[str]()
        manifest = build(tmp_path, layer, said, prefer="same_model_type")
        assert manifest["route"]["name"] == "flag" and manifest["verification"][0]["passed"]
        assert any("the `carrier` route would come first, but" in line and "mean square" in line for line in said)


@pytest.mark.usefixtures("no_other_class")
class TestADryRun:
    def test_reads_rows_of_the_embedding_and_says_what_they_tell(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        layer, read = small_base(tmp_path, "mixtral"), list[int]()
        rows = StoredTensors.read_rows
        monkeypatch.setattr(StoredTensors, "read", lambda _stored, name, *_rest: pytest.fail(f"{name} was read whole"))
        monkeypatch.setattr(
            StoredTensors, "read_rows", lambda stored, name, ids: read.append(len(ids)) or rows(stored, name, ids)
        )
        recipe = write_recipe(tmp_path / "recipe.yaml", tmp_path / "base", layer, tmp_path / "out")
        job = Job(load_recipe(recipe), tmp_path / "out", say=lambda _line: None)
        constant = with_embedding_rows(job, plan_build(job)).plan.constant
        assert constant is not None and constant.measured_on == "embedding rows"
        assert 0 < sum(read) < VOCABULARY and not (tmp_path / "out").exists()
        assert constant.mean_squares[1] == pytest.approx(RMS**2, rel=0.3) and constant.set_for is None
        assert constant.typical == pytest.approx(1e-5 / (RMS**2 + 1e-5), rel=0.3)


@pytest.mark.usefixtures("no_other_class")
class TestRefusal:
    def test_comes_before_the_model_is_loaded_and_gives_the_numbers(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        layer = small_base(tmp_path, "mixtral")
        monkeypatch.setattr(opened, "load_causal_lm", lambda *_args, **_options: pytest.fail("it was loaded"))
        with pytest.raises(InputError) as refused:
            build(tmp_path, layer)
        problem = refused.value.problems[0]
        assert refused.value.code == "exact" and not (tmp_path / "out").exists()
        for words in ("off by 0.00", "for some tokens by 0.00", "after block 0", "mean square", "epsilon of 1e-05"):
            assert words in problem.found
        assert "steer a later layer" in problem.remedy and "exact: false" in problem.remedy

    def test_a_later_layer_where_the_stream_is_larger_has_a_route(self, tmp_path: Path) -> None:
        small_base(tmp_path, "mixtral")
        louder(tmp_path / "base", block=1, factor=30.0)
        found = built(tmp_path, 1)
        assert found.passes and found.plan.route == "carrier" and found.plan.constant.worst < 1e-4

    @pytest.mark.slow
    def test_the_fitted_route_is_there_where_the_recipe_allows_it(self, tmp_path: Path) -> None:
        layer = small_base(tmp_path, "mixtral")
        assert built(tmp_path, layer, exact=False).plan.route == "rank_one"

    def test_of_the_last_layer_names_no_later_one(self, tmp_path: Path) -> None:
        layer = small_base(tmp_path, "mixtral", 31, rms_norm_eps=1e-4)
        with pytest.raises(InputError) as refused:
            built(tmp_path, layer)
        assert "later layer" not in str(refused.value.problems[0].remedy)


@pytest.mark.usefixtures("no_other_class")
class TestBroken:
    def test_an_epsilon_that_is_ignored_fails_the_proof(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        layer = small_base(tmp_path, "mixtral")
        monkeypatch.setattr(Loss, "kept", lambda _loss, moments: torch.ones_like(moments[..., 0]))
        found = built(tmp_path, layer)
        assert not found.passes and found.difference > 1e-4 and found.residual > 1e-3

    @pytest.mark.slow
    def test_a_constant_that_is_not_set_fails_the_prediction(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        small_base(tmp_path, "mixtral")
        louder(tmp_path / "base", block=1, factor=3.0)
        assert built(tmp_path, 1).passes
        shutil.rmtree(tmp_path / "copy")
        monkeypatch.setattr(ConstantError, "_setting", lambda *_args: 1.0)
        with pytest.raises(InputError) as refused:
            built(tmp_path, 1)
        assert "log-probabilities would differ from the hook's by" in refused.value.problems[0].found


@pytest.mark.slow
def test_a_build_that_ignores_the_epsilon_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = small_base(tmp_path, "mixtral")
    monkeypatch.setattr(Loss, "kept", lambda _loss, moments: torch.ones_like(moments[..., 0]))
    with pytest.raises((CheckFailed, InputError)):
        build(tmp_path, layer, route="carrier")
    assert not (tmp_path / "out").exists()


def louder(base: Path, *, block: int, factor: float) -> None:
    """What a block adds to the residual stream, made larger."""
    tensors = load_file(base / "model.safetensors")
    changed = {
        name: tensor * factor
        if f"layers.{block}." in name and name.endswith(("w2.weight", "o_proj.weight"))
        else tensor
        for name, tensor in tensors.items()
    }
    assert any(not torch.equal(changed[name], tensors[name]) for name in tensors), json.dumps(sorted(tensors)[:40])
    save_file(changed, base / "model.safetensors", {"format": "pt"})
