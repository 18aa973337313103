"""What writing a steered copy costs, beside `cp -r` and beside load + modify + save_pretrained; and publishing it.

    python tests/benchmarks/write.py [--gigabytes 0.1,0.5,2.1] [--repeats 5] [--write docs/performance-write.md]

Llama-shaped bf16 checkpoints of four shards are made in a temporary folder (three times the largest size; TMPDIR says
where), and read once, so that all find them in memory. Everyone takes turns, in a process of his own, and everything
is on the disk before the next one's turn. No time is asserted.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from capture_parts.tables import Table, load, machine, seconds, versions
from write_checkpoint import MIB, make_checkpoint
from write_hub import published
from write_jobs import CP, HASHING, IMPORTS, JOBS, LINK, OURS, UNSYNCED
from write_page import page

ROOT = Path(__file__).parents[2]
RUNNER = Path(__file__).with_name("write_jobs.py")
Runs = dict[str, list[dict[str, float]]]
QUICK = (CP, OURS, LINK, IMPORTS)


def main() -> None:
    options = _options()
    facts = [*machine(), ("disk", _disk(Path(tempfile.gettempdir())))]
    record: dict[str, Any] = {}
    tables = []
    with tempfile.TemporaryDirectory(prefix="write-benchmark-") as name:
        scratch = Path(name)
        for gigabytes in options.gigabytes:
            base = make_checkpoint(scratch / "base", int(gigabytes * 1e9))
            size = sum(file.stat().st_size for file in base.iterdir())
            runs = contest(base, scratch / "target", options.repeats, QUICK if options.quick else JOBS)
            hub = publishing(base, scratch)
            record[f"{gigabytes:g}"] = {"size": size, "runs": runs, "hub": hub}
            tables.append(table(size, runs, options.repeats))
            print(f"\n{tables[-1].markdown()}", flush=True)
            print(f"\npublishing: {hub['sent']:,} bytes sent, by {hub['method']}, of {hub['size']:,}", flush=True)
            shutil.rmtree(base)
    facts += [("load when it ended", load())]
    packages = {name: metadata.version(name) for name in ("torch", "transformers", "safetensors", "huggingface_hub")}
    facts += versions({"python": {"": sys.version.split()[0]}, "libraries": packages}, ROOT)
    text = page(facts, tables, [(entry["size"], entry["hub"]) for entry in record.values()], _command(options))
    if options.json:
        options.json.write_text(json.dumps({"facts": facts, "sizes": record}, indent=1), encoding="utf-8")
    if options.write:
        options.write.write_text(text, encoding="utf-8")
    print("\n" + "\n".join(f"{name}: {value}" for name, value in facts))


def contest(base: Path, target: Path, repeats: int, jobs: Iterable[str]) -> Runs:
    """Every job ``repeats`` times, each time in another order: what one leaves to the disk, the next one pays for."""
    runs: Runs = {name: [] for name in jobs}
    order = list(runs)
    for number in range(repeats):
        for name in order:
            warm(base)
            runs[name].append(one(name, base, target))
            print(f"{number + 1} of {repeats}: {name}: {runs[name][-1]['seconds']:.2f} s", file=sys.stderr, flush=True)
        order.append(order.pop(0))
        order.append(order.pop(0))
    return runs


def one(name: str, base: Path, target: Path) -> dict[str, float]:
    with tempfile.TemporaryDirectory(dir=target.parent) as cache:
        # Hashes that were kept would not be computed.
        environment = {**os.environ, "TRANSFORMERS_VERBOSITY": "critical", "PATCH_MODEL_CACHE": cache}
        command = [sys.executable, str(RUNNER), name, str(base), str(target)]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    shutil.rmtree(target)
    os.sync()
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def publishing(base: Path, scratch: Path) -> dict[str, Any]:
    """A copy of linked files is published; see :func:`write_hub.published`."""
    target, home = scratch / "published", scratch / "home"
    command = [sys.executable, str(RUNNER), LINK, str(base), str(target)]
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    try:
        return published(base, target, home)
    finally:
        shutil.rmtree(target)
        shutil.rmtree(home, ignore_errors=True)


def warm(base: Path) -> None:
    """Every job reads from memory."""
    for file in base.iterdir():
        with file.open("rb", buffering=0) as handle:
            while handle.read(16 * MIB):
                pass


def table(size: int, runs: Runs, repeats: int) -> Table:
    """One size: time (best and median), time beside cp of the same kind, bytes, memory."""
    torch_alone = min(run["peak"] for run in runs[IMPORTS])
    rows = []
    for name in runs:
        if name == IMPORTS:
            continue
        taken = [run["seconds"] for run in runs[name]]
        like = runs[CP + UNSYNCED if name.endswith(UNSYNCED) else CP]
        theirs = [run["seconds"] for run in like]
        beside = [f"{kind(taken) / kind(theirs):.2f}" for kind in (min, statistics.median)]
        peak = max(run["peak"] for run in runs[name])
        memory = "-" if name.startswith(CP) else f"{max(0, peak - torch_alone) / MIB:,.0f}"
        written = max(run["written"] for run in runs[name]) / 1e6
        rows.append([name, seconds(min(taken)), seconds(statistics.median(taken)), *beside, f"{written:,.2f}", memory])
    columns = ["", "best s", "median s", "x cp, best", "x cp, median", "MB written", "MiB beyond import torch"]
    notes = []
    if HASHING in runs:
        copied, hashed = (seconds(min(run[key] for run in runs[HASHING])) for key in ("copied", "hashed"))
        notes.append(
            f"Hashing beside it: the copy was made after {copied} s, the hashes were there after {hashed} s (best of "
            f"{repeats}), then it was synced."
        )
    return Table(f"{size / 1e9:.2f} GB", columns, rows, notes)


def _disk(folder: Path) -> str:
    """The kind of file system that a folder lies on."""
    best = ("", "not known")
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _device, where, kind, *_ = line.split()
        if folder.is_relative_to(where) and len(where) > len(best[0]):
            best = (where, kind)
    return best[1]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=_numbers, default=[0.1, 0.5, 2.1], help="default: 0.1,0.5,2.1")
    parser.add_argument("--repeats", type=int, default=5, help="how often each has its turn (default: 5)")
    parser.add_argument("--quick", action="store_true", help="only cp and ours, to see that it works")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="write the tables there: docs/performance-write.md")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every measurement there")
    return parser.parse_args()


def _numbers(text: str) -> Sequence[float]:
    return [float(part) for part in text.split(",")]


def _command(options: argparse.Namespace) -> str:
    sizes = ",".join(f"{size:g}" for size in options.gigabytes)
    return f"python tests/benchmarks/write.py --gigabytes {sizes} --repeats {options.repeats} --write {options.write}"


if __name__ == "__main__":
    main()
