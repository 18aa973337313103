"""A plan out of kept findings is the plan that fresh proofs give, and another config has findings of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.tiny_models import default_checkpoint

from patcher.architectures import model_class
from patcher.architectures.analysis import Architecture
from patcher.architectures.class_listing import findings_about
from patcher.checkpoint.completeness import require_complete
from patcher.checkpoint.folder import CheckpointFolder
from patcher.checkpoint.prepare import read_config
from patcher.disk.findings import Findings, findings_folder
from patcher.routes.plan import Plan
from patcher.routes.planner import choose_route


@pytest.fixture(autouse=True)
def kept(proofs_are_made_once: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATCH_MODEL_CACHE", str(tmp_path / "cache"))


def planned(folder: Path, layer: int, route: str) -> tuple[Plan, Any]:
    checkpoint = CheckpointFolder(folder)
    reading = require_complete(checkpoint, str(folder))
    plan = choose_route(Architecture(read_config(folder)), [layer], checkpoint, route=route, exact=False)
    return plan, reading


@pytest.mark.parametrize(
    ("model_type", "layer", "route", "again"),
    [
        ("llama", 1, "flag", 0),
        ("gpt2", 1, "native", 0),
        ("qwen2", 1, "relabel", 0),
        ("gpt2", -1, "embedding", 0),
        ("qwen3", 1, "carrier", 2),
        ("mixtral", 1, "rank_one", 0),
    ],
)
def test_a_second_plan_builds_no_stand_in_and_is_the_same(
    model_type: str, layer: int, route: str, again: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The carrier lists the real class twice, as it is and with one more block."""
    default_checkpoint(tmp_path / "model", model_type)
    fresh = planned(tmp_path / "model", layer, route)
    assert not findings_folder().exists()
    monkeypatch.setattr(Findings, "kept", True)
    first = planned(tmp_path / "model", layer, route)
    built = []
    from_config = model_class.causal_lm_from_config
    monkeypatch.setattr(
        model_class, "causal_lm_from_config", lambda *given, **named: built.append(1) or from_config(*given, **named)
    )
    monkeypatch.setattr("patcher.architectures.stand_in.causal_lm_from_config", None)
    second = planned(tmp_path / "model", layer, route)
    assert fresh == first == second
    assert fresh[0].as_json() == second[0].as_json()
    assert len(built) == again


def test_another_config_has_findings_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Findings, "kept", True)
    default_checkpoint(tmp_path / "model", "llama")
    config = read_config(tmp_path / "model")
    assert findings_about(config).once("key", int, lambda: 1) == 1
    assert findings_about(config).once("key", int, lambda: 2) == 1
    config._name_or_path = "elsewhere"
    assert findings_about(config).once("key", int, lambda: 2) == 1
    config.rms_norm_eps = 1e-4
    assert findings_about(config).once("key", int, lambda: 2) == 2


def test_code_of_the_model_itself_is_part_of_what_findings_are_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Findings, "kept", True)
    default_checkpoint(tmp_path / "model", "llama")
    config = read_config(tmp_path / "model")
    config.auto_map = {"AutoModelForCausalLM": "modeling_own.Own"}
    code = tmp_path / "model" / "modeling_own.py"

    def ask(value: int) -> int:
        return findings_about(config, trust_remote_code=True).once("key", int, lambda: value)

    config._name_or_path = str(tmp_path / "model")
    assert [ask(1), ask(2)] == [1, 2]  # there is no such code
    code.write_text("SCALE = 1", encoding="utf-8")
    assert [ask(3), ask(4)] == [3, 3]
    code.write_text("SCALE = 2", encoding="utf-8")
    assert [ask(5), ask(6)] == [5, 5]
    config.auto_map = {"AutoModelForCausalLM": "other/repository--modeling_own.Own"}
    assert [ask(7), ask(8)] == [7, 8]
