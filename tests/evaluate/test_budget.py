"""What a build spends on measuring is counted, and stays within what the recipe allows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.building import build_recipe
from support.command_line import Run, runner
from support.sweep_reference import LETTERS, NEUTRAL, PAIRS
from support.tiny_models import tiny_checkpoint

from patcher.build import base_run
from patcher.capture import opened
from patcher.capture.layout import distinct_tokens
from patcher.demo.write import write_demo
from patcher.errors import CheckFailed
from patcher.evaluate.budget import FLOOR, most_within
from patcher.patched.reading import read_manifest

LLAMA = "meta-llama--Llama-3.2-1B"


class Counted:
    """Tokens that the loaded base's MLPs see, over its blocks: before the evaluation, and from then on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.capture, self.evaluation, self.evaluating = 0.0, 0.0, False
        load, evaluate = opened.load_causal_lm, base_run.evaluate_build

        def loading(*arguments: Any, **options: Any) -> Any:
            model, tokenizer = load(*arguments, **options)
            blocks = model.model.layers
            for block in blocks:
                block.mlp.register_forward_hook(lambda _module, _inputs, found: self.add(found, len(blocks)))
            return model, tokenizer

        def evaluating(*arguments: Any) -> Any:
            self.evaluating = True
            return evaluate(*arguments)

        monkeypatch.setattr(opened, "load_causal_lm", loading)
        monkeypatch.setattr(base_run, "evaluate_build", evaluating)

    def add(self, found: Any, blocks: int) -> None:
        tokens = found.shape[0] * found.shape[1] / blocks
        if self.evaluating:
            self.evaluation += tokens
        else:
            self.capture += tokens


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("budget") / "base"
    tiny_checkpoint(folder, LLAMA)
    return folder


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Run:
    return runner(capsys)


def recipe(folder: Path, base: Path, rows: list[dict[str, str]], **evaluate: Any) -> Path:
    (folder / "pairs.json").write_text(json.dumps(rows))
    vector = {"name": "love", "pairs": "pairs.json", "layer": 0, "scale": "residual", "coefficient": 0.5}
    keys = {"model": str(base), "vectors": [vector], "evaluate": {"pictures": False, **evaluate}}
    (folder / "recipe.yaml").write_text(json.dumps(keys))
    return folder / "recipe.yaml"


def long(rows: list[dict[str, str]], times: int, copies: int = 1) -> list[dict[str, str]]:
    """Each with a beginning of its own, ``times`` as long."""
    return [
        {key: f"{copy} {place} " * times + text if key in ("prompt", "question") else text for key, text in row.items()}
        for copy in range(copies)
        for place, row in enumerate(rows)
    ]


MANY = {"few": PAIRS, "lettered": LETTERS, "long": long(PAIRS, 30), "long lettered": long(LETTERS, 20, 4)}


