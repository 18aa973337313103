"""An exact route whose proof fails gives way to the next best one; what is wrong never passes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.broken_routes import break_routes, halved
from support.building import build_recipe
from support.command_line import runner
from support.tiny_models import default_checkpoint, tiny_checkpoint, write_recipe

from patcher.build.base_run import BaseRun
from patcher.errors import CheckFailed
from patcher.patched.reading import read_manifest
from patcher.patched.schema import Manifest
from patcher.routes.planner import ROUTES

LLAMA, ERNIE, GPT2 = "meta-llama--Llama-3.2-1B", "baidu--ERNIE-4.5-0.3B-PT", "openai-community--gpt2"
EXACT = [name for name, route in ROUTES.items() if route.exact]


def recipe_of(tmp_path: Path, name: str, **keys: Any) -> Path:
    """Of the routes of ERNIE 4.5 the order is then carrier (for it most stacks read), flag, relabel."""
    layer = tiny_checkpoint(tmp_path / "base", name, **({"rms_norm_eps": 1e-9} if name == ERNIE else {}))
    keys = {"prefer": "same_model_type", **keys}
    return write_recipe(tmp_path / "recipe.yaml", tmp_path / "base", layer, tmp_path / "out", **keys)


def nothing_is_left(tmp_path: Path) -> bool:
    return not (tmp_path / "out").exists() and not list(tmp_path.glob(".*partial*"))


def test_the_next_best_route_is_taken_and_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The base is read once; what is left is the second copy alone, as if its route had been forced."""
    recipe, said, runs = recipe_of(tmp_path, ERNIE), [], []
    written = break_routes(monkeypatch, ["carrier"])
    honest = BaseRun.find
    monkeypatch.setattr(BaseRun, "find", lambda *arguments: (runs.append(1), honest(*arguments))[1])
    result = build_recipe(recipe, tmp_path / "out", say=said.append)
    assert written == ["carrier", "flag"] and runs == [1] and not list(tmp_path.glob(".*partial*"))
    route = result.patch.route
    assert route.name == "flag" and result.patch.verification[0].passed
    (failed,) = route.failed_before
    assert failed.name == "carrier" and failed.cost is not None and "one more layer" in failed.cost
    assert failed.stack == "transformers" and [check.name for check in failed.checks] == ["stored vector"]
    (line,) = [line for line in said if "failed its proof" in line]
    assert "`carrier` route" in line and "against a limit of" in line and "`flag` route is tried now" in line
    assert read_manifest(tmp_path / "out").route.failed_before == route.failed_before
    assert "The `carrier` route failed its proof" in (tmp_path / "out" / "README.md").read_text()

    monkeypatch.undo()
    forced = build_recipe(recipe, tmp_path / "forced", "route=flag")
    assert forced.patch.route.failed_before == []
    for file in (tmp_path / "forced").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()


@pytest.mark.slow
def test_a_constant_that_is_short_gives_way(tmp_path: Path) -> None:
    """A real case: a large epsilon beside a small residual stream, where a norm's constant cannot be right."""
    layer = default_checkpoint(tmp_path / "base", "ernie4_5", rms_norm_eps=1e-2)
    keys = {"prefer": "same_model_type"}
    recipe = write_recipe(tmp_path / "recipe.yaml", tmp_path / "base", layer, tmp_path / "out", **keys)
    result = build_recipe(recipe, tmp_path / "out")
    assert result.patch.route.name == "flag" and result.patch.verification[0].passed


@pytest.mark.parametrize(
    "spoil",
    [halved, torch.zeros_like, torch.neg, lambda tensor: tensor * 1.05],
    ids=["halved", "dropped", "negated", "5 % too long"],
)
@pytest.mark.slow_but("dropped")
def test_what_is_wrong_never_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    """With every exact route spoilt there is no copy; the refusal has the numbers of each."""
    recipe = recipe_of(tmp_path, ERNIE)
    written = break_routes(monkeypatch, EXACT, spoil)
    with pytest.raises(CheckFailed) as caught:
        build_recipe(recipe, tmp_path / "out")
    assert nothing_is_left(tmp_path) and written == ["carrier", "flag", "relabel"]
    told = str(caught.value)
    each = told[told.index("`carrier`: ") :].replace("; `relabel`: ", "; `flag`: ").split("; `flag`: ")
    assert len(each) == 3 and all("stored vector: " in one or "residual stream: " in one for one in each)
    assert "no exact route for this edit is steered as a hook steers the base" in told
    assert caught.value.code == "verification"


@pytest.mark.slow
def test_a_forced_route_is_refused_with_the_next_best_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways that the remedy names are followed."""
    recipe = recipe_of(tmp_path, ERNIE, route="carrier")
    written = break_routes(monkeypatch, ["carrier"])
    with pytest.raises(CheckFailed) as caught:
        build_recipe(recipe, tmp_path / "out")
    assert written == ["carrier"] and nothing_is_left(tmp_path)
    remedy = caught.value.problems[0].remedy
    assert remedy is not None and "write `route: flag`, or `route: auto`" in remedy and "report" not in remedy
    assert build_recipe(recipe, tmp_path / "out", "route=flag").patch.route.failed_before == []
    by_itself = build_recipe(recipe, tmp_path / "other", "route=auto").patch.route
    assert by_itself.name == "flag" and [route.name for route in by_itself.failed_before] == ["carrier"]


@pytest.mark.slow
def test_a_failure_that_nothing_explains_says_where_to_report_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(tmp_path, GPT2, route="native")
    break_routes(monkeypatch, EXACT)
    with pytest.raises(CheckFailed) as caught:
        build_recipe(recipe, tmp_path / "out", "route=auto")
    assert nothing_is_left(tmp_path)
    remedy = caught.value.problems[0].remedy
    assert remedy is not None and "report it at https://" in remedy and "config.json" in remedy


@pytest.mark.slow
def test_the_command_says_it_to_those_who_ask_for_quiet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_of(tmp_path, ERNIE)
    break_routes(monkeypatch, ["carrier"])
    code, out, told = runner(capsys)(recipe, "-q", "--json")
    assert code == 0, told
    answer = json.loads(out)
    assert [route["name"] for route in answer["manifest"]["route"]["failed_before"]] == ["carrier"]
    timings = answer["timings"]
    assert sum(seconds for name, seconds in timings.items() if name != "total") == pytest.approx(timings["total"])
    assert "the `carrier` route failed its proof" in told and "writing the copy" not in told


def test_a_manifest_from_before_is_read(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "base", LLAMA)
    content = {"format": 1, "route": {"name": "flag", "architecture": "LlamaForCausalLM"}}
    assert Manifest.model_validate(content).route.failed_before == []
