"""Run checkpoint folders in stock transformers, in a process of its own that cannot import this package.

It is started as ``python -I stock_run.py job.json``: nothing but torch, safetensors and transformers is used, so
what it computes is what a stranger's machine computes. The same program runs the base, under plain forward hooks,
and the finished folder, under none: one of them, or one after the other where memory takes both. The jobs and the
results are files; see :mod:`patcher.verify.transformers_stack`. Started with ``--wait`` it does its imports and waits
for the path of its job. Its parts lie beside it and are loaded by path.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys

sys.modules["patcher"] = None  # type: ignore[assignment]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from typing import Any  # noqa: E402

PARTS = ("stock_passes", "stock_forward", "stock_model", "stock_images", "stock_image_runs", "stock_roles")
"""Each imports only earlier ones."""
FROM_DISK = ("disk_loading", "shared_weights", "side_by_side", "spread_roles")
"""What runs a model larger than memory, after those."""


def part(name: str) -> Any:
    """A module beside this file, under its own name."""
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), f"{name}.py")  # noqa: PTH100, PTH118, PTH120
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def wait() -> str:
    """Import what a job will need, and load the base that is named, until the path of the job comes."""
    told = globals()["told"]
    parts = dict(zip(PARTS, map(part, PARTS), strict=True))
    model = parts["stock_model"]
    model.import_classes()
    while "job" not in (line := json.loads(told())):
        model.prepare(line["prepare"], load=line["load"])
    return str(line["job"])


def main(job_path: str) -> None:
    if job_path == "--wait":
        job_path = wait()
        *_, roles = (sys.modules[name] for name in PARTS)
    else:
        *_, roles = map(part, PARTS)
    with open(job_path, encoding="utf-8") as file:  # noqa: PTH123 - as few imports as can be
        job = json.load(file)
    if job.get("offload") is not None:
        *_, roles = map(part, FROM_DISK)
    roles.run(job.get("runs", [job]))


if __name__ == "__main__":
    main(sys.argv[1])
    sys.stdout.flush()
    sys.stderr.flush()
    # Every result is on the disk, and Python takes a second to take torch and the models apart.
    os._exit(0)
