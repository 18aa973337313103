"""The families of models that people use: a tiny base of each, its copies, and every stack's own run of them.

``python tests/conformance/families.py`` runs all of them in transformers, vLLM and llama.cpp, and writes
docs/families.json, docs/architectures.md and the table of the README. What the same version of a stack ran of the same
files is not run again (``--again`` does). ``--only qwen3 "Gemma 2"`` prints some of them and writes nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from family_runs import ROOT, TOGETHER, Record, key_of, run_all
from support.families import Family, families

RESULTS = ROOT / "docs" / "families.json"
PAGE = ROOT / "docs" / "architectures.md"
COMMAND = "python tests/conformance/families.py"


def told(record: Record) -> Iterator[str]:
    """What is printed of a family."""
    title = f"{record['name']} {record['form']}".strip()
    if record.get("failed") or record.get("refused"):
        yield f"{title}: {'FAILED' if record.get('failed') else 'refused'}: {record.get('failed') or record['refused']}"
    for stack, base in record["base"].items():
        how = f"own error {base['own_error']}" if base["runs"] else f"the base does not run: {base['line']}"
        yield f"{title}: {stack}: {how}"
    for run in record["runs"]:
        yield f"{title}: asked for {run['asked']}: {run['route']} -> {run['reads']}, cost {run['cost']}"
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


def versions(records: Iterable[Record]) -> dict[str, str]:
    from importlib.metadata import version

    found = {"transformers": version("transformers"), "torch": version("torch")}
    for record in records:
        found |= {stack: base["build"] for stack, base in record["base"].items()}
    return found


def as_json(records: Sequence[Record]) -> str:
    """One line a family, so that a change can be read."""
    lines = ",\n".join(f"    {json.dumps(record)}" for record in records)
    head = json.dumps({"versions": versions(records), "command": COMMAND}, indent=2)[:-2]
    return f'{head},\n  "families": [\n{lines}\n  ]\n}}\n'


def known(results: Path) -> dict[str, Record]:
    """What was documented before, by :func:`key_of`."""
    if not results.is_file():
        return {}
    return {key_of(record): record for record in json.loads(results.read_text(encoding="utf-8"))["families"]}


def chosen(names: Sequence[str]) -> list[Family]:
    """The families of these names or model types; all, where none is given."""
    wanted = {name.lower() for name in names}
    return [
        family
        for family in families()
        if not wanted or wanted & {family.name.lower(), family.model_type, family.key, family.title.lower()}
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="NAME", default=(), help="these; prints, and writes nothing")
    parser.add_argument("--merge", action="store_true", help="with --only: put these into the results after all")
    parser.add_argument("--again", action="store_true", help="run what was run before of the same files as well")
    parser.add_argument("--together", type=int, default=TOGETHER, help="families in one process of a stack")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--render", action="store_true", help="only write the page again, from the results")
    options = parser.parse_args()
    if not options.render:
        before = known(options.results)
        found = {} if not options.only else dict(before)
        with tempfile.TemporaryDirectory(prefix="families-") as scratch:
            runs = run_all(
                chosen(options.only), Path(scratch), together=options.together, known={} if options.again else before
            )
            for record in runs:
                print("\n".join(told(record)), flush=True)
                found[key_of(record)] = record
        if options.only and not options.merge:
            return 0
        ordered = [found[family.key] for family in families() if family.key in found]
        options.results.write_text(as_json(ordered), encoding="utf-8")
    from architectures_page import render
    from readme_models import README, with_section

    text = (ROOT / "docs" / "architectures.json").read_text(encoding="utf-8")
    PAGE.write_text(render(json.loads(text)), encoding="utf-8")
    README.write_text(with_section(README.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
