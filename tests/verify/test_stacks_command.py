"""`verify --stack`, and builds that ask for stacks, where none but transformers is installed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from support.building import build_recipe
from support.tiny_models import tiny_checkpoint, write_recipe

from patcher.build.result import BuildResult
from patcher.cli import main
from patcher.errors import InputError, OutsideError
from patcher.patched.schema import Manifest
from patcher.publish.contents import check_verified
from patcher.recipe.file import load_recipe
from patcher.stacks.environments import Environment
from patcher.verify import all_stacks
from patcher.verify.of_build import stacks_of


@pytest.fixture(autouse=True)
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("PATCH_MODEL_VLLM", "PATCH_MODEL_LLAMA_CPP"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATCH_MODEL_CACHE", str(tmp_path / "cache"))


def status_of(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


def printed(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    checks: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["checks"]
    return checks


def test_a_stack_that_is_not_installed_is_not_checked_and_status_3(
    built: tuple[Path, BuildResult], capsys: pytest.CaptureFixture[str]
) -> None:
    _, result = built
    assert status_of("verify", result.output, "--stack", "vllm", "--json") == 3
    (entry,) = printed(capsys)
    assert (entry["stack"], entry["status"], entry["passed"]) == ("vllm", "not_checked", False)
    assert "not installed" in entry["note"] and "stacks install vllm" in entry["remedy"]


def test_all_is_one_table_and_status_3_where_one_is_missing(
    built: tuple[Path, BuildResult], capsys: pytest.CaptureFixture[str]
) -> None:
    _, result = built
    assert status_of("verify", result.output, "--stack", "all") == 3
    shown = capsys.readouterr().out
    assert shown.count("verified in") == 1
    assert re.search(r"transformers [\d.]+ +passed", shown) and re.search(r"vllm +not checked", shown)
    assert re.search(r"llama.cpp +not checked", shown) and "patch-model stacks install llama.cpp" in shown
    assert status_of("verify", result.output, "--stack", "installed") == 0


def test_a_failed_check_is_status_1(
    built: tuple[Path, BuildResult], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    _, result = built
    folder = tmp_path / "broken"
    shutil.copytree(result.output, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "mlp_bias": False}))
    assert status_of("verify", folder, "--json") == 1
    assert printed(capsys)[0]["status"] == "failed"


def test_a_wrong_place_is_status_2_before_anything_runs(built: tuple[Path, BuildResult]) -> None:
    _, result = built
    assert status_of("verify", result.output, "--stack", "vllm", "--vllm", "/nowhere") == 2


def recipe_of(tmp_path: Path, **keys: Any) -> Path:
    layer = tiny_checkpoint(tmp_path / "base", "meta-llama--Llama-3.2-1B")
    return write_recipe(tmp_path / "recipe.yaml", tmp_path / "base", layer, tmp_path / "out", **keys)


def test_a_build_that_lists_a_stack_is_refused_before_any_work(tmp_path: Path) -> None:
    path = recipe_of(tmp_path, verify={"stacks": ["transformers", "vllm"]})
    with pytest.raises(OutsideError) as caught:
        build_recipe(path, tmp_path / "out", say=lambda _line: pytest.fail("work") if "load" in _line else None)
    assert caught.value.code == "no_stack" and not (tmp_path / "out").exists()


def test_installed_records_what_was_not_checked(tmp_path: Path) -> None:
    targets = ["transformers", "vllm", "llama.cpp"]
    path = recipe_of(tmp_path, targets=targets, verify={"stacks": "installed"})
    manifest = build_recipe(path, tmp_path / "out").manifest
    assert [(entry["stack"], entry["status"]) for entry in manifest["verification"]] == [
        ("transformers", "passed"), ("vllm", "not_checked"), ("llama.cpp", "not_checked")
    ]  # fmt: skip
    assert str(tmp_path / "cache") not in json.dumps(manifest["verification"])
    assert manifest["route"]["oldest"] == {"transformers": "4.41.0", "vllm": "0.27.0", "llama.cpp": "b8672"}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| 4.41.0 |" in card and "vllm: not installed where the copy was made" in card
    assert re.search(r"\| vllm \| yes \|.*\*\*not checked\*\*", card)
    check_verified(Manifest.model_validate(manifest), tmp_path / "out")


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, ["transformers"]),
        ({"verify": {"stacks": "installed"}}, ["transformers"]),
        ({"targets": ["llama.cpp"], "verify": {"stacks": "installed"}}, ["transformers", "llama.cpp"]),
        ({"targets": ["llama.cpp"]}, ["transformers"]),
        ({"verify": {"stacks": ["vllm"]}}, ["transformers", "vllm"]),
    ],
)
def test_which_stacks_a_build_runs(tmp_path: Path, keys: dict[str, Any], expected: list[str]) -> None:
    path = write_recipe(tmp_path / "recipe.yaml", tmp_path / "base", 1, tmp_path / "out", **keys)
    assert stacks_of(load_recipe(path).recipe) == expected


@pytest.mark.parametrize("stacks", [[], ["onnx"], "all"])
def test_other_values_of_the_key_are_refused(tmp_path: Path, stacks: object) -> None:
    with pytest.raises(InputError, match=r"verify\.stacks"):
        load_recipe(recipe_of(tmp_path, verify={"stacks": stacks}))


@pytest.mark.slow
def test_a_stack_that_fails_stops_the_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program in vLLM's place, that cannot load the folder."""
    import sys

    from patcher.errors import CheckFailed
    from patcher.verify.stack_jobs import Process

    runner = tmp_path / "runner.py"
    runner.write_text(
        "import json, sys, torch\nfrom pathlib import Path\nfrom safetensors.torch import save_file\n"
        "request = json.loads(Path(sys.argv[1]).read_text())\nresults = Path(request['results'])\n"
        "(results / 'process.json').write_text(json.dumps({'version': '1', 'detail': ''}))\n"
        "for job in request['jobs']:\n"
        "    save_file({}, results / (job['name'] + '.safetensors'))\n"
        "    told = 'no bias in ' + job['folder'] if job['name'] == 'copy' else None\n"
        "    (results / (job['name'] + '.json')).write_text(json.dumps({'error': told}))\n"
    )
    place = Environment("vllm", "test", runner, Path(sys.executable), "1")
    real = all_stacks.find
    monkeypatch.setattr(all_stacks, "find", lambda stack, given=None: place if stack == "vllm" else real(stack, given))
    started = Process([sys.executable, str(runner)], {}, {})
    monkeypatch.setattr(all_stacks, "PROCESSES", {"vllm": lambda _environment: started})
    path = recipe_of(tmp_path, verify={"stacks": ["vllm"]})
    with pytest.raises(CheckFailed, match="in stock vllm 1") as caught:
        build_recipe(path, tmp_path / "out")
    assert "no bias in DIR" in str(caught.value) and str(tmp_path / "base") not in str(caught.value.problems[0].found)
    assert not (tmp_path / "out").exists()
