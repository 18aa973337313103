"""Many damaged cases through every reader: ``python tests/fuzz/run.py --cases 100000 [--reader NAME]``.

Each reader runs in a process of its own, under a limit on its address space, one after the other. What broke a rule is
kept in ``--keep DIR``, a folder a case. Exit status 1 if anything did.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
_NUMBERS = ("cases", "refused", "accepted", "uncaught", "wrong")
_COLUMNS = ("reader", *_NUMBERS, "seconds", "slowest", "peak memory")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--cases", type=int, default=10_000, help="of each reader (a tenth of it and less of slow ones)"
    )
    parser.add_argument("--reader", action="append", help="only this one; may be repeated")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="where to write the cases that broke a rule")
    chosen = parser.parse_args(arguments)
    from support.fuzz.readers import READERS

    unknown = [name for name in chosen.reader or () if name not in READERS]
    if unknown:
        parser.error(f"no such reader: {unknown[0]} (there are {', '.join(READERS)})")
    print(_line(_COLUMNS), flush=True)
    total = dict.fromkeys((*_NUMBERS, "seconds"), 0)
    for name in chosen.reader or READERS:
        found = _in_process(name, chosen.cases, chosen.seed, chosen.keep)
        total = {key: value + found[key] for key, value in total.items()}
        print(_line([name, *_cells(found), f"{found['slowest']:.2f} s", f"{found['peak'] / 1e6:.0f} MB"]), flush=True)
        for text in found["texts"]:
            print(f"    {text}", file=sys.stderr, flush=True)
    print(_line(["all", *_cells(total), "", ""]), flush=True)
    return 1 if total["uncaught"] or total["wrong"] else 0


def _cells(found: dict[str, Any]) -> list[Any]:
    return [*(found[key] for key in _NUMBERS), f"{found['seconds']:.0f}"]


def _line(cells: Iterable[Any]) -> str:
    first, *rest = map(str, cells)
    return f"{first:<30}" + "".join(f"{cell:>12}" for cell in rest)


def _in_process(name: str, cases: int, seed: int, keep: Path | None) -> dict[str, Any]:
    """In a copy of this process: what all readers import is loaded once."""
    with tempfile.TemporaryDirectory(prefix="patch-model-fuzz-") as place:
        result = Path(place) / "result.json"
        child = os.fork()
        if child == 0:
            status = 1
            try:
                faulthandler.enable()
                result.write_text(json.dumps(_one(name, cases, seed, keep, Path(place) / "root")))
                status = 0
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                os._exit(status)
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if ended:
            nothing = dict.fromkeys((*_NUMBERS, "seconds", "slowest", "peak"), 0)
            return {**nothing, "uncaught": 1, "texts": [f"the process ended with status {ended}"]}
        found: dict[str, Any] = json.loads(result.read_text())
        return found


def _one(name: str, cases: int, seed: int, keep: Path | None, root: Path) -> dict[str, Any]:
    from support.fuzz.loop import fuzz
    from support.fuzz.memory import limit_memory, peak_bytes
    from support.fuzz.readers import READERS

    reader = READERS[name]
    reader.seeds()  # what they need is loaded before memory is limited and measured
    limit_memory()
    before = peak_bytes()
    tally = fuzz(reader, root, max(1, cases // reader.cost), seed)
    distinct = {failure.text.strip().splitlines()[-1][:300]: failure for failure in reversed(tally.failures)}
    for number, failure in enumerate(tally.failures if keep is not None else ()):
        _keep(keep / f"{name.replace(' ', '-')}-{number}", failure)
    report = {key: getattr(tally, key) for key in (*_NUMBERS, "seconds", "slowest")}
    texts = [f"{failure.kind}: {text}" for text, failure in list(distinct.items())[:40]]
    return {**report, "peak": peak_bytes() - before, "texts": texts}


def _keep(folder: Path, failure: Any) -> None:
    for file, content in failure.case.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(content)
    (folder / "WHAT.txt").write_text(failure.text, encoding="utf-8", errors="backslashreplace")


if __name__ == "__main__":
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    sys.path[:0] = [str(TESTS), str(TESTS.parent)]
    warnings.simplefilter("ignore")  # torch's, on pickles of odd versions
    sys.exit(main())
