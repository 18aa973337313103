"""The families of models that people use: a tiny base of each, its copies, and every stack's own run of them.

``python tests/conformance/families.py`` runs all of them in transformers, vLLM and llama.cpp, and writes
docs/families.json and docs/architectures.md; ``--only "Qwen3" jamba`` prints some of them and writes nothing.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from support.families import Copied, Family, copy_family, families, family_base, family_job

from patcher.stacks.names import LLAMA_CPP, STACKS, TRANSFORMERS, VLLM

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "families.json"
PAGE = ROOT / "docs" / "architectures.md"
COMMAND = "python tests/conformance/families.py"
BUILD_TIMEOUT, FOLDER_TIMEOUT = 600.0, 60.0
TOGETHER = 5
"""Families whose folders one process of a stack runs."""
LEAST_RATIO = 100.0
"""Times the difference that the effect must be, as the stacks' tests demand."""
EXACT_LIMIT, EXACT_SHARE, EXACT_NOISE = 2e-5, 5e-5, 5.0
"""In transformers: as of all_architectures.py."""

Record = dict[str, Any]
"""{name, form, model_type, release, layer, base: {stack: {runs, own_error, line}}, runs: [...], refused, failed}; a run
is {prefer, route, reads, cost, claimed: {stack: support}, seen: {stack: {outcome, difference, effect, line}}}."""


# Building, each family in a process of its own


def build(family: Family, place: Path) -> tuple[Record, list[Copied]]:
    """Base and copies of a family below ``place``; the copies are compared in transformers."""
    from patcher.errors import PatchModelError

    record: Record = {"name": family.name, "form": family.form, "model_type": family.model_type}
    record |= {"release": family.release, "layer": family.layer, "runs": [], "base": {}}
    if family.wrapper:
        return {**record, "refused": refusal(family, place)}, []
    copies: list[Copied] = []
    base = place / "base"
    family_base(family, base)
    for prefer in ("stacks", "free"):
        try:
            copied = copy_family(family, base, place / prefer, prefer=prefer)
        except PatchModelError as error:
            return {**record, "refused": str(error.problems[0].found or error)}, copies
        if copies and (not copied.plan.free or copied.plan.route == copies[0].plan.route):
            break
        copies.append(copied)
        record["runs"].append(_run(copied))
        if copied.plan.free:
            break
    return record, copies


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
    seen = {"outcome": "wrong" if line else "exact", "difference": copied.difference, "effect": copied.effect}
    return {
        "prefer": copied.prefer,
        "route": plan.route,
        "reads": plan.architecture,
        "cost": plan.cost,
        "claimed": dict(plan.stacks),
        "seen": {TRANSFORMERS: {**seen, "line": line}},
    }


def refusal(family: Family, place: Path) -> str:
    """What the command says of a wrapper's config."""
    from transformers import AutoConfig

    place.mkdir(parents=True, exist_ok=True)
    config = AutoConfig.for_model(family.model_type)
    config.save_pretrained(place)
    command = [sys.executable, "-m", "patcher", "inspect", str(place), "--json"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env={**os.environ})
    try:
        answer = json.loads(ran.stdout)
    except ValueError:
        return (ran.stderr.strip().splitlines() or ["nothing"])[-1][:300]
    if "error" not in answer:
        return ""
    error = answer["error"]
    error = error["problems"][0] if error.get("problems") else error
    return str(error.get("message") or error.get("found") or error).replace(str(place), "DIR")[:300]


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
    return replace(copied, expected=moved, plan=replace(copied.plan, tensors=()))


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


def processes(place: Path) -> dict[str, Any]:
    """How each other stack that is installed is started; one hang ends its process, not the run."""
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
        process = PROCESSES[stack](with_tiny_tokenizers(where, place) if stack == LLAMA_CPP else where)
        found[stack] = process
    return found


def run_stacks(batch: Sequence[tuple[Record, list[Copied]]], keys: Sequence[str], place: Path) -> None:
    """Run the bases and copies of some families in every stack; what was seen is entered in their records."""
    from patcher.verify.stack_jobs import run_jobs

    started = processes(place)
    for stack, process in started.items():
        jobs = []
        for key, (_record, copies) in zip(keys, batch, strict=True):
            if copies:
                jobs.append(family_job(f"{key}-base", place / key / "base"))
                jobs += [family_job(f"{key}-{copied.prefer}", copied.folder) for copied in copies]
        if not jobs:
            continue
        limited = ["timeout", str(int(60 + FOLDER_TIMEOUT * len(jobs))), *process.command]
        try:
            runs = run_jobs(replace(process, command=limited), jobs, place / f"runs-{stack}")
        except Exception as error:
            print(f"{stack}: {error}", file=sys.stderr)
            continue
        for key, (record, copies) in zip(keys, batch, strict=True):
            if copies:
                judge(record, copies, runs, key, stack)


def judge(record: Record, copies: Sequence[Copied], runs: Any, key: str, stack: str) -> None:
    """Enter what a stack's runs of a family show."""
    from patcher.verify.stack_comparison import compare_in_stack

    base = runs[f"{key}-base"]
    for entry, copied in zip(record["runs"], copies, strict=True):
        run = runs[f"{key}-{copied.prefer}"]
        result = compare_in_stack(run, base, copied.expected)
        entry["seen"][stack] = outcome(run, base, result)
        own = None if base.error is not None else _number(result.own_error)
        if own is not None or base.error is not None:
            record["base"][stack] = {"runs": base.error is None, "own_error": own, "line": _line(base.error)}
    record.setdefault("versions", {})[stack] = f"{base.version}"


