"""Every text causal LM and every multimodal model of the installed transformers: built tiny, patched, loaded by the
stock class, compared.

``python tests/conformance/all_architectures.py`` runs all of them and writes docs/architectures.json and
docs/architectures.md; ``--only llama qwen3`` prints some of them and writes nothing, or with ``--merge`` these alone;
``--new`` merges those that the table has not. A run that writes does so after each type, so that ``--resume`` goes on.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from wrapper_runs import WrapperRecord, check_wrapper, lost_wrapper

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "architectures.json"
PAGE = ROOT / "docs" / "architectures.md"
COMMAND = "python tests/conformance/all_architectures.py"
TIMEOUT = 900.0
LAYER = 2
EXACT_LIMIT = 2e-5
"""Largest difference of an exact route, in log-probabilities; a share of the effect where that is large."""
EXACT_SHARE = 5e-5
EXACT_NOISE = 5.0
NOTHING: dict[str, Any] = {"versions": {}, "architectures": [], "wrappers": []}
"""Times what another rounding of the vector does."""
WHOLE_PATTERNS = ("jamba",)
"""Types whose blocks are of types that the class computes: a tiny base has as many, or shows no pattern."""


@dataclass(frozen=True)
class Run:
    """One layer of one architecture.

    Attributes:
        layer: the layer of the default config that was steered; -1 is the embedding.
        kind: its layer type, where there are several.
        status: ``exact``, ``fitted``, ``none`` (no route), ``wrong`` (the copy is not what the hook is) or ``failed``.
        reason: why not, in words.
        difference: largest difference of log-probabilities from the hook.
        effect: largest difference that the hook makes.
        vector_share: norm of the vector beside the residual stream's.
        report: what the stock library reports about the copy and not about the base.
    """

    layer: int
    kind: str
    status: str
    reason: str = ""
    route: str | None = None
    cost: str | None = None
    reads: str | None = None
    stacks: dict[str, str] = field(default_factory=dict)
    difference: float | None = None
    effect: float | None = None
    vector_share: float | None = None
    report: dict[str, list[str]] = field(default_factory=dict)
    fit: dict[str, Any] | None = None
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Record:
    """One architecture; the first run is the one that stands for it.

    Attributes:
        runs: one block of each kind, and the embedding.
        seconds: wall time.
        decoder_set: whether its default config is an encoder's.
        free: where the planner's choice costs something at run time, the same block with ``prefer: free``.
    """

    model_type: str
    class_name: str
    runs: tuple[Run, ...]
    seconds: float
    decoder_set: bool = False
    free: Run | None = None


def model_types() -> list[str]:
    """Every text causal LM that the installed transformers has."""
    from support.default_configs import TEXT_TYPES

    return TEXT_TYPES


def wrapper_types() -> list[str]:
    """Every multimodal language model that the installed transformers has."""
    from support.default_configs import WRAPPER_TYPES

    return WRAPPER_TYPES


def other_than_recorded(results: dict[str, Any]) -> tuple[list[str], list[str]]:
    """The types that the installed transformers has and the recorded table has not, and the other way round."""
    recorded = {each["model_type"] for each in [*results["architectures"], *results.get("wrappers", ())]}
    installed = {*model_types(), *wrapper_types()}
    return sorted(installed - recorded), sorted(recorded - installed)


def check(model_type: str, *, kinds: bool = True) -> Record:
    """Patch and compare one architecture: a layer in the middle; with ``kinds`` one of each other kind as well."""
    from support.default_configs import needs_is_decoder

    from patcher.architectures.installed import text_models

    start = time.monotonic()
    places = layer_kinds(model_type) if kinds else [(LAYER, "")]
    runs = [_run(model_type, layer, kind) for layer, kind in places]
    free = None
    if runs[0].route is not None and runs[0].cost != "none":
        free = _run(model_type, runs[0].layer, runs[0].kind, prefer="free")
    return Record(
        model_type,
        text_models()[model_type],
        tuple(runs),
        round(time.monotonic() - start, 1),
        needs_is_decoder(model_type),
        free if free is not None and free.cost == "none" and free.status != "fitted" else None,
    )


def layer_kinds(model_type: str) -> list[tuple[int, str]]:
    """A layer in the middle of the default config, one of each other kind that it has, and the embedding."""
    from support.default_configs import default_config

    from patcher.architectures.analysis import Architecture

    try:
        architecture = Architecture(default_config(model_type))
    except Exception:
        # What is wrong is said by the run itself.
        return [(LAYER, "")]
    # The type is what the config calls it; the parameters tell kinds apart that it does not name.
    found: dict[tuple[str, ...], int] = {}
    order = sorted(range(architecture.block_count), key=lambda layer: (layer != LAYER, layer < LAYER, layer))
    for layer in order:
        # Zamba2 numbers its adapters by the block that they belong to.
        kind = tuple(sorted({re.sub(r"\.\d+\.\d+\.", ".", name) for name in architecture.kind(layer)[:-1]}))
        found.setdefault((*kind, architecture.kind(layer)[-1]), layer)
    return [*((layer, _kind_name(kind, list(found))) for kind, layer in found.items()), (-1, "embedding")]


def _kind_name(kind: tuple[str, ...], found: list[tuple[str, ...]]) -> str:
    """The layer type, and, where several kinds have it, a module that only this one has."""
    alike = [other for other in found if other[-1] == kind[-1] and other != kind]
    if not alike:
        return kind[-1] if len(found) > 1 else ""
    own = sorted(set(kind[:-1]) - set().union(*alike))
    detail = f"with {own[0].rpartition('.')[0] or own[0]}" if own else "with less"
    return f"{kind[-1]} {detail}".strip()


def _run(model_type: str, layer: int, kind: str, **options: Any) -> Run:
    from support.tiny_models import default_checkpoint
    from support.tiny_patch import patch_tiny

    from patcher.errors import PatchModelError

    with tempfile.TemporaryDirectory() as scratch:
        try:
            # Without a tokenizer: ids are compared, and what a class's own tokenizer is called is another matter.
            base = Path(scratch) / "base"
            deep = model_type in WHOLE_PATTERNS
            place = default_checkpoint(base, model_type, max(layer, 0), tokenizer=False, trained_scale=True, deep=deep)
        except Exception as error:
            return Run(layer, kind, "failed", f"no tiny model of it could be made: {_first_line(error)}")
        try:
            patched = patch_tiny(base, Path(scratch) / "copy", [layer if layer < 0 else place], **options)
        except PatchModelError as error:
            problem = error.problems[0]
            return Run(
                layer, kind, "none" if error.code in ("no_route", "exact") else "failed", problem.found or str(error)
            )
        except Exception as error:
            print(f"{model_type}, layer {layer}:\n{traceback.format_exc()}", file=sys.stderr)
            return Run(layer, kind, "failed", f"{type(error).__name__}: {_first_line(error)}")
    plan = patched.plan
    limit = max(EXACT_LIMIT, EXACT_SHARE * patched.effect, EXACT_NOISE * patched.noise)
    if not plan.exact:
        status, reason = "fitted", plan.reason
    elif not patched.difference <= limit or not patched.effect > 0.01:
        status, reason = "wrong", f"the copy differs from the hook by {patched.difference:.2g}"
    elif patched.report:
        status, reason = "wrong", f"loading the copy reports {json.dumps(patched.report)[:200]}"
    else:
        status, reason = "exact", plan.reason
    return Run(
        layer,
        kind,
        status,
        reason,
        plan.route,
        plan.cost,
        plan.architecture,
        dict(plan.stacks),
        patched.difference,
        patched.effect,
        patched.vector_share,
        {key: list(names) for key, names in patched.report.items()},
        dict(plan.fit) if plan.fit is not None else None,
        list(plan.warnings),
    )


def _first_line(error: BaseException) -> str:
    found = getattr(error, "problems", None)
    if found and found[0].found:
        return str(found[0].found)
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


# A few at a time, each in a process of its own


def run_all(
    names: Iterable[str], *, kinds: bool = True, processes: int = 2, timeout: float = TIMEOUT
) -> Iterator[Record | WrapperRecord]:
    """The records, as they come; one that crashes or hangs is recorded as failed, and the others go on."""
    # The server imports once; every type then gets a process that nothing else can disturb.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers", "tokenizers", "patcher.routes.planner"])
    waiting = list(names)[::-1]
    running: dict[Connection, tuple[Any, str, float]] = {}
    while waiting or running:
        while waiting and len(running) < processes:
            name = waiting.pop()
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_worker, args=(name, kinds, sender), daemon=True)
            process.start()
            sender.close()
            running[receiver] = (process, name, time.monotonic())
        for receiver in wait(list(running), timeout=1.0):
            process, name, start = running.pop(receiver)
            try:
                yield receiver.recv()
            except EOFError:
                process.join()
                yield _lost(name, start, f"its process died (exit code {process.exitcode})")
            process.join()
        for receiver, (process, name, start) in list(running.items()):
            if time.monotonic() - start > timeout:
                process.kill()
                process.join()
                del running[receiver]
                yield _lost(name, start, f"it took longer than {timeout:.0f} s")


def _worker(name: str, kinds: bool, sender: Connection) -> None:
    import torch

    torch.set_num_threads(1)
    try:
        sender.send(check_wrapper(name, kinds=kinds) if name in wrapper_types() else check(name, kinds=kinds))
    finally:
        sender.close()


def _lost(name: str, start: float, reason: str) -> Record | WrapperRecord:
    from patcher.architectures.installed import text_models

    seconds = round(time.monotonic() - start, 1)
    if name in wrapper_types():
        return lost_wrapper(name, seconds, reason)
    return Record(name, text_models().get(name, ""), (Run(LAYER, "", "failed", reason),), seconds)


# Results


def versions() -> dict[str, str]:
    import torch
    import transformers

    import patcher

    return {
        "patch-model": getattr(patcher, "__version__", "0"),
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="TYPE", help="these types; prints, and writes nothing")
    parser.add_argument("--merge", action="store_true", help="with --only: take the place of those types' results")
    parser.add_argument("--main-layer", action="store_true", help="one layer a type, not one of each kind")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=TIMEOUT, help="seconds a type")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--render", action="store_true", help="only write the page again, from the results")
    parser.add_argument("--new", action="store_true", help="the types that the table has not, merged into it")
    parser.add_argument("--resume", action="store_true", help="go on with a run that was interrupted")
    options = parser.parse_args()
    before = json.loads(options.results.read_text(encoding="utf-8")) if options.results.is_file() else NOTHING
    if not options.render:
        added, gone = other_than_recorded(before)
        release, recorded = versions()["transformers"], before["versions"].get("transformers")
        print(
            f"transformers {release} (the table is of {recorded}) adds {added or 'nothing'}, lacks {gone or 'nothing'}"
        )
        names = options.only or (added if options.new else [*model_types(), *wrapper_types()])
        kept = [*before["architectures"], *before.get("wrappers", ())]
        kept = [each for each in kept if each["model_type"] not in {*names, *gone}]
        part = options.results.with_suffix(".part.jsonl")
        writes = options.merge or not options.only
        if writes and options.resume and part.is_file():
            done = [json.loads(line) for line in part.read_text(encoding="utf-8").splitlines()]
            kept += done
            names = [name for name in names if name not in {each["model_type"] for each in done}]
        elif writes:
            part.write_text("", encoding="utf-8")
        records: list[dict[str, Any]] = []
        for record in run_all(
            names, kinds=not options.main_layer, processes=options.processes, timeout=options.timeout
        ):
            records.append(asdict(record))
            _tell(record, f"{len(records)}/{len(names)}")
            if writes:
                with part.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(records[-1]) + "\n")
        if not writes:
            return 0
        options.results.parent.mkdir(exist_ok=True)
        options.results.write_text(as_json([*kept, *records]), encoding="utf-8")
        part.unlink()
    from architectures_page import render
    from readme_models import README, with_section

    results = json.loads(options.results.read_text(encoding="utf-8"))
    options.page.write_text(render(results), encoding="utf-8")
    if options.page == PAGE:
        README.write_text(with_section(README.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


def _tell(record: Record | WrapperRecord, place: str) -> None:
    more = [record.free] if isinstance(record, Record) and record.free else []
    for run in (*record.runs, *more):
        measured = "" if run.difference is None else f" {run.difference:.1e} of {run.effect:.2g}"
        kind = (
            run.kind
            if isinstance(run, Run)
            else " ".join(f"image {run.images[key]}" for key in ("status",) if run.images)
        )
        print(
            f"[{place}] {record.model_type} {run.layer} {kind}: {run.status} {run.route or ''}{measured} "
            f"({record.seconds} s) {run.reason}",
            flush=True,
        )


def as_json(records: Iterable[dict[str, Any]]) -> str:
    """One line a type, so that a change can be read; text models apart from multimodal ones."""
    every = sorted(records, key=lambda each: str(each["model_type"]))
    parts = {
        "architectures": [json.dumps(each) for each in every if "loader" not in each],
        "wrappers": [json.dumps(each) for each in every if "loader" in each],
    }
    head = json.dumps({"versions": versions(), "command": COMMAND}, indent=2)[:-2]
    lists = [f'  "{name}": [\n    ' + ",\n    ".join(lines) + "\n  ]" for name, lines in parts.items()]
    return ",\n".join([head, *lists]) + "\n}\n"


if __name__ == "__main__":
    sys.exit(main())
