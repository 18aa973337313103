"""The forks that most tests take for a stock process give what a new interpreter gives."""

from __future__ import annotations

import json
import os
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

LLAMA, GPT2 = "meta-llama--Llama-3.2-1B", "openai-community--gpt2"


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
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = stock_processes.forks
    found: list[Any] = []
    for runs in (stock_processes, run_watched):
        monkeypatch.setattr(transformers_stack, "run_watched", runs)
        found.append(verify_folder(tmp_path / "out"))
    assert found[0] == found[1]
    assert (found[0]["status"] == "failed") is broken
    assert stock_processes.forks == before + 2


def test_a_program_that_fails(stock_processes: StockProcesses, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text("import sys\nprint('out', sys.argv[1:])\nraise ValueError('of the program')\n")
    command = [*watched_command(sys.executable, program), "a"]
    for runs in (stock_processes, run_watched):
        done = runs(command, {**os.environ, "OMP_NUM_THREADS": "1"}, tmp_path)
        assert done.returncode == 1 and done.stdout == "out ['a']\n" and "ValueError: of the program" in done.stderr
