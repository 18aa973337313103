"""What a whole build costs, beside a script that anyone writes, and beside a library with `save_pretrained`.

    tests/published_environments.sh
    python tests/benchmarks/build.py [--shapes 0.1b,0.5b,1b] [--dtypes bf16,fp32] [--write docs/performance.md]

Random models and questions are made in a temporary folder (10 GB; TMPDIR says where); about 12 GB of memory are
needed. Nothing is downloaded, and no time is asserted. ``--tiny`` only shows that it works. OMP_NUM_THREADS sets the
threads of all. For a GPU, one 7-B model and longer prompts:

    python tests/benchmarks/build.py --device cuda --write docs/performance-gpu.md
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
sys.path.insert(1, str(REPOSITORY))

from build_parts.contest import DTYPES, Task, Turns, build, contest  # noqa: E402
from build_parts.material import SHAPES, Questions, checkpoints, make_questions, make_tokenizer  # noqa: E402
from build_parts.page import page, ratios  # noqa: E402
from build_parts.whole_process import Cost  # noqa: E402
from capture_parts.setting import progress  # noqa: E402
from capture_parts.tables import load, machine, versions  # noqa: E402
from capture_parts.worker_process import interpreter  # noqa: E402

from patcher.checkpoint.folder import CheckpointFolder  # noqa: E402

VOCABULARY = 32_000
VERSIONS = """
import importlib.metadata as m, json, sys
found = {"python": sys.version.split()[0]}
for name in ("torch", "transformers", "numpy", "steering-vectors"):
    try:
        found[name] = m.version(name)
    except m.PackageNotFoundError:
        pass
