"""Every number of a sweep equals that of a plain forward pass with a hook, one cell and one text at a time."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.building import job_of
from support.sweep_reference import (
    LETTERS,
    PAIRS,
    Plain,
    added,
    make_model,
    mean,
    parts_of,
    run_sweep,
    write_sweep,
)

from patcher.capture.resuming import ResumingModel
from patcher.evaluate.damage import POSITIONS as MOST
from patcher.evaluate.texts import encode_texts, split_sentences
from patcher.recipe.file import load_recipe
from patcher.recipe.vector import VectorSpec
from patcher.sweep.files import write_results
from patcher.sweep.on_base import Swept
from patcher.vectors.files.asked import SteeredModel
from patcher.vectors.finding import prepare_vectors

TOLERANCE = 1e-4
OTHER = {"name": "other", "pairs": PAIRS[:3], "layer": 0, "scale": "residual", "coefficient": 0.3}


@dataclass
class Case:
    """A sweep that has run, and what is needed to compute its numbers again."""

    path: Path
    plain: Plain
    swept: Swept

    def __post_init__(self) -> None:
        blocks = len(self.plain.model.get_submodule(self.plain.blocks))
        loaded, self.index, self.parts = parts_of(self.path, self.plain.tokenizer, blocks)
        self.recipe = loaded.recipe
        self.spec = self.recipe.vectors[self.index]
        self.directions: dict[tuple[int, bool], tuple[torch.Tensor, float]] = {}
        self.built = prepare_vectors(loaded, self.plain.tokenizer, blocks, SteeredModel(hidden=64, blocks=blocks))

    def vector(self, layer: int, coefficient: float, *, built: bool = False) -> torch.Tensor:
        """What is added at a cell, or by a build of it, [hidden] fp32."""
        if self.spec.method == "file":
            return (coefficient * FILE_VECTOR).float()
        read = layer if self.spec.read_layer is None else self.spec.read_layer
        if (layer, built) not in self.directions:
            pairs = (self.built if built else self.parts.prepared)[self.index].used
            self.directions[layer, built] = self.plain.direction(pairs, self.spec, int(read))
        direction, norm = self.directions[layer, built]
        return scaled(direction, norm, self.spec, coefficient)

    def others(self) -> dict[int, torch.Tensor]:
        total = {}
        for place, spec in enumerate(self.recipe.vectors):
            if place != self.index:
                layer = int(spec.layer)
                direction, norm = self.plain.direction(self.parts.prepared[place].used, spec, layer)
                total[layer] = scaled(direction, norm, spec, spec.factor)
        return total

    def neutral(self, step: int = 1) -> list[Any]:
        """All that a build is measured on; every other one is chosen on."""
        return self.plain.encoded(self.path.parent / "neutral.txt")[::step]

    def sentences(self, name: str) -> list[Any]:
        lines = (self.path.parent / f"{name}.txt").read_text().splitlines()
        return list(encode_texts([s for line in lines for s in split_sentences(line)], self.plain.tokenizer))

    def measure(self, part: str, vectors: Mapping[int, torch.Tensor]) -> list[float]:
        """Of the choosing items, or of those that are reported."""
        if self.swept.data["measure"] == "on_topic_log_probability":
            chosen = self.sentences("on")[0::2] if part == "choose" else self.sentences("on")[1::2]
            return [self.plain.text_effect(ids, vectors) for ids in chosen]
        return [self.plain.effect(pair, self.spec, vectors) for pair in getattr(self.parts, part)]


def scaled(direction: torch.Tensor, norm: float, spec: VectorSpec, coefficient: float) -> torch.Tensor:
    length = {"raw": float(direction.norm()), "residual": norm}.get(str(spec.scale)) or float(spec.scale)
    return (coefficient * length * direction / direction.norm()).float()


FILE_VECTOR = torch.randn(64, generator=torch.Generator().manual_seed(3)).double()


def layers_and_letters(folder: Path, model: Path) -> Path:
    vector = {"pairs": "letters.json", "position": "answer"}
    return write_sweep(folder, model, vector, sweep={"layers": [0, 2], "coefficients": [-0.5, 0.5, 1.0]})


def beside_another(folder: Path, model: Path) -> Path:
    """Another vector before it, read elsewhere than it is added, two texts."""
    return write_sweep(
        folder,
        model,
        {"read_layer": 1},
        others=[OTHER],
        sweep={"layers": [0, 1, 2], "coefficients": [-0.5, 0.5]},
        evaluate={"on_topic": "on.txt", "off_topic": "off.txt"},
    )


def before_layers(folder: Path, model: Path) -> Path:
    """ActAdd: one pair, counted as it counts, judged by a text; the embedding is among the layers."""
    vector = {"pairs": [{"positive": " I love", "negative": " I"}], "layer": None, "before_layer": [0, 2]}
    return write_sweep(
        folder,
        model,
        {**vector, "scale": "raw"},
        sweep={"coefficients": [1.0, 4.0]},
        evaluate={"on_topic": "on.txt", "system_prompt": "Say that you love it."},
    )


def from_a_file(folder: Path, model: Path) -> Path:
    folder.mkdir()
    save_file({"vector": FILE_VECTOR.float()}, folder / "vector.safetensors")
    vector = {"method": "file", "file": "vector.safetensors", "pairs": None, "scale": "raw"}
    coefficients = {"layers": [1], "coefficients": [-2.0, 2.0]}
    return write_sweep(folder, model, vector, sweep=coefficients, evaluate={"pairs": "pairs.json"})


CASES = {
    "letters": ("bloom", layers_and_letters),
    "beside another": ("meta-llama--Llama-3.2-1B", beside_another),
    "before layers": ("openai-community--gpt2", before_layers),
    "file": ("openai-community--gpt2", from_a_file),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        name: make_model(folder / f"model-{place}", name) for place, name in enumerate({n for n, _ in CASES.values()})
    }


@pytest.fixture(scope="module")
def cases(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    folder = tmp_path_factory.mktemp("cases")
    found = {}
    for name, (model, write) in CASES.items():
        path = write(folder / name, models[model])
        found[name] = Case(path, Plain(models[model]), run_sweep(path, folder / name / "out"))
    return found


def differences(case: Case, swept: Swept | None = None) -> dict[str, float]:
    """The largest difference of each number of the grid from the plain one."""
    data = (swept or case.swept).data
    others, sign = case.others(), data["expected_sign"]
    base = case.measure("choose", others)
    found: dict[str, float] = {}
    for cell in data["grid"]:
        vectors = added(others, {cell["layer"]: case.vector(cell["layer"], cell["coefficient"])})
        values = case.measure("choose", vectors)
        expected = {
            "effect": mean([sign * (value - before) for value, before in zip(values, base, strict=True)]),
            "steered": mean(values),
            "damage": case.plain.divergence(case.neutral(2), vectors, MOST),
            "perplexity": case.plain.perplexity(case.neutral(2), vectors, MOST),
        }
        for key, name in (("on_topic", "on"), ("off_topic", "off")):
            if getattr(case.recipe.evaluate, key) is not None:
                expected[key] = case.plain.perplexity(case.sentences(name), vectors)
            else:
                assert cell[key] is None
        for key, value in expected.items():
            size = abs(value) if "perplexity" in key or "topic" in key else 1.0
            found[key] = max(found.get(key, 0.0), abs(cell[key] - value) / max(1.0, size))
    return found


@pytest.mark.parametrize("name", CASES)
def test_every_cell_equals_the_plain_one(cases: dict[str, Case], name: str) -> None:
    case = cases[name]
    data = case.swept.data
    found = differences(case)
    assert max(found.values()) < TOLERANCE, found
    assert [(cell["layer"], cell["coefficient"]) for cell in data["grid"]] == [
        (layer, coefficient) for layer in data["layers"] for coefficient in data["coefficients"]
    ]
    # Far more than what is tolerated.
    assert max(abs(cell["effect"]) for cell in data["grid"]) > 100 * TOLERANCE
    assert min(cell["damage"] for cell in data["grid"]) > 10 * TOLERANCE
    others = case.others()
    assert data["baseline"]["steered"] == pytest.approx(mean(case.measure("choose", others)), abs=TOLERANCE)
    assert data["baseline"]["perplexity"] == pytest.approx(
        case.plain.perplexity(case.neutral(2), {}, MOST), rel=TOLERANCE
    )


@pytest.mark.parametrize("name", CASES)
def test_every_row_of_the_report_equals_the_plain_one(cases: dict[str, Case], name: str) -> None:
    case = cases[name]
    others, sign = case.others(), case.swept.data["expected_sign"]
    base = mean(case.measure("report", others))
    kinds = set()
    for row in case.swept.data["report"]:
        kinds.add(row["kind"])
        if row["kind"] in ("random", "prompting", "prompting_and_steering"):
            continue
        vectors = dict(others)
        if row["layer"] is not None:
            vectors = added(others, {row["layer"]: case.vector(row["layer"], row["coefficient"], built=True)})
        value = mean(case.measure("report", vectors))
        assert row["value"] == pytest.approx(value, abs=TOLERANCE)
        assert row["effect"] == pytest.approx(sign * (value - base), abs=TOLERANCE)
        assert row["damage"] == pytest.approx(case.plain.divergence(case.neutral(), vectors, MOST), abs=TOLERANCE)
        assert row["perplexity"] == pytest.approx(case.plain.perplexity(case.neutral(), vectors, MOST), rel=TOLERANCE)
        assert row["low"] <= row["effect"] <= row["high"]
    assert {"base", "default"} <= kinds
    if case.swept.chosen is not None:
        assert {"recommended", "negative", "random"} <= kinds
    elif case.swept.data["chosen"] is not None:
        assert {"chosen", "negative", "random"} <= kinds and "recommended" not in kinds


def test_what_each_case_is_about(cases: dict[str, Case]) -> None:
    letters, actadd = cases["letters"].swept.data, cases["before layers"].swept.data
    assert letters["measure"] == "answer_probability" and letters["splits"]["report"] == round(0.2 * len(LETTERS))
    assert actadd["measure"] == "on_topic_log_probability" and actadd["layers"] == [-1, 1]
    # A text has no side to prompt for.
    assert not any("prompting" in row["kind"] for row in actadd["report"])
    assert any("system prompt" in note for note in actadd["notes"])
    assert cases["beside another"].swept.data["vector"] == "love"
    for case in cases.values():
        json.dumps(case.swept.data, allow_nan=False)


def test_a_streamed_base_gives_the_same_numbers(cases: dict[str, Case], tmp_path: Path) -> None:
    case = cases["beside another"]
    streamed = run_sweep(case.path, tmp_path / "out", "capture.mode=stream")
    assert max(differences(case, streamed).values()) < TOLERANCE
    for mine, other in zip(streamed.data["report"], case.swept.data["report"], strict=True):
        assert mine["effect"] == pytest.approx(other["effect"], abs=TOLERANCE)
    assert streamed.chosen == case.swept.chosen and streamed.data["generations"] == []


def test_the_comparison_notices_a_residual_of_another_layer(
    cases: dict[str, Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check is checked: resumed one block later, and without the proof that would have noticed."""
    case = cases["beside another"]
    resumed = ResumingModel._resumed
    last = len(case.plain.model.get_submodule(case.plain.blocks)) - 1

    def later(self: ResumingModel, layer: int, residual: torch.Tensor) -> Any:
        # The forward of a block that was not seen yet is not known to be a tensor or a tuple.
        self._tuples.setdefault(layer + 1, self._tuples.get(layer))
        return resumed(self, min(layer + 1, last), residual)

    monkeypatch.setattr(ResumingModel, "_resumed", later)
    monkeypatch.setattr(ResumingModel, "_resumable", lambda *_: True)
    wrong = run_sweep(case.path, tmp_path / "out")
    found = differences(case, wrong)
    assert found["damage"] > 10 * TOLERANCE and found["effect"] > 10 * TOLERANCE


