"""Verification in stock transformers: a fresh process for base and copy, or one for each where memory is short."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from patcher.architectures.quantised import quantisation_of
from patcher.capture.memory import FOR_WEIGHTS, address_space_left, available_memory
from patcher.checkpoint.folder import CheckpointFolder
from patcher.checkpoint.sizes import fp32_bytes
from patcher.errors import OutsideError
from patcher.errors.causes import cause_in_log
from patcher.patched.schema import Patch
from patcher.patched.stored import read_stored
from patcher.progress.clock import Clock
from patcher.progress.stage import Say, Stage, doing
from patcher.stacks.names import TRANSFORMERS
from patcher.verify.checks import Check, Comparison
from patcher.verify.comparison import FitLimits, Run, compare
from patcher.verify.offload import RUNNER_BYTES, SMALL_HEAP, Offload, disk_is_full, memory_is_full, plan_offload
from patcher.verify.stock_job import GREEDY_TOKENS, long_prompt, stock_job
from patcher.verify.terms import VerifyTerms
from patcher.verify.watched import WaitingProcess, run_watched, watched_command

REFERENCE = "the base with a forward hook on the block, adding the vector that the file stores"
__all__ = ["GREEDY_TOKENS", "long_prompt", "run_reference", "together", "verify_in_transformers"]
GPU_ROOM = 1 << 30
"""Bytes beside the weights: kernels, activations, logits."""
RUNNER = Path(__file__).with_name("programs") / "stock_run.py"


def verify_in_transformers(
    folder: Path,
    base: Path,
    patch: Patch,
    terms: VerifyTerms,
    *,
    keep: Callable[[Run, Run], None] | None = None,
) -> dict[str, Any]:
    """Compare a finished folder with the base under a hook, both in stock transformers and fp32.

    The reference adds, after each edited block, the vector that the folder's file *stores*; the candidate is the
    folder as a stranger loads it, in a process that cannot import this package.

    Args:
        folder: the patched folder (or its staging folder), with ``steering.safetensors`` in it.
        base: the base checkpoint, adapter merged.
        patch: its ``edits`` and ``route`` say what is where.
        terms: how close is close enough, and on what.
        keep: called with the reference and the candidate, for whoever compares another stack with them.

    Returns:
        An entry of ``steering.json``'s ``verification``: status ``passed`` or ``failed``, numbers and checks.

    Raises:
        OutsideError: a process died (memory, disk), there is no room for what does not fit in memory, or stock
            transformers could not run the base.
    """
    spec, say = terms.spec, terms.say
    stored = read_stored(folder, patch)
    with tempfile.TemporaryDirectory(prefix="patch-model-verify-", dir=terms.scratch) as name:
        place = Path(name)
        offload = _offload(folder, base, place, terms)
        job, long_note = stock_job(base, patch, stored, place, terms, offload, others=keep is not None)
        route, quantisation = patch.route, quantisation_of(CheckpointFolder(base).config)
        written = [tensor.parameter or tensor.name for tensor in route.tensors]
        written += [*(route.zeros.names if route.zeros else ()), *route.derived]

        def compared(reference: Run, candidate: Run) -> Comparison:
            return compare(
                reference,
                candidate,
                stored,
                architecture=route.architecture,
                centred=route.centred,
                tolerance=spec.tolerance,
                written=written,
                long_note=long_note,
                fit=None if route.exact else FitLimits.of(route.fit, spec.fit_error, spec.fit_kl),
                quantised=None if quantisation is None else quantisation.method,
                # Keys of another part than the decoder: what makes features of an image.
                images_needed=any("." in key for key in route.config_changes),
            )

        jobs = [
            {**job, "role": "reference", "folder": job["base"]},
            {**job, "role": "candidate", "folder": str(folder), "vectors": None},
        ]
        if together(folder, base, job):
            with doing(say, "verifying: the base under a hook, and the patched folder in stock transformers"):
                device = pick_device(terms.device, folder)
                runs = _run_both([{**job, "device": device} for job in jobs], place, terms.warm)
                if device != "cpu" and not (len(runs) == 2 and compared(*runs).passed):
                    # What fails on a GPU is decided on the CPU.
                    runs = _run_both(jobs, place, None)
                _tell_parts(terms.clock, runs)
        else:
            runs = []
            if terms.warm is not None:
                terms.warm.close()
        if len(runs) == 2 and (result := compared(*runs)).passed:
            if keep is not None:
                keep(*runs)
            return _entry(result, runs[0])
        # What goes wrong side by side is run again alone, and that decides.
        if not runs:
            with _doing(say, "verifying: the base under a hook", job, place / "reference"):
                runs = [_run(jobs[0], place / "reference")]
                _tell_parts(terms.clock, runs)
        reference = runs[0]
        jobs[1]["amplify"] = reference.facts["amplify"]
        try:
            with _doing(say, "verifying: the patched folder in stock transformers", job, place / "candidate"):
                candidate = _run(jobs[1], place / "candidate")
                _tell_parts(terms.clock, [candidate])
        except OutsideError as error:
            if error.code in ("memory", "disk"):
                raise
            failed = Check(
                "loading", False, note=f"stock transformers cannot run the folder: {error.problems[0].found}"
            )
            return _entry(Comparison([failed]), reference)
        if keep is not None:
            keep(reference, candidate)
        return _entry(compared(reference, candidate), reference)


def _doing(say: Say, text: str, job: Mapping[str, Any], result: Path) -> AbstractContextManager[Stage]:
    """A model that is read from the disk takes long, and its process writes down how much of that is done."""
    if job["offload"] is None:
        return doing(say, text)
    share = Path(f"{result}.share")
    return doing(say, text, 100, "%", lambda: 100 * float(share.read_text() or 0) if share.exists() else 0.0)


def _offload(folder: Path, base: Path, scratch: Path, terms: VerifyTerms) -> Offload | None:
    return plan_offload(
        folder,
        base,
        scratch,
        memory=available_memory(),
        address_space=address_space_left(),
        trust_remote_code=terms.trust_remote_code,
    )


def together(folder: Path, base: Path, job: Mapping[str, Any]) -> bool:
    """Whether base and copy are run in one process: both fit in fp32, and neither brings code or kernels along."""
    found = [CheckpointFolder(place) for place in (folder, base)]
    if job["offload"] is not None or job["trust_remote_code"] or any(quantisation_of(one.config) for one in found):
        return False
    return _bytes_of_both(folder) <= int(FOR_WEIGHTS * available_memory()) - RUNNER_BYTES


def pick_device(asked: str, folder: Path) -> str:
    """``cuda`` where there is a GPU that takes both in fp32 and the recipe does not keep to the CPU, else ``cpu``."""
    if asked == "cpu" or not torch.cuda.is_available():
        return "cpu"
    free, _ = torch.cuda.mem_get_info()
    return "cuda" if _bytes_of_both(folder) + GPU_ROOM <= FOR_WEIGHTS * free else "cpu"


def _bytes_of_both(copy: Path) -> int:
    """Base and copy in fp32, by the copy alone: a base of pickled weights tells no sizes before it is loaded."""
    return 2 * fp32_bytes(CheckpointFolder(copy))


def run_reference(folder: Path, base: Path, patch: Patch, terms: VerifyTerms) -> Run:
    """The base without and under the hook, as :func:`verify_in_transformers` runs it, without the finished folder.

    Raises:
        OutsideError: the process died, or stock transformers could not run the base.
    """
    short = replace(terms, spec=terms.spec.model_copy(update={"long_prompt_limit": 0}))
    with tempfile.TemporaryDirectory(prefix="patch-model-verify-", dir=terms.scratch) as name:
        place, stored = Path(name), read_stored(folder, patch)
        offload = _offload(folder, base, place, terms)
        job, _ = stock_job(base, patch, stored, place, short, offload, others=True)
        return _run({**job, "own_dtype": False, "role": "reference", "folder": job["base"]}, place / "reference")


def _entry(result: Comparison, reference: Run) -> dict[str, Any]:
    status = "passed" if result.passed else "failed"
    return result.entry(TRANSFORMERS, reference.facts["version"], status, REFERENCE)


def _run_both(jobs: Sequence[Mapping[str, Any]], place: Path, warm: WaitingProcess | None) -> list[Run]:
    """Reference and candidate in one process; what it leaves undone when it dies is not among the result."""
    results = [place / f"both-{jobs[0]['device']}-{job['role']}" for job in jobs]
    told = [{**job, "result": str(result)} for job, result in zip(jobs, results, strict=True)]
    path = place / "both.job.json"
    path.write_text(json.dumps({"runs": told}), encoding="utf-8")
    asked = time.time()
    if warm is not None:
        warm.tell(json.dumps({"job": str(path)}))
        warm.finish()
    else:
        run_watched([*watched_command(sys.executable, RUNNER), str(path)], dict(os.environ))
    return [_read(result, asked) for result in itertools.takewhile(_is_done, results)]


def _tell_parts(clock: Clock, runs: Sequence[Run]) -> None:
    """What the process that ran them took: to start, for the base, for the copy; all since it was asked."""
    if not runs or "began" not in runs[0].facts:
        return
    # One that was started before, and has loaded the base meanwhile, began before it was asked.
    since = max(runs[0].facts["asked"], runs[0].facts["began"])
    clock.give("verify.start", since - runs[0].facts["asked"])
    for run in runs:
        clock.give("verify.base" if run.facts["role"] == "reference" else "verify.copy", run.facts["ended"] - since)
        since = run.facts["ended"]


def _is_done(result: Path) -> bool:
    return result.with_suffix(".json").exists()


def _read(result: Path, asked: float) -> Run:
    facts = json.loads(result.with_suffix(".json").read_text(encoding="utf-8"))
    return Run(load_file(result.with_suffix(".safetensors")), {**facts, "asked": asked})


def _run(job: Mapping[str, Any], result: Path) -> Run:
    path = result.with_suffix(".job.json")
    path.write_text(json.dumps({**job, "result": str(result)}), encoding="utf-8")
    command = [*watched_command(sys.executable, RUNNER), str(path)]
    spread = job["offload"]
    environment = dict(os.environ)
    if spread is not None:
        Path(spread["folder"]).mkdir(exist_ok=True)
        environment |= SMALL_HEAP
    asked = time.time()
    finished = run_watched(command, environment)
    if spread is not None:
        # The next run needs the room.
        shutil.rmtree(spread["folder"], ignore_errors=True)
    if finished.returncode != 0:
        found = cause_in_log(finished.stderr)
        if disk_is_full(finished.stderr):
            raise OutsideError(
                "the disk is full: stock transformers could not write what does not fit in memory",
                where=str(result.parent),
                found=found,
                remedy="free some space there, or use a machine (or a limit) with more memory",
                code="disk",
            )
        killed = memory_is_full(finished.returncode, finished.stderr)
        raise OutsideError(
            "stock transformers ran out of memory" if killed else "stock transformers could not run the model",
            where=f"{job['role']} run (exit {finished.returncode})",
            found=found,
            remedy="free some memory" if killed else "check that the base loads and runs in this transformers",
            code="memory" if killed else "stack",
        )
    return _read(result, asked)