def outcome(run: Any, base: Any, result: Any) -> Record:
    """``exact``; ``wrong``: it runs, as something else; ``refused``: only the base runs; ``no base``: neither does."""
    failed = [check for check in result.checks if check.passed is not True]
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
    return value if value is not None and value == value and abs(value) != float("inf") else None


def _line(text: str | None) -> str:
    """A stack's own words in one line, without this machine's paths."""
    lines = [line.strip() for line in (text or "").splitlines() if line.strip()]
    words = next((line for line in lines if "Error" in line), lines[0] if lines else "")
    return words.replace(tempfile.gettempdir(), "TMP")[:300]


def run_all(chosen: Sequence[Family], place: Path, *, together: int = TOGETHER) -> Iterator[Record]:
    """The records, batch by batch."""
    for start in range(0, len(chosen), together):
        batch = chosen[start : start + together]
        below = place / str(start)
        below.mkdir(parents=True)
        began = time.monotonic()
        found = [built(family, below / family.key) for family in batch]
        run_stacks(found, [family.key for family in batch], below)
        for record, _copies in found:
            yield record
        print(f"({time.monotonic() - began:.0f} s)", file=sys.stderr, flush=True)
        shutil.rmtree(below, ignore_errors=True)


# Results


def told(record: Record) -> Iterator[str]:
    """What is printed of a family."""
    title = f"{record['name']} {record['form']}".strip()
    if record.get("failed") or record.get("refused"):
        yield f"{title}: {'FAILED' if record.get('failed') else 'refused'}: {record.get('failed') or record['refused']}"
    for stack, base in record["base"].items():
        how = f"own error {base['own_error']}" if base["runs"] else f"the base does not run: {base['line']}"
        yield f"{title}: {stack}: {how}"
    for run in record["runs"]:
        yield f"{title}: prefer {run['prefer']}: {run['route']} -> {run['reads']}, cost {run['cost']}"
        for stack, seen in run["seen"].items():
            claim = run["claimed"].get(stack, "no")
            false = " **FALSE CLAIM**" if is_false(run, stack) else ""
            measured = "" if seen["difference"] is None else f" {seen['difference']:.1e} of {seen['effect']:.2g}"
            yield f"    {stack}: claimed {claim}, {seen['outcome']}{measured} {seen['line']}{false}"


def is_false(run: Record, stack: str) -> bool:
    """Whether the plan's claim of a stack is other than what was seen; of what cannot be seen nothing is false."""
    seen = run["seen"].get(stack)
    if seen is None or seen["outcome"] == "no base":
        return False
    return bool((run["claimed"].get(stack, "no") != "no") != (seen["outcome"] == "exact"))


def versions() -> dict[str, str]:
    from importlib.metadata import version

    return {"transformers": version("transformers"), "torch": version("torch")}


def as_json(records: Iterable[Record]) -> str:
    """One line a family, so that a change can be read."""
    records = list(records)
    stacks = versions()
    for record in records:
        stacks |= record.pop("versions", {})
    lines = ",\n".join(f"    {json.dumps(record)}" for record in records)
    head = json.dumps({"versions": stacks, "command": COMMAND}, indent=2)[:-2]
    return f'{head},\n  "families": [\n{lines}\n  ]\n}}\n'


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="names or model types; prints, and writes nothing")
    parser.add_argument("--together", type=int, default=TOGETHER, help="families in one process of a stack")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--merge", action="store_true", help="with --only: put these into the results after all")
    parser.add_argument("--render", action="store_true", help="only write the page again, from the results")
    options = parser.parse_args()
    if not options.render:
        wanted = {name.lower() for name in options.only or ()}
        chosen = [
            family
            for family in families()
            if not wanted or wanted & {family.name.lower(), family.model_type, family.key, family.title.lower()}
        ]
        records = []
        with tempfile.TemporaryDirectory(prefix="families-") as scratch:
            for record in run_all(chosen, Path(scratch), together=options.together):
                records.append(record)
                print("\n".join(told(record)), flush=True)
        if wanted and not options.merge:
            return 0
        if options.merge:
            records = merged(options.results, records)
        options.results.write_text(as_json(records), encoding="utf-8")
    from architectures_page import render

    text = (ROOT / "docs" / "architectures.json").read_text(encoding="utf-8")
    PAGE.write_text(render(json.loads(text)), encoding="utf-8")
    return 0


def merged(results: Path, new: Sequence[Record]) -> list[Record]:
    """The results with some families run again, in the table's order."""
    if not results.is_file():
        return list(new)
    before = json.loads(results.read_text(encoding="utf-8"))
    found = {(record["name"], record["form"]): record for record in (*before["families"], *new)}
    stacks = {stack: before["versions"][stack] for stack in (VLLM, LLAMA_CPP) if stack in before["versions"]}
    next(iter(found.values())).setdefault("versions", stacks)
    return [found[key] for family in families() if (key := (family.name, family.form)) in found]


if __name__ == "__main__":
    sys.exit(main())
