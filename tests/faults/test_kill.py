"""Builds that are killed: the output is absent or whole, the base is untouched, the next build tidies up.

``PATCH_MODEL_KILLS`` sets how many moments of the write phase are tried in each mode (default 12; 0 is all of them).
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.tiny_models import sharded_llama, write_recipe
from transformers import AutoModelForCausalLM

from patcher.architectures.model_class import quiet_transformers

ROOT = Path(__file__).parents[2]
KILLS = int(os.environ.get("PATCH_MODEL_KILLS", "12"))
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def heed_interrupts() -> None:
    """For a child: tests that were started with nohup, or in the background, ignore SIGINT and would hand that down."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(item.relative_to(folder)): item.read_bytes() for item in sorted(folder.rglob("*")) if item.is_file()}


def assert_loads(folder: Path) -> None:
    with quiet_transformers():
        _model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in several shards, with a tokenizer."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    folder = sharded_llama(tmp_path_factory.mktemp("model") / "base", "40KB", noise=0.1, **sizes)
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


# The write phase, stopped at every kind of step


class WritePhase:
    """Runs of write_phase.py on one base, in a folder that holds nothing but outputs."""

    def __init__(self, process: subprocess.Popen[str], base: Path, place: Path) -> None:
        self.process, self.base, self.place = process, base, place
        self.base_before = contents(base)
        self.exchange = True

    def __call__(
        self, output: str = "out", *, version: int = 1, step: int = 0, how: str = "kill", force: bool = False
    ) -> Any:
        job = {
            "base": str(self.base),
            "output": str(self.place / output),
            "version": version,
            "step": step,
            "how": how,
            "force": force,
            "exchange": self.exchange,
        }
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        result = json.loads(self.process.stdout.readline())
        assert contents(self.base) == self.base_before, "the base was touched"
        return result

    def names(self) -> list[str]:
        return sorted(item.name for item in self.place.iterdir())