print(json.dumps(found))
"""


def main() -> None:
    options = _options()
    facts = machine()
    with tempfile.TemporaryDirectory(prefix="build-benchmark-") as name:
        found, quickstart, vocabulary = measure(Path(name), options)
    facts += [("load when it ended", load()), *versions(_versions(options.peers), REPOSITORY)]
    text = page(facts, found, quickstart, vocabulary, _command(options))
    if options.json:
        record: dict[str, Any] = {task.title: turns.record() for task, turns in found}
        record["quickstart"] = [cost.wall for cost in quickstart]
        options.json.write_text(json.dumps({"facts": facts, **record}, indent=1), encoding="utf-8")
    if options.write:
        options.write.write_text(text, encoding="utf-8")
    print("\n" + ratios(found).markdown())


def measure(scratch: Path, options: argparse.Namespace) -> tuple[list[tuple[Task, Turns]], list[Cost], int]:
    """Every task's turns, the quickstart's costs, and the size of the tokenizer."""
    # First, so that all of the package is compiled when the others begin.
    quickstart = []
    for turn in range(options.repeats if options.quickstart else 0):
        cost, _ = build(REPOSITORY / "recipes" / "quickstart.yaml", scratch, scratch / f"quickstart-{turn}")
        quickstart.append(cost)
        progress(f"quickstart, turn {turn + 1}: {cost.wall:.1f} s")
    encoder = make_tokenizer(min(VOCABULARY, *(SHAPES[shape].vocabulary for shape in options.shapes)))
    asked = {
        name: make_questions(scratch / name, options.questions, long=name == "long", encoder=encoder)
        for name in ("short", "long")
    }
    found: list[tuple[Task, Turns]] = []
    for shape in options.shapes:
        dtypes = [dtype for dtype in options.dtypes if dtype != "fp32" or shape in options.fp32_shapes]
        progress(f"making the model ({SHAPES[shape]})")
        names = [DTYPES[dtype] for dtype in dtypes]
        folders = checkpoints(scratch / "bases", shape, names, encoder, options.device)
        for dtype in dtypes:
            long = shape in options.long and dtype == options.dtypes[0]
            for length in [*(["short"] if options.device == "cpu" else []), *(["long"] if long else [])]:
                task = _task(shape, dtype, folders[DTYPES[dtype]], asked[length])
                once = length == "long" or f"{shape}-{dtype}" in options.once
                again = length == "short" and dtype == options.dtypes[0]
                repeats = 1 if once else options.repeats
                turns = contest(task, options.peers, scratch, repeats, device=options.device, again=again)
                found.append((task, turns))
                print(f"\n{ratios(found[-1:]).markdown()}", flush=True)
        shutil.rmtree(scratch / "bases")
    return found, quickstart, len(encoder)


def _task(shape: str, dtype: str, base: Path, questions: Questions) -> Task:
    parameters = sum(math.prod(tensor.shape) for tensor in CheckpointFolder(base).tensors.values())
    return Task(shape, dtype, base, parameters, questions, int(0.4 * SHAPES[shape].blocks))


def _versions(peers: Path) -> dict[str, dict[str, str]]:
    """Of ours (the script runs there as well) and of the library's environment."""
    found = {}
    for name in ("ours", "steering-vectors"):
        python = interpreter(name, peers)
        if python is not None:
            shown = subprocess.run([python, "-I", "-c", VERSIONS], capture_output=True, text=True, check=True)
            found[name] = json.loads(shown.stdout)
    return found


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = os.environ.get("PUBLISHED_ENVIRONMENTS", ".venvs")
    parser.add_argument("--peers", type=Path, default=Path(default), help="the other libraries' environments")
    parser.add_argument("--shapes", type=_among(SHAPES), help="default: 0.1b,0.5b,1b; on a GPU 7b")
    parser.add_argument("--dtypes", type=_among(DTYPES), help="default: bf16,fp32; on a GPU bf16")
    fp32, long = "shapes that are built in fp32 too: 0.1b,0.5b", "shapes with longer prompts too: 0.5b, on a GPU 7b"
    parser.add_argument("--fp32-shapes", type=_among(SHAPES), default=["0.1b", "0.5b", "tiny"], help=fp32)
    parser.add_argument("--long", type=_among(SHAPES), help=long)
    every = [f"{shape}-{dtype}" for shape in SHAPES for dtype in DTYPES]
    once = ["1b-bf16", "0.5b-fp32"]
    parser.add_argument("--once", type=_among(every), default=once, help=f"with one turn only: {','.join(once)}")
    parser.add_argument("--questions", type=int, help="four of five are read (default: 50; on a GPU 250)")
    parser.add_argument("--repeats", type=int, help="how often each has its turn (default: 2; on a GPU 1)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--no-quickstart", dest="quickstart", action="store_false", help="leave the quickstart out")
    parser.add_argument("--tiny", action="store_true", help="a model with which nothing is to be measured")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="write the tables there: docs/performance.md")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every measurement there")
    options = parser.parse_args()
    gpu = options.device != "cpu"
    options.shapes = options.shapes or (["tiny"] if options.tiny else ["7b"] if gpu else ["0.1b", "0.5b", "1b"])
    options.dtypes = options.dtypes or (["bf16"] if gpu or options.tiny else ["bf16", "fp32"])
    options.long = options.long or (options.shapes if gpu else ["0.5b"])
    options.questions = options.questions or (250 if gpu and not options.tiny else 50)
    options.repeats = options.repeats or (1 if gpu or options.tiny else 2)
    options.quickstart = options.quickstart and not gpu
    if options.questions < 10:
        parser.error("at least ten questions are needed: of fewer, none is held out")
    return options


def _among(known: Iterable[str]) -> Callable[[str], list[str]]:
    def names(text: str) -> list[str]:
        unknown = [name for name in text.split(",") if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(known)}")
        return text.split(",")

    return names


def _command(options: argparse.Namespace) -> str:
    """What to type for the same again."""
    parts = ["python tests/benchmarks/build.py", f"--shapes {','.join(options.shapes)}"]
    parts += [f"--dtypes {','.join(options.dtypes)}", f"--repeats {options.repeats}"]
    parts += [f"--device {options.device}"] if options.device != "cpu" else []
    parts += [f"--questions {options.questions}"] if options.questions != 50 else []
    return " ".join([*parts, *(["--tiny"] if options.tiny else []), f"--write {options.write}"])


if __name__ == "__main__":
    main()
