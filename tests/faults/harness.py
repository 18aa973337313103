"""Builds that are killed, starved, forbidden and disturbed: a whole output or none, an untouched base, a clear word.

    python tests/faults/harness.py [--kills 200] [--seed 0] [--only WORDS] [--json]

Real builds (real verification included) of a tiny Llama in a temporary folder, as forks of one process that has
imported everything. Each is killed (SIGKILL: the process, or its group) at a moment drawn by chance, and what is left
is looked at; then every other fault has its turn. Exit 1 if anything did not hold. What needs root is skipped without
it, and says so.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "NO_COLOR": "1"}
sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from harness_parts import disk_cases, moving_cases  # noqa: E402
from harness_parts.broken import BROKEN, found  # noqa: E402
from harness_parts.cases import REPLACED, Case, Skipped  # noqa: E402
from harness_parts.checks import Bench, FaultFound  # noqa: E402
from harness_parts.kills import Kills, kill_many  # noqa: E402

CASES = [*disk_cases.CASES, *moving_cases.CASES]


def main() -> int:
    options = _options()
    started = time.monotonic()
    cases = [case for case in CASES if any(words in case.name for words in options.only or [""])]
    cases = [case for case in cases if case.quick or not options.quick]
    with tempfile.TemporaryDirectory(prefix="fault-harness-") as name:
        bench = Bench(Path(name))
        kills = Kills()
        results = []
        if options.kills:
            kills = kill_many(bench, options.kills, options.seed, _say)
            _say(f"killed {kills.made} ({time.monotonic() - started:.0f} s)")
        for case in cases:
            results.append(_result(bench, case))
            _say(f"{results[-1]['status']}: {case.name} ({results[-1]['seconds']:.1f} s)")
        overlooked = []
        for fault in BROKEN if options.self_test else []:
            bench.reset(REPLACED)  # so that the whole outputs are honest ones
            said = found(bench, fault)
            overlooked += [fault] * (said is None)
            _say(f"planted: {fault}: {(said or 'NOT FOUND').splitlines()[0]} ({time.monotonic() - started:.0f} s)")
    failed = len(kills.failures) + len(overlooked) + sum(result["status"] == "failed" for result in results)
    report = {
        "kills": kills.as_json(),
        "seed": options.seed,
        "cases": results,
        "planted": {"found": [fault for fault in BROKEN if fault not in overlooked], "overlooked": overlooked}
        if options.self_test
        else None,
        "failed": failed,
        "seconds": time.monotonic() - started,
    }
    if options.json:
        print(json.dumps(report))
    else:
        print_table(report)
    return 1 if failed else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="how many builds are killed")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and of whom the kill ends")
    parser.add_argument("--only", action="append", metavar="WORDS", help="only cases whose name has these words")
    parser.add_argument("--quick", action="store_true", help="every other fault once, not in all its forms")
    parser.add_argument("--self-test", action="store_true", help="also plant faults in the writer, and find them")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    return parser.parse_args()


def _result(bench: Bench, case: Case) -> dict[str, Any]:
    started = time.monotonic()
    try:
        status, detail = "passed", case.run(bench)
    except Skipped as why:
        status, detail = "skipped", str(why)
    except FaultFound as found:
        status, detail = "failed", str(found)
    return {"name": case.name, "status": status, "detail": detail, "seconds": time.monotonic() - started}


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def print_table(report: dict[str, Any]) -> None:
    kills = report["kills"]
    if kills["made"]:
        print(f"\n{kills['survived']} of {kills['made']} kills survived (seed {report['seed']})")
        for title, key in (
            ("killed", "whom"),
            ("a build of", "modes"),
            ("while", "phases"),
            ("the output was", "outputs"),
        ):
            print(f"  {title + ':':17}" + ", ".join(f"{name} {number}" for name, number in sorted(kills[key].items())))
        print(f"  {'left behind:':17}in {kills['leftovers']} cases, all cleaned by the next build")
        print(f"  {'next builds:':17}{kills['completed']} run to their end")
        print(f"  {'child processes:':17}ended by themselves within {kills['longest']:.2f} s")
        for failure in kills["failures"]:
            print(f"  FAILED {failure}")
    if report["cases"]:
        width = max(len(result["name"]) for result in report["cases"])
        print()
        for result in report["cases"]:
            print(f"{result['name']:{width}}  {result['status']:8}{result['detail']}")
    if report["planted"]:
        print(f"\nplanted faults found: {', '.join(report['planted']['found'])}")
        print(f"overlooked: {', '.join(report['planted']['overlooked']) or 'none'}")
    print(f"\n{report['failed']} failed, {report['seconds']:.0f} s")


if __name__ == "__main__":
    sys.exit(main())
