"""The forks that most tests take for a stock process give what a new interpreter gives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.patched_folders import patch, vector_of, width
from support.stock_processes import StockProcesses
from support.tiny_models import tiny_checkpoint
from support.verified import verify_folder

from patcher.verify import transformers_stack
from patcher.verify.watched import run_watched, watched_command

ROOT = Path(__file__).parents[2]
LLAMA, GPT2 = "meta-llama--Llama-3.2-1B", "openai-community--gpt2"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "broken"), [(LLAMA, True), (GPT2, False)])
def test_a_fork_says_what_a_new_interpreter_says(
    stock_processes: StockProcesses, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, broken: bool
) -> None:
    layer = tiny_checkpoint(tmp_path / "base", name)
    patch(tmp_path / "base", tmp_path / "out", {layer: vector_of(width(tmp_path / "base"), 1, 3.0)})
    if broken:
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        config["mlp_bias"] = False
        (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    before = stock_processes.forks
    found: list[Any] = []
    for runs in (stock_processes, run_watched):
        monkeypatch.setattr(transformers_stack, "run_watched", runs)
        found.append(verify_folder(tmp_path / "out"))
    assert found[0] == found[1]
    assert (found[0]["status"] == "failed") is broken
    # One for both folders; what fails there is run again alone.
    assert stock_processes.forks == before + (2 if broken else 1)


def test_a_program_that_fails(stock_processes: StockProcesses, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text("import sys\nprint('out', sys.argv[1:])\nraise ValueError('of the program')\n")
    command = [*watched_command(sys.executable, program), "a"]
    for runs in (stock_processes, run_watched):
        done = runs(command, os.environ, tmp_path)
        assert done.returncode == 1 and done.stdout == "out ['a']\n" and "ValueError: of the program" in done.stderr


RUN_OF_THE_TESTS = """
import os, sys
from pathlib import Path
import conftest
import torch
from patcher.verify.watched import watched_command
processes = conftest.StockProcesses(os.environ)
done = processes(watched_command(sys.executable, Path(sys.argv[1])), os.environ)
processes.close()
variables = os.environ["OMP_NUM_THREADS"], os.environ["TOKENIZERS_PARALLELISM"]
print(*variables, torch.get_num_threads(), done.stdout, processes.forks)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        pytest.param({}, ("1", "false"), id="by default"),
        pytest.param(
            {"OMP_NUM_THREADS": "2", "TOKENIZERS_PARALLELISM": "true"},
            ("2", "true"),
            id="as the user wants it",
        ),
    ],
)
def test_whoever_runs_the_tests_forks_with_the_threads_of_the_run(
    tmp_path: Path, wanted: dict[str, str], found: tuple[str, str]
) -> None:
    program = tmp_path / "program.py"
    program.write_text("import torch\nprint(torch.get_num_threads())\n")
    inherited = {
        key: value for key, value in os.environ.items() if key not in ("OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM")
    }
    environment = {**inherited, **wanted, "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), str(ROOT)])}
    command = [sys.executable, "-c", RUN_OF_THE_TESTS, str(program)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    *variables, here, in_the_fork, forks = done.stdout.split()
    assert tuple(variables) == found and in_the_fork == here and forks == "1"
    if not wanted:
        assert here == "1"
