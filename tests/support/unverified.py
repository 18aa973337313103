"""A patched folder as a build leaves it before its verification, and a program that verifies one under a limit.

``unverified.py BASE FOLDER BYTES MODE``: with that many bytes of address space (``ulimit -v``) more than the process
has when it starts; MODE is ``spread``, or ``whole`` to keep all of the model in memory.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

PROBES = ("I love the sea and I hate", "She walked to the station")


def patch(base: Path, folder: Path, layer: int, *, share: float = 0.5) -> dict[str, Any]:
    """Copy ``base`` with a random vector after block ``layer``; what of the manifest the verification needs."""
    from support.writing import write_steered

    from patcher.architectures.analysis import Architecture
    from patcher.checkpoint.bin_files import convert_bin
    from patcher.checkpoint.folder import CheckpointFolder
    from patcher.checkpoint.prepare import read_config
    from patcher.routes.planner import choose_route

    checkpoint = CheckpointFolder(base)
    if checkpoint.is_bin:
        checkpoint = convert_bin(checkpoint, folder.with_name(f"{folder.name}-converted"))
    architecture = Architecture(read_config(base))
    plan = choose_route(architecture, [layer], checkpoint)
    vector = share * torch.randn(architecture.hidden, generator=torch.Generator().manual_seed(3))
    write_steered(plan, {layer: vector}, checkpoint, folder)
    manifest = {"route": plan.as_json(), "edits": [{"name": "v", "layer": layer, "tensor": f"v.layer.{layer}"}]}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return manifest


def main(base: str, folder: str, more: str, mode: str) -> None:
    import resource

    from transformers import AutoModelForCausalLM  # noqa: F401 - the runs need it as well

    from patcher.capture.memory import status_bytes
    from patcher.errors import OutsideError
    from patcher.patched.schema import Patch
    from patcher.recipe.schema import VerifySpec
    from patcher.verify import transformers_stack
    from patcher.verify.terms import VerifyTerms

    spread = []
    honest = transformers_stack._run

    def watched(job: Any, place: Path) -> Any:
        spread.append(job["offload"])
        return honest(job, place)

    transformers_stack._run = watched
    if mode == "whole":
        transformers_stack.plan_offload = lambda *_, **__: None
    made = Patch.model_validate_json((Path(folder) / "manifest.json").read_text())
    size = status_bytes(Path("/proc/self/status").read_text())["VmSize"]
    resource.setrlimit(resource.RLIMIT_AS, (size + int(more), resource.getrlimit(resource.RLIMIT_AS)[1]))
    terms = VerifyTerms(VerifySpec(probes=list(PROBES)))
    try:
        entry = transformers_stack.verify_in_transformers(Path(folder), Path(base), made, terms)
        result = {"entry": entry}
    except OutsideError as error:
        result = {"error": error.code, "text": str(error)}
    print(json.dumps({**result, "spread": spread}))


if __name__ == "__main__":
    main(*sys.argv[1:])