@pytest.mark.parametrize("rows", MANY.values(), ids=MANY)
def test_the_default_spends_about_what_capturing_does(
    base: Path, rows: list[dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = Counted(monkeypatch)
    manifest = build_recipe(recipe(tmp_path, base, rows), tmp_path / "out", cache=False).manifest
    found = manifest["evaluation"]["budget"]
    assert 0 < counted.evaluation <= 1.2 * max(counted.capture, FLOOR)
    # What the manifest says is what was computed.
    assert found["spent"] == pytest.approx(counted.evaluation, abs=0.1) and found["outside"] == 0
    assert found["allowed"] == pytest.approx(max(FLOOR, found["capture"]), abs=0.1)
    assert found["capture"] <= counted.capture
    # All that the name of the budget promises was measured.
    result = manifest["evaluation"]
    assert result["guard"]["kl"] > 0 and len(result["random"]) >= 1 and result["distinguishable"] is not None
    assert result["shift_low"] <= result["shift"] <= result["shift_high"]
    assert result["shift"] == pytest.approx(result["steered"] - result["base"])
    [line] = [note for note in manifest["notes"] if "evaluate.budget" in note]
    assert "no curve over coefficients" in line and "`evaluate.budget: full` measures all of it" in line
    assert all(cut in line for cut in found["cut"])


@pytest.mark.slow
def test_more_budget_cuts_less(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, spent, found = long(PAIRS, 30), [], []
    for number, budget in enumerate((0.5, 1, 3, "full")):
        counted = Counted(monkeypatch)
        folder = tmp_path / str(number)
        folder.mkdir()
        manifest = build_recipe(recipe(folder, base, rows, budget=budget), folder / "out", cache=False).manifest
        spent.append(counted.evaluation)
        found.append(manifest["evaluation"])
        assert budget == "full" or counted.evaluation <= 1.2 * budget * max(counted.capture, FLOOR)
        monkeypatch.undo()
    assert spent == sorted(spent)
    assert [entry["pairs"] for entry in found] == sorted(entry["pairs"] for entry in found)
    full = found[-1]
    assert full["budget"]["cut"] == [] and full["budget"]["allowed"] is None
    assert len(full["random"]) == 3 and full["negative"] is not None and full["curve"] and full["generations"]
    assert "curve" not in found[0] and found[0]["generations"] == [] and found[0]["negative"] is None


def test_what_is_asked_for_by_name_does_not_count(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "on.txt").write_text("\n".join(NEUTRAL))
    counted = Counted(monkeypatch)
    keys = {"prompts": ["I would"], "generate_tokens": 5, "on_topic": "on.txt"}
    found = build_recipe(recipe(tmp_path, base, PAIRS, **keys), tmp_path / "out", cache=False).manifest["evaluation"]
    assert found["budget"]["outside"] > 5 * 3 and found["perplexity"]["on_topic"]["base"] > 1
    assert found["budget"]["spent"] + found["budget"]["outside"] == pytest.approx(counted.evaluation, abs=0.2)
    assert [variant["name"] for variant in found["generations"][0]["variants"]] == ["base", "steered", "negative"]


@pytest.mark.slow
def test_strict_refuses_what_was_not_compared_and_its_remedy_works(tmp_path: Path, command: Run) -> None:
    path = write_demo(tmp_path / "demo")
    keys = ("evaluate.budget=0.01", "evaluate.generate_tokens=0", "evaluate.pictures=false")
    sets = [part for key in keys for part in ("--set", key)]
    code, out, _err = command(path, "-o", tmp_path / "out", *sets)
    assert code == 0 and "not compared" in " ".join(out.split())
    result = read_manifest(tmp_path / "out").evaluation
    assert result is not None and result.controls == [] and result.distinguishable is None
    assert result.budget is not None and any("random vector" in cut for cut in result.budget.cut)
    assert "was not compared with random vectors" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(CheckFailed) as caught:
        build_recipe(path, tmp_path / "strict", *keys, strict=True)
    assert "no random vector was measured beside it" in str(caught.value)
    assert "--set evaluate.budget=full" in str(caught.value.problems[0].remedy)
    more = build_recipe(path, tmp_path / "more", *keys, "evaluate.budget=full", strict=True).manifest["evaluation"]
    assert len(more["random"]) == 3 and more["distinguishable"] is True


@pytest.mark.parametrize("budget", ["-1", "0", "half", "true"])
def test_a_budget_that_is_none(base: Path, tmp_path: Path, budget: str, command: Run) -> None:
    code, _out, err = command(recipe(tmp_path, base, PAIRS), "--set", f"evaluate.budget={budget}")
    assert code == 2 and "evaluate.budget" in err


def test_distinct_tokens() -> None:
    assert distinct_tokens([(1, 2, 3), (1, 2, 4), (5,), (1, 2, 3)]) == 5
    assert distinct_tokens([]) == 0


def test_most_within() -> None:
    assert most_within(10, lambda count: count * count, 50) == 7
    assert most_within(10, lambda count: count, 100) == 10
    assert most_within(10, lambda count: count, -3) == 1
    assert most_within(10, lambda count: count, 0.5, least=0) == 0