@pytest.fixture(scope="module")
def process() -> Iterator[subprocess.Popen[str]]:
    script = ROOT / "tests" / "support" / "write_phase.py"
    with subprocess.Popen(
        [sys.executable, str(script)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        preexec_fn=heed_interrupts,
    ) as started:
        yield started
        started.kill()


@pytest.fixture(params=["safetensors", "bin"])
def phase(request: pytest.FixtureRequest, process: subprocess.Popen[str], model: Path, tmp_path: Path) -> WritePhase:
    base = model
    if request.param == "bin":
        base = Path(shutil.copytree(model, tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors*")))
        tensors: dict[str, torch.Tensor] = {}
        for shard in model.glob("*.safetensors"):
            tensors |= load_file(shard)
        torch.save(tensors, base / "pytorch_model.bin")
    (tmp_path / "place").mkdir()
    return WritePhase(process, base, tmp_path / "place")


def moments(steps: int, seed: str) -> list[int]:
    """Which steps to stop at: the last ones, where the output appears, and others by chance."""
    everything = list(range(1, steps + 1))
    if KILLS == 0 or steps <= KILLS:
        return everything
    end = everything[-max(1, KILLS // 3) :]
    return sorted(random.Random(seed).sample(everything[: -len(end)], KILLS - len(end)) + end)


def expected_outputs(phase: WritePhase) -> tuple[dict[int, dict[str, bytes]], int]:
    """What whole outputs of versions 1 and 2 look like, and how many steps a build takes."""
    whole = {}
    for version in (1, 2):
        result = phase(f"whole-{version}", version=version)
        assert result["code"] == 0
        folder = phase.place / f"whole-{version}"
        assert_loads(folder)
        whole[version] = contents(folder)
        shutil.rmtree(folder)
    assert whole[1] != whole[2]
    assert phase.names() == []
    return whole, result["steps"]


@pytest.mark.slow_but("safetensors-kill", "safetensors-interrupt")
@pytest.mark.parametrize("how", ["kill", "interrupt"])
def test_a_new_output(phase: WritePhase, how: str) -> None:
    whole, steps = expected_outputs(phase)
    for step in moments(steps, how):
        result = phase(step=step, how=how)
        output = phase.place / "out"
        assert result["code"] == (-signal.SIGKILL if how == "kill" else 130), f"step {step}"
        left = [name for name in phase.names() if name != "out"]
        assert all(name.startswith(".out.partial-") for name in left)
        if output.exists():
            assert contents(output) == whole[1], f"half an output after step {step}"
        elif how == "interrupt":
            assert left == [], f"left behind after step {step}"
        assert phase(force=True)["code"] == 0
        assert phase.names() == ["out"], f"the next build left something of step {step}"
        assert contents(output) == whole[1]
        shutil.rmtree(output)


@pytest.mark.slow_but("safetensors-kill-renameat2", "safetensors-kill-two renames", "safetensors-interrupt-renameat2")
@pytest.mark.parametrize("exchange", [True, False], ids=["renameat2", "two renames"])
@pytest.mark.parametrize("how", ["kill", "interrupt"])
def test_a_replaced_output(phase: WritePhase, how: str, exchange: bool) -> None:
    whole, _steps = expected_outputs(phase)
    phase.exchange = exchange
    output = phase.place / "out"
    assert phase(version=1)["code"] == 0
    steps = phase(version=2, force=True)["steps"]
    for step in moments(steps, how):
        shutil.rmtree(output)
        assert phase(version=1)["code"] == 0
        phase(version=2, force=True, step=step, how=how)
        if output.exists():
            assert contents(output) in (whole[1], whole[2]), f"half an output after step {step}"
        else:
            assert not exchange, f"no output after step {step}"
            assert how == "kill", f"an interrupt at step {step} took the old output away"
        # Refused or not, the next build puts things in order, and the old output was not lost.
        assert phase(version=2)["code"] == 2
        assert contents(output) in (whole[1], whole[2])
        assert phase(version=2, force=True)["code"] == 0
        assert phase.names() == ["out"], f"the next build left something of step {step}"
        assert contents(output) == whole[2]


# The real build


class Build:
    """``python -m patcher recipe.yaml`` in a folder of its own."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.folder, self.place, self.temporary = folder, folder / "place", folder / "tmp"
        self.base = Path(shutil.copytree(model, folder / "base"))
        self.place.mkdir()
        self.temporary.mkdir()
        self.recipe = write_recipe(folder / "recipe.yaml", self.base, 1, self.place / "out")
        self.base_before = contents(self.base)
        self.groups: list[int] = []

    def start(self) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "patcher", str(self.recipe)],
            cwd=self.folder,
            env={**ENVIRONMENT, "TMPDIR": str(self.temporary)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=heed_interrupts,
        )
        self.groups.append(process.pid)
        return process

    def until(self, process: subprocess.Popen[str], words: str) -> str:
        assert process.stderr is not None
        read = ""
        for line in process.stderr:
            read += line
            if line.startswith(words):
                return read
        raise AssertionError(f"the build ended before {words!r}:\n{read}")

    def end_group(self) -> None:
        """End what a killed build has left running."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.groups[-1], signal.SIGKILL)

    def running(self) -> list[str]:
        """What still runs of the last build (a dead process that nobody has waited for does not)."""
        found = []
        for status in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                name, _, rest = status.read_text().rpartition(")")
                state, _parent, group = rest.split()[:3]
                if int(group) == self.groups[-1] and state != "Z":
                    found.append(name)
        return found

    def names(self) -> list[str]:
        return sorted(item.name for item in self.place.iterdir())

    def assert_sound(self) -> None:
        assert contents(self.base) == self.base_before, "the base was touched"
        output = self.place / "out"
        if output.exists():
            manifest = json.loads((output / "steering.json").read_text())
            assert [entry["status"] for entry in manifest["verification"]] == ["passed"]
            assert_loads(output)


@pytest.fixture
def build(model: Path, tmp_path: Path) -> Iterator[Build]:
    made = Build(model, tmp_path)
    yield made
    for group in made.groups:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)


@pytest.mark.slow
def test_a_killed_build_and_the_next(build: Build) -> None:
    chance = random.Random(0)
    # The copy is written; the reference runs; the candidate runs, or the texts are written, or all is done.
    for words, earliest, latest in (("writing", 0, 0.1), ("verifying", 0, 3), ("verifying", 3, 10)):
        process = build.start()
        build.until(process, words)
        time.sleep(chance.uniform(earliest, latest))
        process.kill()
        process.communicate()
        build.end_group()
        build.assert_sound()
        assert all(name == "out" or name.startswith(".out.partial-") for name in build.names())
        # On a fast machine the kill may come after the end.
        if "out" in build.names():
            shutil.rmtree(build.place / "out")
    process = build.start()
    _nothing, said = process.communicate()
    assert process.returncode == 0, said
    assert build.names() == ["out"]
    build.assert_sound()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("words", ["reading the model's config", "verifying: the base"])
def test_an_interrupted_build_leaves_nothing(build: Build, number: int, words: str) -> None:
    process = build.start()
    build.until(process, words)
    time.sleep(0.5)
    # Ctrl-C reaches all processes of the terminal, `kill` one.
    send: Callable[[int, int], None] = os.killpg if number == signal.SIGINT else os.kill
    send(process.pid, number)
    _nothing, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "Traceback" not in said
    assert "interrupted" in said
    assert build.names() == []
    assert build.running() == []
    assert list(build.temporary.iterdir()) == []
    build.assert_sound()
