"""A family's base and copies, built in a process of its own and run by the stacks; what was seen, as a record."""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from support.families import Copied, Family, copy_family, family_base, family_job

from patcher.stacks.names import LLAMA_CPP, STACKS, TRANSFORMERS

ROOT = Path(__file__).parents[2]
BUILD_TIMEOUT, FOLDER_TIMEOUT = 600.0, 60.0
TOGETHER = 5
"""Families whose folders one process of a stack runs."""
STACKS_ALL = set(STACKS)
ASKED: dict[str, dict[str, Any]] = {"stacks": {}, "free": {"prefer": "free"}, "targets": {"targets": list(STACKS)}}
"""What the planner is asked for: its own choice, a free one, and one that every stack reads."""
LEAST_RATIO = 100.0
"""Times the difference that the effect must be, as the stacks' tests demand."""
EXACT_LIMIT, EXACT_SHARE, EXACT_NOISE = 2e-5, 5e-5, 5.0
"""In transformers: as of all_architectures.py."""

Record = dict[str, Any]
"""{name, form, model_type, release, layer, files, base: {stack: {version, build, runs, own_error,
line}}, runs: [...], refused,
failed}; a run is {asked, route, reads, cost, files, claimed: {stack: support}, seen: {stack: {outcome,
difference, effect, gain, reader, line}}}. ``files`` is the sha256 of a folder's weights and config."""

# Building, each family in a process of its own


def build(family: Family, place: Path) -> tuple[Record, list[Copied]]:
    """Base and copies of a family below ``place``; the copies are compared in transformers."""
    from patcher.errors import PatchModelError

    record: Record = {"name": family.name, "form": family.form, "model_type": family.model_type}
    record |= {"release": family.release, "layer": family.layer, "runs": [], "base": {}}
    if family.wrapper:
        record["wrapper"] = True
    copies: list[Copied] = []
    base = place / "base"
    if (broken := family_base(family, base)) is not None:
        return {**record, "refused": broken}, []
    record["files"] = content(base)
    for asked, options in ASKED.items():
        claims_all = any(claimed(copied) >= STACKS_ALL for copied in copies)
        if (asked == "targets" and claims_all) or (asked == "free" and copies[0].plan.free):
            continue
        try:
            copied = copy_family(family, base, place / asked, asked, **options)
        except PatchModelError as error:
            if not copies:
                return {**record, "refused": str(error.problems[0].found or error)}, copies
            continue
        if asked == "free" and not copied.plan.free:
            continue
        if not any(content(copied.folder) == content(other.folder) for other in copies):
            copies.append(copied)
            record["runs"].append(_run(copied))
    return record, copies


def claimed(copied: Copied) -> set[str]:
    """The stacks that its plan says to read it."""
    return {stack for stack, support in copied.plan.stacks.items() if support != "no"}


def _run(copied: Copied) -> Record:
    plan = copied.plan
    limit = max(EXACT_LIMIT, EXACT_SHARE * copied.effect, EXACT_NOISE * copied.noise)
    line = ""
    if copied.reader != plan.architecture:
        line = f"{copied.reader} reads the copy"
    elif copied.report:
        line = f"loading the copy reports {json.dumps(copied.report)[:200]}"
    elif not copied.difference <= limit or not copied.effect > LEAST_RATIO * copied.difference:
        line = "the copy is not what the hook is"
    seen = {
        "outcome": "wrong" if line else "exact",
        "difference": _number(copied.difference),
        "effect": _number(copied.effect),
    }
    return {
        "asked": copied.asked,
        "route": plan.route,
        "reads": plan.architecture,
        "cost": plan.cost,
        "files": content(copied.folder),
        "claimed": dict(plan.stacks),
        "seen": {TRANSFORMERS: {**seen, "line": line}},
    }