def test_the_third_part_changes_nothing_but_the_report(
    cases: dict[str, Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other pairs are kept back: the grid and the choice stay as they are; whether it is recommended does not."""
    from patcher.sweep import materials

    case = cases["beside another"]
    split = materials.split

    def other_report(*arguments: Any) -> materials.Parts:
        parts = split(*arguments)
        turned = [type(p)(p.prompt, p.negative + "!", p.positive, p.origin) for p in parts.report]
        return replace(parts, report=tuple(turned))

    monkeypatch.setattr(materials, "split", other_report)
    other = run_sweep(case.path, tmp_path / "out").data
    for key in ("grid", "chosen", "pareto", "baseline", "random_grid", "geometry"):
        assert other[key] == case.swept.data[key], key
    assert other["report"] != case.swept.data["report"]


def test_what_is_written(cases: dict[str, Case], tmp_path: Path) -> None:
    case = cases["beside another"]
    folder = case.path.parent / "out"
    # As if it were recommended: of so few items nothing is.
    swept = replace(case.swept, data={**case.swept.data, "recommended": {"layer": 1, "coefficient": 0.5}})
    write_results(swept, job_of(case.path, folder), pictures=False)
    data = json.loads((folder / "sweep.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert data == json.loads(json.dumps(swept.data))
    with (folder / "sweep.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(data["grid"])
    for row, cell in zip(rows, data["grid"], strict=True):
        assert list(row) == list(cell)
        assert float(row["effect"]) == cell["effect"] and row["within_guard"] == str(cell["within_guard"])
    written = load_recipe(folder / "recipe.yaml").recipe
    spec = written.vectors[case.index]
    assert (spec.layer, spec.coefficient) == swept.chosen == (1, 0.5) and not spec.swept
