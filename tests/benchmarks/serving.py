"""What a copy costs when it runs: tokens a second of base, copy and hooked base, in three stacks, for five routes.

    patch-model stacks install vllm
    patch-model stacks install llama.cpp
    python tests/benchmarks/serving.py [--repeats 4] [--tokens 48] [--write docs/performance-serving.md]

Small random models are made in a temporary folder (4 GB; TMPDIR says where), and their copies are built and verified.
PATCH_MODEL_VLLM and PATCH_MODEL_LLAMA_CPP say where the stacks are, as in `patch-model verify --stack`; one that is not
there is left out, and the page says so. Nothing is downloaded, and no time is asserted. ``--tiny`` only shows that it
works. Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from capture_parts.setting import progress
from capture_parts.tables import load, machine, versions
from serving_parts.models import CASES, FULL, TINY, make_pairs
from serving_parts.page import page, summary
from serving_parts.stacks import run

from patcher.stacks.names import STACKS

REPOSITORY = Path(__file__).parents[2]
PROMPT = 32


def main() -> None:
    options = _options()
    facts = machine()
    size = TINY if options.tiny else FULL
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="serving-benchmark-") as name:
        scratch = Path(name)
        progress("building the copies")
        pairs, failed = make_pairs(scratch, options.routes, size)
        prompt = list(range(100, 100 + PROMPT))
        for stack in options.stacks:
            start = time.perf_counter()
            found[stack] = run(stack, pairs, scratch, prompt=prompt, tokens=options.tokens, repeats=options.repeats)
            progress(f"{stack}: run in {time.perf_counter() - start:.1f} s")
    python = {"python": {"": sys.version.split()[0]}}
    facts += [(f"no copy by `{route}`", why) for route, why in failed.items()]
    facts += [("load when it ended", load()), *versions(python, REPOSITORY)]
    numbers = {"prompt": PROMPT, "tokens": options.tokens, "repeats": options.repeats}
    text = page(facts, pairs, found, size=size, **numbers, command=_command(options))
    if options.json:
        options.json.write_text(json.dumps({"facts": facts, "stacks": found}, indent=1), encoding="utf-8")
    if options.write:
        options.write.write_text(text, encoding="utf-8")
    print("\n" + summary(pairs, found).markdown())


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--routes", type=_list, default=list(CASES), help=f"default: {','.join(CASES)}")
    parser.add_argument("--stacks", type=_list, default=list(STACKS), help=f"default: {','.join(STACKS)}")
    parser.add_argument("--repeats", type=int, default=4, help="how many turns each has (default: 4)")
    parser.add_argument("--tokens", type=int, default=48, help="new tokens of a request (default: 48)")
    parser.add_argument("--tiny", action="store_true", help="models with which nothing is to be measured")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="write the page: docs/performance-serving.md")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every measurement there")
    options = parser.parse_args()
    for what, known in (("routes", list(CASES)), ("stacks", list(STACKS))):
        unknown = [name for name in getattr(options, what) if name not in known]
        if unknown:
            parser.error(f"--{what}: {unknown[0]!r} is none of {', '.join(known)}")
    return options


def _list(text: str) -> list[str]:
    return text.split(",")


def _command(options: argparse.Namespace) -> str:
    """What to type for the same again."""
    parts = [f"python tests/benchmarks/serving.py --repeats {options.repeats} --tokens {options.tokens}"]
    parts += [f"--routes {','.join(options.routes)}"] if options.routes != list(CASES) else []
    parts += [f"--stacks {','.join(options.stacks)}"] if options.stacks != list(STACKS) else []
    return " ".join([*parts, *(["--tiny"] if options.tiny else []), f"--write {options.write}"])


if __name__ == "__main__":
    main()
