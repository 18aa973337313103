"""Runs a contender in a process of its own: actions come as JSON lines on stdin, answers go as JSON lines to stdout.

    python -I serve.py CONTENDER.py FOLDER DTYPE [--path ENTRY] [--forbid MODULE]

The contender's file has a class ``Contender(folder, dtype)`` with the attribute ``model`` (None: it loads nothing
beforehand). A request ``{"do": "capture", "with": {...}, "save": PATH}`` calls its method ``capture(**with)``, which
returns a dictionary; tensors in it are saved, the rest is answered beside what the call cost.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import importlib.metadata
import importlib.util
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any, TextIO

import torch
from safetensors.torch import save_file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("contender", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("dtype")
    parser.add_argument("--path", action="append", default=[], help="an entry of sys.path")
    parser.add_argument("--forbid", action="append", default=[], help="a module that may not be imported")
    options = parser.parse_args()
    answers = own_stdout()
    sys.path[:0] = options.path
    for name in options.forbid:
        sys.modules[name] = None  # type: ignore[assignment]
    contender = load(options.contender)(options.folder, options.dtype)
    touch(contender.model)
    gc.collect()
    give_memory_back()
    loaded = memory().get("VmRSS")
    say(answers, {"loaded": loaded, "threads": torch.get_num_threads(), "versions": versions()})
    for line in sys.stdin:
        say(answers, answer(contender, json.loads(line), loaded))


def own_stdout() -> TextIO:
    """The stdout that answers go to; what libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


def load(file: Path) -> Any:
    # By its path: a contender's file is named like the library that it imports.
    spec = importlib.util.spec_from_file_location("contender", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Contender


def touch(model: torch.nn.Module | None) -> None:
    """Bring every page of the weights into memory: a mapped checkpoint would else be read during the first runs."""
    if model is not None:
        for parameter in model.parameters():
            parameter.detach().sum()


def answer(contender: Any, request: dict[str, Any], loaded: int | None) -> dict[str, Any]:
    try:
        cost, found = measured(getattr(contender, request["do"]), request["with"], loaded)
    except Exception:
        return {"error": traceback.format_exc()}
    tensors = {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}
    if tensors:
        save_file({name: value.detach().float().contiguous() for name, value in tensors.items()}, request["save"])
    return {**cost, **{name: value for name, value in found.items() if name not in tensors}}


def measured(action: Any, arguments: dict[str, Any], loaded: int | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a call cost and what it returned.

    ``wall`` and ``cpu`` (user and system, all threads) are in seconds; ``peak`` is how many bytes of resident memory
    the process had at most beyond those that it had when the model was loaded, ``rise`` beyond those that it had before
    the call; None where the system does not say.
    """
    gc.collect()
    give_memory_back()
    resettable = reset_peak()
    before = memory().get("VmRSS")
    cpu, wall = time.process_time(), time.perf_counter()
    found = action(**arguments)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    now = memory()
    most = now.get("VmHWM") if resettable else None
    peak, rise = (None if most is None or start is None else most - start for start in (loaded, before))
    return {"wall": wall, "cpu": cpu, "peak": peak, "rise": rise, "anonymous": now.get("RssAnon")}, found


def memory() -> dict[str, int]:
    """The entries in kB of /proc/self/status, in bytes."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return {}
    words = [line.split() for line in lines]
    return {line[0].rstrip(":"): int(line[1]) * 1024 for line in words if len(line) == 3 and line[2] == "kB"}


def reset_peak() -> bool:
    """Let VmHWM start again at what is resident now; whether the system does that."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def give_memory_back() -> None:
    """Let glibc return what was freed, or the next run would find it and not count it."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def versions() -> dict[str, str]:
    """Of the packages that matter and are here."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in ("torch", "transformers", "numpy", "scikit-learn", "steering-vectors", "repeng"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def say(answers: TextIO, message: dict[str, Any]) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
