"""What reading activations costs: ours beside other libraries, beside the arithmetic itself, and as things grow.

    tests/published_environments.sh
    python tests/benchmarks/capture.py [--pairs 16] [--repeats 2] [--write docs/performance-capture.md]

A random model of Qwen2-0.5B's shape and random pairs are made in a temporary folder (4 GB; TMPDIR says where); about
10 GB of memory are needed. All contenders run in this one run, in turns, each in a process of its own. Nothing is
downloaded, and no time is asserted. ``--tiny`` only shows that it works. OMP_NUM_THREADS sets the threads of all.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from capture_parts import all_layers, contenders, floor, from_disk, growth
from capture_parts.material import make_checkpoint
from capture_parts.setting import Setting, progress, setting
from capture_parts.tables import Table, document, load, machine, versions
from capture_parts.worker_process import REPOSITORY

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
TABLES = ["contenders", "floor", "layers", "growth", "disk"]
Sections = list[tuple[str, list[Table]]]


def main() -> None:
    options = _options()
    facts = machine()
    record: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="capture-benchmark-") as scratch:
        chosen = setting(
            tiny=options.tiny,
            scratch=Path(scratch),
            peers=options.peers,
            pairs=options.pairs,
            repeats=options.repeats,
        )
        sections, used = measure(chosen, options.dtypes, options.tables, record)
    facts += [("load when it ended", load()), *versions(used, REPOSITORY)]
    page = document(facts, sections, _command(chosen, options))
    if options.json is not None:
        options.json.write_text(json.dumps(record, indent=1), encoding="utf-8")
    if options.write is not None:
        options.write.write_text(page, encoding="utf-8")
    print("\n" + "\n".join(f"{name}: {value}" for name, value in facts))


def measure(
    chosen: Setting, dtypes: list[str], wanted: list[str], record: dict[str, Any]
) -> tuple[Sections, dict[str, Any]]:
    """The tables, printed as they are made, and the versions that were used."""
    sections: Sections = []
    used: dict[str, Any] = {}
    progress(f"making the model ({chosen.shape})")
    folders = make_checkpoint(chosen.scratch / "model", chosen.shape, [DTYPES[name] for name in dtypes], chosen.seed)
    for name in dtypes:
        dtype, of_dtype = DTYPES[name], record.setdefault(name, {})
        tables: list[Table] = []
        sections.append((name, tables))

        def show(table: Table, tables: list[Table] = tables, name: str = name) -> None:
            tables.append(table)
            print(f"\n{name}\n{table.markdown()}", flush=True)

        with contenders.contest(chosen, folders[dtype], dtype) as (found, ours):
            used |= found.versions
            of_dtype |= {"cosines": found.cosines, "control": found.control, "missing": found.missing}
            of_dtype["runs"] = {each: runs.answers for each, runs in found.runs.items()}
            of_dtype["gemm"] = found.gemm.answers
            show(contenders.table(found, chosen))
            for table in floor.tables(found, ours, chosen, of_dtype) if "floor" in wanted else ():
                show(table)
            if "layers" in wanted:
                show(all_layers.table(found.pairs, ours, chosen, of_dtype))
            if "growth" in wanted and name == dtypes[0]:
                show(growth.table(ours, dtype, chosen, of_dtype))
        if "disk" in wanted:
            show(from_disk.table(found.pairs, folders[dtype], dtype, chosen, of_dtype))
    return sections, used


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = os.environ.get("PUBLISHED_ENVIRONMENTS", ".venvs")
    parser.add_argument("--peers", type=Path, default=Path(default), help="the other libraries' environments")
    parser.add_argument("--pairs", type=int, help="how many contrast pairs (default: 16)")
    parser.add_argument("--repeats", type=int, default=2, help="how often each contender has its turn (default: 2)")
    parser.add_argument("--dtypes", type=_among(list(DTYPES)), default=list(DTYPES), help="default: fp32,bf16")
    parser.add_argument("--tables", type=_among(TABLES), default=TABLES, help=f"default: {','.join(TABLES)}")
    parser.add_argument("--tiny", action="store_true", help="a model with which nothing is to be measured")
    parser.add_argument(
        "--write", type=Path, metavar="PAGE", help="write the tables there: docs/performance-capture.md"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every measurement there")
    options = parser.parse_args()
    if options.repeats < 1 or (options.pairs is not None and options.pairs < 2):
        parser.error("at least one repeat and two pairs are needed")
    return options


def _among(known: list[str]) -> Callable[[str], list[str]]:
    def names(text: str) -> list[str]:
        unknown = [name for name in text.split(",") if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(known)}")
        return text.split(",")

    return names


def _command(chosen: Setting, options: argparse.Namespace) -> str:
    """What to type for the same again."""
    parts = ["python tests/benchmarks/capture.py", f"--pairs {chosen.pairs} --repeats {chosen.repeats}"]
    parts += [f"--dtypes {','.join(options.dtypes)}"]
    parts += [f"--tables {','.join(options.tables)}"] if options.tables != TABLES else []
    return " ".join([*parts, *(["--tiny"] if options.tiny else []), f"--write {options.write}"])


if __name__ == "__main__":
    main()
