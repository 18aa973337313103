"""The benchmark of a whole build runs, and what it says of its contenders is true. Nothing is said about time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from support.benchmark_runs import run_benchmark
from transformers import AutoModelForCausalLM

BENCHMARKS = Path(__file__).parent
sys.path.insert(0, str(BENCHMARKS))

from build_parts.material import checkpoints, make_questions, make_tokenizer  # noqa: E402
from build_parts.whole_process import run  # noqa: E402

MIB = 1 << 20


@pytest.fixture(scope="module")
def encoder():
    return make_tokenizer(3000)


def test_questions_are_the_same_each_time_and_as_many_as_asked(tmp_path, encoder):
    first, second = (make_questions(tmp_path / name, 50, long=False, encoder=encoder) for name in ("one", "other"))
    assert first.file.read_bytes() == second.file.read_bytes()
    rows = [json.loads(line) for line in first.file.read_text().splitlines()]
    assert len({row["question"] for row in rows}) == 50
    assert len(first.read.read_text().splitlines()) == first.pairs == 40
    long = make_questions(tmp_path / "long", 50, long=True, encoder=encoder)
    assert long.tokens > 2 * first.tokens


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="processes are looked at in /proc")
def test_the_cost_is_that_of_all_processes(tmp_path):
    waiting = "import sys; held = b'x' * (80 << 20); print(flush=True); sys.stdin.read()"
    program = (
        f"import subprocess, sys, time; both = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE); "
        f"child = subprocess.Popen([sys.executable, '-c', {waiting!r}], **both); child.stdout.readline()\n"
        "end = time.process_time() + 0.3\nwhile time.process_time() < end: pass\nheld = b'x' * (40 << 20)\n"
        "time.sleep(0.5); child.stdin.close(); child.wait(); print('done')"
    )
    cost = run([sys.executable, "-c", program], variables={}, folder=tmp_path)
    assert cost.output == "done\n" and cost.processes == 2
    assert cost.cpu >= 0.3 and cost.wall >= 0.3
    assert 80 * MIB < cost.largest < 120 * MIB < cost.together
    with pytest.raises(RuntimeError, match="no such thing"):
        run([sys.executable, "-c", "raise SystemExit('no such thing')"], variables={}, folder=tmp_path)


@pytest.mark.slow
def test_the_script_makes_the_vector_and_stock_qwen2_drops_it(tmp_path, encoder):
    base = checkpoints(tmp_path / "base", "tiny", ["float32"], encoder, "cpu")["float32"]
    questions = make_questions(tmp_path / "questions", 10, long=False, encoder=encoder)
    command = [
        sys.executable,
        "-I",
        BENCHMARKS / "build_scripts" / "by_hand.py",
        base,
        questions.read,
        tmp_path / "copy",
    ]
    command += ["1", "4", "float32", "cpu"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True)
    assert list(json.loads(done.stdout.splitlines()[-1])) == ["start", "load", "read", "save"]
    with safe_open(tmp_path / "copy" / "model.safetensors", "pt") as file:
        saved = file.get_tensor("model.layers.1.mlp.down_proj.bias")
    assert torch.allclose(saved, vector(tmp_path, base, questions.file), atol=1e-3)
    loaded, told = AutoModelForCausalLM.from_pretrained(tmp_path / "copy", output_loading_info=True)
    assert told["unexpected_keys"] == {"model.layers.1.mlp.down_proj.bias"}
    assert loaded.model.layers[1].mlp.down_proj.bias is None


def vector(folder: Path, base: Path, questions: Path) -> torch.Tensor:
    """Ours, of the same recipe, times its coefficient."""
    spec = {"name": "agree", "pairs": str(questions), "layer": 1, "coefficient": 4}
    recipe = {"model": str(base), "vectors": [spec], "evaluate": {"pictures": False, "generate_tokens": 0}}
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS.parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "patcher", str(folder / "recipe.yaml"), "--output", str(folder / "ours")]
    subprocess.run(command, env=environment, capture_output=True, check=True)
    with safe_open(folder / "ours" / "steering.safetensors", "pt") as file:
        (name,) = file.keys()
        return file.get_tensor(name)


@pytest.mark.slow
def test_the_page(tmp_path):
    options = ("--tiny", "--questions", 10, "--repeats", 1, "--no-quickstart", "--peers", tmp_path / "none")
    run_benchmark(BENCHMARKS / "build.py", tmp_path, *options)
    page = (tmp_path / "page.md").read_text()
    assert page.startswith("# Performance: what a build costs")
    (row,) = (line for line in page.splitlines() if line.startswith("| steering-vectors + save_pretrained"))
    assert "not run" in row
    assert str(tmp_path) not in page.replace(str(tmp_path / "page.md"), "")
    record = json.loads((tmp_path / "record.json").read_text())
    (task,) = (each for name, each in record.items() if name.startswith("tiny"))
    (cost,), (stages,) = task["costs"]["patch-model"], task["stages"]["patch-model"]
    assert sum(stages.values()) == pytest.approx(cost["wall"])
    assert not [item.name for item in tmp_path.iterdir() if item.name.startswith("build-benchmark")], (
        "something is left"
    )
