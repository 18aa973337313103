"""Folders to run in a stack, and what came out: files to and from a process that imports nothing of this package.

``request.json``: ``jobs`` (:class:`StackJob`, plus ``trust_remote_code``), ``results`` (a folder), what a stack adds.
In ``results``, as soon as each is known:

- ``process.json`` {version, detail};
- ``running``: the name of the job at work;
- of every job ``NAME.json`` {error or null, class, greedy, tokenised, seconds};
- of every job ``NAME.safetensors``: ``tokens/N`` int32 and ``logprobs/N`` fp32 for each prompt N, both [positions,
  likeliest tokens]; token -1: none.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from patcher.errors import OutsideError
from patcher.errors.causes import cause_in_log
from patcher.progress.stage import Say, doing, silent
from patcher.stacks.environments import Environment
from patcher.verify.watched import run_watched

MOST_TOKENS = 1024


@dataclass(frozen=True)
class StackJob:
    """One folder to run.

    Attributes:
        name: a file name for its results.
        folder: a checkpoint folder.
        ids: the prompts.
        greedy_ids, greedy_tokens: a prompt that is continued greedily, and by how many tokens.
        texts: what the stack's own tokenizer is tried on, where it has one of its own.
        top: how many of the likeliest tokens are reported at each position.
        positions: how many the model has; None where it does not say.
    """

    name: str
    folder: str
    ids: Sequence[Sequence[int]]
    greedy_ids: Sequence[int]
    greedy_tokens: int = 12
    texts: Sequence[str] = ()
    top: int = MOST_TOKENS
    positions: int | None = None


@dataclass(frozen=True)
class StackRun:
    """What a stack computed with one folder, or why it could not.

    Attributes:
        error: why the folder did not run; None where it did.
        tensors, facts: as in the module's description.
        version, detail: of the stack.
    """

    error: str | None
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    version: str = "unknown"
    detail: str = ""


@dataclass(frozen=True)
class Process:
    """How a stack's process is started: the command without its request, extra keys of the request, its variables."""

    command: Sequence[str]
    extra: Mapping[str, Any]
    variables: Mapping[str, str]


def run_jobs(
    process: Process,
    jobs: Sequence[StackJob],
    place: Path,
    *,
    trust_remote_code: bool = False,
    say: Say = silent,
) -> dict[str, StackRun]:
    """Run every job, in one process as long as that lives; a job that kills it is reported and the rest go on.

    Args:
        place: an empty folder for the files.

    Raises:
        OutsideError: the stack does not start at all, or ran out of memory.
    """
    runs: dict[str, StackRun] = {}
    left = list(jobs)
    attempt = 0
    while left:
        results = place / f"results-{attempt}"
        results.mkdir(parents=True)
        request = place / f"request-{attempt}.json"
        listed = [{**asdict(job), "trust_remote_code": trust_remote_code} for job in left]
        request.write_text(json.dumps({"jobs": listed, "results": str(results), **process.extra}), encoding="utf-8")
        folders = f"running {len(left)} folder{'s' * (len(left) > 1)}"
        with doing(say, folders, len(left), measure=partial(_count, results)):
            finished = run_watched([*process.command, str(request)], process.variables, results)
        about = _read(results / "process.json")
        if about is None:
            raise _does_not_start(process, finished)
        done = [job for job in left if (results / f"{job.name}.json").is_file()]
        for job in done:
            facts = _read(results / f"{job.name}.json") or {}
            runs[job.name] = StackRun(
                facts.get("error"),
                load_file(results / f"{job.name}.safetensors"),
                facts,
                str(about["version"]),
                str(about["detail"]),
            )
        left = [job for job in left if job.name not in runs]
        if left:
            if finished.returncode == -9:
                raise OutsideError(
                    "the stack ran out of memory", where=left[0].name, remedy="free some memory", code="memory"
                )
            died = f"its process died (exit {finished.returncode}): {cause_in_log(finished.stderr)}"
            runs[left[0].name] = StackRun(died, version=str(about["version"]), detail=str(about["detail"]))
            left = left[1:]
        attempt += 1
    return runs


def clean_variables(environment: Environment) -> dict[str, str]:
    """This process's variables without those that would lead another Python to the wrong packages."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    programs = str(environment.python.parent)
    return {**kept, "PATH": os.pathsep.join([programs, kept.get("PATH", "")])}


def _count(results: Path) -> int:
    return len(list(results.glob("*.safetensors")))


def _read(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return value


def _does_not_start(process: Process, finished: subprocess.CompletedProcess[str]) -> OutsideError:
    return OutsideError(
        "the stack's process does not start",
        where=str(process.command[0]),
        found=f"exit {finished.returncode}: {cause_in_log(finished.stderr)}",
        remedy="run that Python and import the stack to see why; install it anew: patch-model stacks install",
        code="stack",
    )