def _build_process(family: Family, place: Path, sender: Any) -> None:
    import torch

    torch.set_num_threads(1)
    try:
        record, copies = build(family, place)
    except BaseException as error:
        import traceback

        traceback.print_exc()
        sender.send(({"failed": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"}, []))
    else:
        sender.send((record, [_light(copied, lambda tensor: tensor.numpy()) for copied in copies]))


def _light(copied: Copied, change: Callable[[Any], Any]) -> Copied:
    """What goes from process to process: arrays, and no functions that make a tensor's content."""
    expected = copied.expected
    plain, steered = [*map(change, expected.plain)], [*map(change, expected.steered)]
    moved = replace(expected, plain=plain, steered=steered, greedy_logprobs=change(expected.greedy_logprobs))
    return replace(copied, expected=moved, plan=replace(copied.plan, tensors=()), vectors={})


def built(family: Family, place: Path, timeout: float = BUILD_TIMEOUT) -> tuple[Record, list[Copied]]:
    """:func:`build` in a process that may crash or hang."""
    import torch

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers", "support.families", "patcher.routes.planner"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_build_process, args=(family, place, sender), daemon=True)
    process.start()
    sender.close()
    try:
        found = receiver.recv() if receiver.poll(timeout) else ({"failed": f"longer than {timeout:.0f} s"}, [])
    except EOFError:
        process.join()
        found = {"failed": f"its process died (exit code {process.exitcode})"}, []
    process.kill()
    process.join()
    record, copies = found
    whole = {"name": family.name, "form": family.form, "model_type": family.model_type, "release": family.release}
    copies = [_light(copied, torch.from_numpy) for copied in copies]
    return {**whole, "layer": family.layer, "runs": [], "base": {}, **record}, copies


# The stacks


def content(folder: Path) -> str:
    """sha256 of what a stack computes with."""
    found = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), folder / "config.json", folder / "tokenizer.json"]):
        if path.name != "steering.safetensors":
            found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()


def processes(place: Path) -> dict[str, tuple[str, Any]]:
    """Version of each other stack that is installed, and how it is started."""
    from support.llama_cpp_converter import with_tiny_tokenizers

    from patcher.stacks.environments import Missing, find
    from patcher.verify.all_stacks import PROCESSES

    found = {}
    for stack in STACKS:
        if stack == TRANSFORMERS:
            continue
        where = find(stack)
        if isinstance(where, Missing):
            print(f"{stack} is not installed: {where.why}", file=sys.stderr)
            continue
        started = with_tiny_tokenizers(where, place) if stack == LLAMA_CPP else where
        found[stack] = (where.version, PROCESSES[stack](started))
    return found


def run_stacks(
    batch: Sequence[tuple[Record, list[Copied]]], place: Path, known: Mapping[str, Record] | None = None
) -> None:
    """Run the bases and copies of some families in every stack; what was seen is entered in their records.

    Args:
        batch: of :func:`built`, each with copies below a folder of its own.
        place: for the stacks' files.
        known: records by :func:`key_of`; what the same version of a stack ran of the same files is not run again.
    """
    from patcher.verify.stack_jobs import run_jobs

    for stack, (version, process) in processes(place).items():
        jobs, asked = [], []
        for record, copies in batch:
            if not copies or _taken_over(record, (known or {}).get(key_of(record)), stack, version):
                continue
            asked.append((record, copies))
            key = key_of(record)
            jobs.append(family_job(f"{key}-base", copies[0].base))
            jobs += [family_job(f"{key}-{copied.asked}", copied.folder) for copied in copies]
        if not jobs:
            continue
        # One that hangs ends its process, which is told of that folder; the others are run in another one.
        limited = ["timeout", str(int(60 + FOLDER_TIMEOUT * len(jobs))), *process.command]
        try:
            runs = run_jobs(replace(process, command=limited), jobs, place / f"runs-{stack}")
        except Exception as error:
            print(f"{stack}: {error}", file=sys.stderr)
            continue
        for record, copies in asked:
            judge(record, copies, runs, stack, version)


