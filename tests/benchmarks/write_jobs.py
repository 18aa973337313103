"""One way to make a steered copy, in a process of its own: how long, how many bytes, how much memory.

    python tests/benchmarks/write_jobs.py NAME BASE TARGET

prints one JSON object. Time runs from when everything is imported.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from write_checkpoint import LAYER, flag_plan

_start = 0.0
_facts: dict[str, float] = {}


def started() -> None:
    """The imports are done; from here on it is the job."""
    global _start
    _start = time.perf_counter()


def ours(base: Path, target: Path, *, link: bool = False, sync: bool = True, hashes: bool = False) -> None:
    """The write step of a build: routes/apply, write_copy, and the atomic folder."""
    import contextlib

    import torch

    from patcher.checkpoint.folder import CheckpointFolder
    from patcher.checkpoint.hashes import hashing
    from patcher.checkpoint.staging import staged_folder
    from patcher.checkpoint.writer import write_copy
    from patcher.routes.apply import tensors_to_write

    if not sync:
        os.fsync = lambda _descriptor: None  # type: ignore[assignment]
    started()
    checkpoint = CheckpointFolder(base)
    plan = flag_plan(checkpoint.config)
    created, replaced = tensors_to_write(plan, {LAYER: torch.randn(checkpoint.config["hidden_size"])}, checkpoint)
    beside: Any = hashing(checkpoint) if hashes else contextlib.nullcontext()
    with staged_folder(target) as stage, beside as running:
        write_copy(checkpoint, stage, created=created, replaced=replaced, config_changes=plan.config_changes, link=link)
        _facts["copied"] = time.perf_counter() - _start
        if running is not None:
            running.records()
            _facts["hashed"] = time.perf_counter() - _start


def cp(base: Path, target: Path, *, sync: bool = True) -> None:
    started()
    subprocess.run(["cp", "-r", str(base), str(target)], check=True)
    if sync:
        sync_all(target)


def stock(base: Path, target: Path, *, sync: bool = True) -> None:
    """What one would write by hand."""
    import torch
    from transformers import AutoModelForCausalLM

    started()
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, mlp_bias=True)
    with torch.no_grad():
        model.model.layers[LAYER].mlp.down_proj.bias.add_(torch.randn(model.config.hidden_size))
    largest = max(file.stat().st_size for file in base.glob("*.safetensors"))
    model.save_pretrained(target, max_shard_size=largest)
    if sync:
        sync_all(target)


def imports(_base: Path, target: Path) -> None:
    """What every one of these that runs in Python has in memory before it does anything."""
    import torch  # noqa: F401

    started()
    target.mkdir()


def sync_all(folder: Path) -> None:
    for item in (*folder.iterdir(), folder):
        descriptor = os.open(item, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def unsynced(job: Callable[..., None]) -> Callable[[Path, Path], None]:
    return lambda base, target: job(base, target, sync=False)


CP, OURS, LINK, STOCK, IMPORTS = "cp -r", "patch-model", "patch-model --link", "load, modify, save_pretrained", "import"
HASHING = "patch-model, hashing the base beside it"
UNSYNCED = ", not synced"
JOBS: dict[str, Callable[[Path, Path], None]] = {
    CP: cp,
    OURS: ours,
    HASHING: lambda base, target: ours(base, target, hashes=True),
    LINK: lambda base, target: ours(base, target, link=True),
    STOCK: stock,
    CP + UNSYNCED: unsynced(cp),
    OURS + UNSYNCED: unsynced(ours),
    STOCK + UNSYNCED: unsynced(stock),
    IMPORTS: imports,
}


def peak_bytes() -> int:
    """The most that was resident in this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def new_bytes(folder: Path) -> int:
    """Bytes on the disk that the folder's files take and share with no other."""
    found = [item.stat() for item in folder.rglob("*") if item.is_file()]
    return sum(stat.st_blocks * 512 for stat in found if stat.st_nlink == 1)


def main() -> None:
    name, base, target = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    JOBS[name](base, target)
    taken = time.perf_counter() - _start
    print(json.dumps({"seconds": taken, "peak": peak_bytes(), "written": new_bytes(target), **_facts}))


if __name__ == "__main__":
    main()
