"""Who builds, and how their turns are taken."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from build_parts.material import Questions
from build_parts.whole_process import Cost, run
from capture_parts.setting import progress
from capture_parts.worker_process import REPOSITORY, interpreter

SCRIPTS = Path(__file__).parents[1] / "build_scripts"
OURS, AGAIN, BY_HAND = "patch-model", "patch-model, once more", "the script"
LIBRARY = "steering-vectors + save_pretrained"
COEFFICIENT = 4
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


@dataclass(frozen=True)
class Task:
    """One thing that all of them build.

    Attributes:
        shape, dtype: names of the base's.
        base: its folder.
        parameters: how many it has.
        questions: what the vector is made of.
        layer: the block that is steered.
    """

    shape: str
    dtype: str
    base: Path
    parameters: int
    questions: Questions
    layer: int

    @property
    def title(self) -> str:
        size = self.shape.replace("b", " B")
        return f"{size}, {self.dtype}, {self.questions.tokens:.0f} tokens a prompt"


@dataclass
class Turns:
    """What each builder's turns cost: ``costs``, and seconds by stage in ``stages``; ``parts`` are those of ours."""

    costs: dict[str, list[Cost]] = field(default_factory=dict)
    stages: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    parts: list[dict[str, dict[str, float]]] = field(default_factory=list)

    def add(self, name: str, cost: Cost, stages: dict[str, float]) -> None:
        self.costs.setdefault(name, []).append(cost)
        self.stages.setdefault(name, []).append(stages)

    def best(self, name: str) -> Cost:
        return min(self.costs[name], key=lambda cost: cost.wall)

    def stages_of_best(self, name: str) -> dict[str, float]:
        return self.stages[name][self.costs[name].index(self.best(name))]

    def parts_of_best(self) -> dict[str, dict[str, float]]:
        return self.parts[self.costs[OURS].index(self.best(OURS))]

    def median(self, name: str) -> float:
        return statistics.median(cost.wall for cost in self.costs[name])

    def record(self) -> dict[str, Any]:
        costs = {name: [asdict(cost) | {"output": None} for cost in each] for name, each in self.costs.items()}
        return {"costs": costs, "stages": self.stages, "parts": self.parts}


def contest(task: Task, peers: Path, scratch: Path, repeats: int, *, device: str, again: bool) -> Turns:
    """Let everybody build it, in turns; ours has an empty cache each time, and once the one that it left."""
    turns = Turns()
    for turn in range(repeats):
        cache = scratch / f"cache-{turn}"
        for name in (OURS, BY_HAND, LIBRARY, *([AGAIN] if again and turn == 0 else [])):
            _read_through(task.base)
            if name in (OURS, AGAIN):
                cost, found = build(recipe(task, scratch, device), scratch, cache, device)
                stages = {stage: seconds for stage, seconds in found["timings"].items() if stage != "total"}
                if name == OURS:
                    turns.parts.append(found["timing_parts"])
                # The interpreter's end.
                stages["rest of the process"] = cost.wall - found["timings"]["total"]
            else:
                python = interpreter("ours" if name == BY_HAND else "steering-vectors", peers)
                if python is None:
                    continue
                file = "by_hand" if name == BY_HAND else "with_steering_vectors"
                cost, stages = script(file, python, task, scratch, device)
                stages["rest of the process"] = cost.wall - sum(stages.values())
            turns.add(name, cost, stages)
            progress(f"{task.title}, turn {turn + 1} of {repeats}: {name}: {cost.wall:.1f} s")
        shutil.rmtree(cache, ignore_errors=True)
    return turns


def recipe(task: Task, scratch: Path, device: str) -> Path:
    """The shortest one: everything else is the default."""
    path = scratch / "recipe.yaml"
    vector = {"name": "agree", "pairs": str(task.questions.file), "layer": task.layer, "coefficient": COEFFICIENT}
    found = {"model": str(task.base), "vectors": [vector], **({} if device == "cpu" else {"device": device})}
    path.write_text(json.dumps(found), encoding="utf-8")
    return path


def build(recipe: Path, scratch: Path, cache: Path, device: str = "cpu") -> tuple[Cost, dict[str, Any]]:
    """The default build, as it is typed; what it said as JSON."""
    output = scratch / "output"
    command = [sys.executable, "-m", "patcher", recipe, "--output", output, "--json"]
    variables = {"PYTHONPATH": str(REPOSITORY), "PATCH_MODEL_CACHE": str(cache), **_variables(device)}
    cost = run(command, variables=variables, folder=scratch)
    _remove(output)
    return cost, json.loads(cost.output)


def script(name: str, python: Path, task: Task, scratch: Path, device: str) -> tuple[Cost, dict[str, float]]:
    """One of ``build_scripts``; its seconds by stage."""
    output = scratch / "output"
    command = [python, "-I", SCRIPTS / f"{name}.py", task.base, task.questions.read, output]
    command += [str(task.layer), str(COEFFICIENT), DTYPES[task.dtype], device]
    cost = run(command, variables=_variables(device), folder=scratch)
    _remove(output)
    return cost, json.loads(cost.output.splitlines()[-1])


def _variables(device: str) -> dict[str, str]:
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    return {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore", **hidden}


def _remove(output: Path) -> None:
    shutil.rmtree(output)
    # What one leaves to the disk, the next one would pay for.
    os.sync()


def _read_through(folder: Path) -> None:
    """Everybody reads the base from memory."""
    for file in folder.iterdir():
        with file.open("rb", buffering=0) as handle:
            while handle.read(1 << 24):
                pass