def key_of(record: Record) -> str:
    """A file name."""
    words = f"{record['name']} {record['form']}".replace("/", " ").replace("(", "").replace(")", "")
    return "-".join(words.lower().split())


def _taken_over(record: Record, before: Record | None, stack: str, version: str) -> bool:
    """Whether all of it was run before; then it is entered."""
    if before is None or before.get("files") != record["files"]:
        return False
    if before["base"].get(stack, {}).get("version") != version:
        return False
    seen = {run["files"]: run["seen"].get(stack) for run in before["runs"]}
    if not all(seen.get(run["files"]) for run in record["runs"]):
        return False
    record["base"][stack] = before["base"][stack]
    for run in record["runs"]:
        run["seen"][stack] = seen[run["files"]]
    return True


def judge(record: Record, copies: Sequence[Copied], runs: Any, stack: str, version: str) -> None:
    """Enter what a stack's runs of a family show."""
    from patcher.verify.stack_comparison import compare_in_stack

    key = key_of(record)
    base = runs[f"{key}-base"]
    for entry, copied in zip(record["runs"], copies, strict=True):
        run = runs[f"{key}-{copied.asked}"]
        entry["seen"][stack] = outcome(run, base, compare_in_stack(run, base, copied.expected))
    own = _number(compare_in_stack(base, base, copies[0].expected).own_error)
    about = {"runs": base.error is None, "own_error": own, "line": _line(base.error)}
    record["base"][stack] = {"version": version, "build": base.version, **about}


def outcome(run: Any, base: Any, result: Any) -> Record:
    """``exact``; ``wrong``: it runs, as something else; ``refused``: only the base runs; ``no base``: neither does."""
    failed = [check for check in result.checks if check.passed is False]
    seen: Record = {"difference": _number(result.max_abs_logprob_diff), "effect": _number(result.steering_effect)}
    seen |= {"gain": _number(result.gain), "reader": str(run.facts.get("class", "")), "line": ""}
    if run.error is not None:
        seen |= {"outcome": "refused" if base.error is None else "no base", "line": _line(run.error)}
    elif result.blind:
        seen |= {"outcome": "no base", "line": result.blind}
    elif failed or not result.steering_effect > LEAST_RATIO * result.max_abs_logprob_diff:
        words = "; ".join(f"{check.name}: {check.note}" for check in failed) or "small beside the difference"
        seen |= {"outcome": "wrong", "line": _line(words)}
    else:
        seen |= {"outcome": "exact"}
    return seen


def _number(value: float | None) -> float | None:
    """Three digits of it; None for what JSON has no word for."""
    return float(f"{value:.3g}") if value is not None and math.isfinite(value) else None


def _line(text: str | None) -> str:
    """A stack's own words in one line, without this machine's paths and times."""
    lines = [line.strip() for line in (text or "").splitlines() if line.strip()]
    first = next((number for number, line in enumerate(lines) if "Error" in line or "error" in line), 0)
    words = re.sub(r"\d+\.\d+\.\d+\.\d+ E ", "", " ".join(lines[first : first + 3]))
    return re.sub(r"\S*/families-\w+(?:/[\w.-]+)*", "FOLDER", words)[:300]


def run_all(
    chosen: Sequence[Family], place: Path, *, together: int = TOGETHER, known: Mapping[str, Record] | None = None
) -> Iterator[Record]:
    """The records, batch by batch."""
    for start in range(0, len(chosen), together):
        below = place / str(start)
        below.mkdir(parents=True)
        began = time.monotonic()
        found = [built(family, below / family.key) for family in chosen[start : start + together]]
        run_stacks(found, below, known)
        yield from (record for record, _copies in found)
        print(f"({time.monotonic() - began:.0f} s)", file=sys.stderr, flush=True)
        shutil.rmtree(below, ignore_errors=True)
