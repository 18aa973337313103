"""The ways in which a patched checkpoint is known to run unsteered without an error, planted in the build itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from support.building import build_recipe
from support.tiny_models import default_checkpoint, tiny_checkpoint, write_recipe

from patcher.architectures.analysis import Architecture
from patcher.build import planning
from patcher.checkpoint.prepare import read_config
from patcher.errors import CheckFailed, InputError, PatchModelError
from patcher.routes import apply, flag
from patcher.routes.plan import NotApplicable, Plan, TensorWrite

LLAMA, QWEN = "meta-llama--Llama-3.2-1B", "Qwen--Qwen2.5-0.5B"


def run(tmp_path: Path, layer: int, **keys: Any) -> Any:
    path = write_recipe(tmp_path / "recipe.yaml", tmp_path / "base", layer, tmp_path / "out", **keys)
    return build_recipe(path, tmp_path / "out")


def refused(tmp_path: Path, layer: int, kind: type[PatchModelError], **keys: Any) -> str:
    with pytest.raises(kind) as caught:
        run(tmp_path, layer, **keys)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*partial*"))
    return str(caught.value)


def after_writing(monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Path], None]) -> None:
    """A writer with a fault: what it wrote is spoilt before anything else looks at it."""
    honest = apply.write_copy

    def faulty(base: Any, stage: Path, **options: Any) -> Any:
        written = honest(base, stage, **options)
        spoil(stage)
        return written

    monkeypatch.setattr(apply, "write_copy", faulty)


def as_if_it_had_the_slot(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """A planner that believes in a bias which the class does not read."""

    def believing(architecture: Architecture, layers: list[int], *_arguments: Any, **_options: Any) -> Plan:
        parameters = {layer: f"{architecture.blocks}.{layer}.mlp.down_proj.bias" for layer in layers}
        return Plan(
            route="flag", exact=True, cost="none", architecture=architecture.class_name, blocks=architecture.blocks,
            sites={layer: name.rpartition(".")[0] for layer, name in parameters.items()},
            tensors=tuple(
                TensorWrite(name, name, "created", layer, 1.0, (architecture.hidden,), "F32")
                for layer, name in parameters.items()
            ),
            config_changes=changes, stacks={"transformers": "native"}, reason="planted",
        )  # fmt: skip

    monkeypatch.setattr(planning, "choose_route", believing)


def test_an_unknown_bias_is_dropped_by_the_loader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the published bake for Qwen2 did: the class has no such parameter, and nothing fails."""
    layer = tiny_checkpoint(tmp_path / "base", QWEN)
    as_if_it_had_the_slot(monkeypatch)
    told = refused(tmp_path, layer, CheckFailed)
    assert "down_proj.bias" in told and "log-probabilities" in told and "residual stream" in told


def test_a_declared_but_ignored_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSeek-V3.2 and GLM-MoE-DSA declare `mlp_bias` and never read it."""
    layer = default_checkpoint(tmp_path / "base", "deepseek_v32")
    architecture = Architecture(read_config(tmp_path / "base"))
    assert hasattr(architecture.config, "mlp_bias")
    with pytest.raises(NotApplicable):
        flag.plan(architecture, [layer], None)
    as_if_it_had_the_slot(monkeypatch, mlp_bias=True)
    told = refused(tmp_path, layer, CheckFailed)
    assert "loading" in told and "residual stream" in told


def test_a_zero_that_the_flag_demands_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers fills it with zeros and says so on stderr; vLLM leaves it uninitialised and computes NaN."""
    layer = tiny_checkpoint(tmp_path / "base", LLAMA)
    honest = planning.choose_route

    def forgetful(*arguments: Any, **options: Any) -> Plan:
        plan = honest(*arguments, **options)
        zero = next(tensor for tensor in plan.tensors if tensor.layer is None)
        return replace(plan, tensors=tuple(tensor for tensor in plan.tensors if tensor is not zero))

    monkeypatch.setattr(planning, "choose_route", forgetful)
    assert "missing keys" in refused(tmp_path, layer, CheckFailed)


def test_an_index_beside_a_single_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers reads `model.safetensors` and never looks at the index with the shard of ours."""
    layer = tiny_checkpoint(tmp_path / "base", LLAMA)

    def spoil(stage: Path) -> None:
        shutil.copyfile(tmp_path / "base" / "model.safetensors", stage / "model.safetensors")

    after_writing(monkeypatch, spoil)
    assert "not in the folder" in refused(tmp_path, layer, InputError)


@pytest.mark.parametrize("where", ["base", "copy"])
def test_duplicate_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """Which of two equal keys counts depends on the loader and on the order of the files."""
    layer = tiny_checkpoint(tmp_path / "base", "openai-community--gpt2", sharded=True)

    def duplicate(folder: Path) -> None:
        index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
        name = next(name for name in index if name.endswith(f"h.{layer}.mlp.c_proj.bias"))
        other = next(file for file in index.values() if file != index[name])
        tensors = load_file(folder / other)
        save_file({**tensors, name: load_file(folder / index[name])[name] * 0}, folder / other, {"format": "pt"})

    if where == "base":
        duplicate(tmp_path / "base")
    else:
        after_writing(monkeypatch, duplicate)
    assert "is stored twice" in refused(tmp_path, layer, InputError)


def test_a_wrong_relabel_is_seen_without_the_vector(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy that computes another function than the base is refused, however well it holds the vector."""
    layer = tiny_checkpoint(tmp_path / "base", LLAMA)

    def spoil(stage: Path) -> None:
        config = json.loads((stage / "config.json").read_text())
        config["rms_norm_eps"] = 0.05
        (stage / "config.json").write_text(json.dumps(config))

    after_writing(monkeypatch, spoil)
    assert "without the vector" in refused(tmp_path, layer, CheckFailed)
