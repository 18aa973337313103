"""Many damaged cases through every reader: ``python tests/fuzz/run.py --cases 100000 [--reader NAME]``.

Each reader runs in a process of its own, under a limit on its address space, one after the other. What broke a rule is
kept in ``--keep DIR``, a folder a case. Exit status 1 if anything did.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
MORE_MEMORY = 1 << 30
"""Bytes of address space that a reader may take beside what it starts with."""
_COLUMNS = "reader", "cases", "refused", "accepted", "uncaught", "wrong", "seconds", "slowest", "peak memory"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--cases", type=int, default=10_000, help="of each reader (a tenth of it and less of slow ones)"
    )
    parser.add_argument("--reader", action="append", help="only this one; may be repeated")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="where to write the cases that broke a rule")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one:
        return _one(chosen.one, chosen.cases, chosen.seed, chosen.keep)
    _import_paths()
    from fuzz_readers import READERS

    unknown = [name for name in chosen.reader or () if name not in READERS]
    if unknown:
        parser.error(f"no such reader: {unknown[0]} (there are {', '.join(READERS)})")
    print(_line(_COLUMNS), flush=True)
    broken = 0
    for name in chosen.reader or READERS:
        found = _in_process(name, chosen.cases, chosen.seed, chosen.keep)
        broken += found["uncaught"] + found["wrong"]
        cells = [found[key] for key in ("cases", "refused", "accepted", "uncaught", "wrong")]
        print(
            _line(
                [name, *cells, f"{found['seconds']:.0f}", f"{found['slowest']:.2f} s", f"{found['peak'] / 1e6:.0f} MB"]
            ),
            flush=True,
        )
        for text in found["texts"]:
            print(f"    {text}", file=sys.stderr, flush=True)
    return 1 if broken else 0


def _line(cells: Any) -> str:
    first, *rest = map(str, cells)
    return f"{first:<30}" + "".join(f"{cell:>12}" for cell in rest)


def _in_process(name: str, cases: int, seed: int, keep: Path | None) -> dict[str, Any]:
    command = [
        sys.executable,
        "-X",
        "faulthandler",
        __file__,
        "--one",
        name,
        "--cases",
        str(cases),
        "--seed",
        str(seed),
    ]
    if keep is not None:
        command += ["--keep", str(keep)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=environment)
    if done.returncode != 0:
        nothing = dict.fromkeys(("cases", "refused", "accepted", "wrong", "seconds", "slowest", "peak"), 0)
        return {**nothing, "uncaught": 1, "texts": [f"the process ended with status {done.returncode}"]}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _one(name: str, cases: int, seed: int, keep: Path | None) -> int:
    _import_paths()
    from fuzz_loop import fuzz
    from fuzz_readers import READERS

    reader = READERS[name]
    reader.seeds()  # what they need is loaded before memory is limited and measured
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MORE_MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory(prefix="patch-model-fuzz-") as place:
        tally = fuzz(reader, Path(place) / "root", max(1, cases // reader.cost), seed)
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    distinct = {failure.text.strip().splitlines()[-1][:300]: failure for failure in reversed(tally.failures)}
    if keep is not None:
        for number, failure in enumerate(tally.failures):
            _keep(keep / f"{name.replace(' ', '-')}-{number}", failure)
    report = {
        key: getattr(tally, key) for key in ("cases", "refused", "accepted", "uncaught", "wrong", "seconds", "slowest")
    }
    texts = [f"{failure.kind}: {text}" for text, failure in list(distinct.items())[:40]]
    print(json.dumps({**report, "peak": peak, "texts": texts}))
    return 0


def _keep(folder: Path, failure: Any) -> None:
    for file, content in failure.case.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(content)
    (folder / "WHAT.txt").write_text(failure.text, encoding="utf-8", errors="backslashreplace")


def _import_paths() -> None:
    sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent.parent)]


if __name__ == "__main__":
    sys.exit(main())
