"""The routes of a decoder inside a multimodal wrapper: the same as of its text model, under the wrapper's names."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.tiny_wrappers import wrapper_checkpoint

from patcher.architectures.analysis import Architecture
from patcher.checkpoint.folder import CheckpointFolder
from patcher.checkpoint.prepare import read_config
from patcher.routes.plan import Plan
from patcher.routes.planner import choose_route


def planned(name: str, folder: Path, layer: int = 1) -> tuple[Plan, CheckpointFolder]:
    wrapper_checkpoint(folder, name)
    return choose_route(Architecture(read_config(folder)), [layer], CheckpointFolder(folder)), CheckpointFolder(folder)


def test_a_relabelled_decoder_keeps_its_wrapper(tmp_path: Path) -> None:
    plan, base = planned("mistral3", tmp_path / "base")
    assert (plan.route, plan.architecture) == ("relabel", "Mistral3ForConditionalGeneration")
    assert plan.config is not None and plan.config["model_type"] == "llama"
    carriers = [write for write in plan.tensors if write.layer is not None]
    assert [write.parameter for write in carriers] == ["model.language_model.layers.1.mlp.down_proj.bias"]
    towers = [name for name in base.tensors if "vision" in name]
    assert towers and not {*plan.dropped, *plan.renamed} & set(towers)


@pytest.mark.parametrize(("name", "route"), [("llava", "flag"), ("gemma3", "carrier")])
def test_new_tensors_have_the_names_of_their_neighbours(name: str, route: str, tmp_path: Path) -> None:
    plan, base = planned(name, tmp_path / "base")
    assert plan.route == route and plan.config is None
    prefix = next(key for key in base.tensors if ".layers.1." in key and "vision" not in key).partition(".layers.")[0]
    assert all(write.name.startswith(prefix + ".layers.") for write in plan.tensors if write.layer is not None)
