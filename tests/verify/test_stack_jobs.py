"""The files between this package and a stack's process, with small programs in the place of stacks."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from patcher.errors import OutsideError
from patcher.verify.stack_jobs import Process, StackJob, run_jobs

STACK = """
import json, os, sys, torch
from pathlib import Path
from safetensors.torch import save_file
assert "PYTHONPATH" not in os.environ
request = json.loads(Path(sys.argv[1]).read_text())
results = Path(request["results"])
(results / "process.json").write_text(json.dumps({"version": "1.2", "detail": request["extra"]}))
for job in request["jobs"]:
    if job["folder"] == "crash":
        print("assertion failed: tensor", file=sys.stderr, flush=True)
        os.abort()
    if job["folder"] == "kill":
        os.kill(os.getpid(), 9)
    save_file({"tokens/0": torch.tensor([[1]])}, results / (job["name"] + ".safetensors"))
    error = "no such model" if job["folder"] == "error" else None
    (results / (job["name"] + ".json")).write_text(json.dumps({"error": error, "greedy": job["greedy_ids"]}))
"""


def process(tmp_path: Path, program: str = STACK) -> Process:
    script = tmp_path / "stack.py"
    script.write_text(program)
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return Process([sys.executable, "-I", str(script)], {"extra": "more"}, variables)


def job(name: str, folder: str = "fine") -> StackJob:
    return StackJob(name, folder, [[1, 2]], [1, 2])


def test_results_come_back(tmp_path: Path) -> None:
    runs = run_jobs(process(tmp_path), [job("a"), job("b", "error")], tmp_path / "place")
    assert runs["a"].error is None and runs["a"].version == "1.2" and runs["a"].detail == "more"
    assert torch.equal(runs["a"].tensors["tokens/0"], torch.tensor([[1]])) and runs["a"].facts["greedy"] == [1, 2]
    assert runs["b"].error == "no such model"


@pytest.mark.slow
def test_a_job_that_kills_the_process_does_not_stop_the_others(tmp_path: Path) -> None:
    runs = run_jobs(process(tmp_path), [job("a"), job("b", "crash"), job("c")], tmp_path / "place")
    assert runs["a"].error is None and runs["c"].error is None
    assert "its process died" in str(runs["b"].error) and "assertion failed: tensor" in str(runs["b"].error)


def test_out_of_memory_is_not_the_folders_fault(tmp_path: Path) -> None:
    with pytest.raises(OutsideError) as caught:
        run_jobs(process(tmp_path), [job("a", "kill")], tmp_path / "place")
    assert caught.value.code == "memory" and caught.value.exit_code == 3


def test_a_stack_that_does_not_start_is_told_in_words(tmp_path: Path) -> None:
    with pytest.raises(OutsideError) as caught:
        run_jobs(process(tmp_path, "import no_such_stack"), [job("a")], tmp_path / "place")
    assert "No module named 'no_such_stack'" in str(caught.value) and caught.value.exit_code == 3


@pytest.mark.parametrize("runner", ["vllm_run.py", "llama_cpp_run.py"])
def test_the_runners_import_nothing_of_this_package(runner: str) -> None:
    import ast

    import patcher.verify

    source = (Path(patcher.verify.__path__[0]) / "programs" / runner).read_text(encoding="utf-8")
    names = [
        alias.name if isinstance(node, ast.Import) else str(node.module)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    ]
    assert not [name for name in names if name.startswith("patcher")]
    assert 'sys.modules["patcher"] = None' in source
