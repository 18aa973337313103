"""Run by torchrun: several models one after the other, each read by all processes and then by process 0 alone.

    torchrun --nproc-per-node 2 tests/support/together.py CASES RESULTS

CASES is a JSON list of {folder, mode, batch_size, rule, load}; RESULTS becomes one of what :func:`measure` returns.
With ``rule: false`` the class's own FSDP plan is used as it is; ``load: true`` loads a model that was refused.
"""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.distributed.tensor import DTensor
from transformers import AutoConfig

from patcher.architectures.analysis import Architecture
from patcher.architectures.model_class import quiet_transformers
from patcher.capture.processes import model as sharded_model
from patcher.capture.processes.launch import world
from patcher.capture.processes.messages import Processes
from patcher.capture.processes.model import Sharding
from patcher.capture.processes.runner import Distributed, assist, dismiss, try_together
from patcher.capture.reader import ResidualReader, reader_in_memory
from patcher.errors import InputError
from patcher.pairs.pair import TokenisedSide


def prompts() -> list[TokenisedSide]:
    """Contrast pairs that share what they begin with, of different lengths."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for length in (9, 4, 14, 3, 7, 11, 2):
        question = torch.randint(3, 200, (length,), generator=generator).tolist()
        for answer in torch.randint(3, 200, (2, 3), generator=generator).tolist():
            ids = (*question, *answer)
            made.append(TokenisedSide(ids, tuple(range(length, len(ids))), length))
    return made


def sharding_of(case: dict[str, Any], last: int) -> Sharding:
    config = AutoConfig.from_pretrained(case["folder"])
    return Sharding(
        case["folder"], None, None, case["mode"], "float32", "cpu", Architecture(config).blocks, last, False
    )


def held(model: torch.nn.Module, blocks: str) -> float:
    """The fraction of the kept blocks that lies in this process."""
    parameters = [value for name, value in model.named_parameters() if name.startswith(f"{blocks}.")]
    local = [value.to_local() if isinstance(value, DTensor) else value for value in parameters]
    return sum(value.numel() for value in local) / sum(value.numel() for value in parameters)


def measure(case: dict[str, Any], processes: Processes) -> dict[str, Any]:
    last, rows = 2, case.get("batch_size")
    sharding = sharding_of(case, last)
    architecture = Architecture(AutoConfig.from_pretrained(case["folder"]))
    requests = [(prompts(), [0, last]), (prompts()[:3], [-1, 1])]
    proof = try_together(sharding, processes)
    if proof.refusal and not case.get("load"):
        dismiss(processes)
        return {"refused": proof.refusal}
    try:
        runner = Distributed(replace(sharding, whole=proof.whole), processes)
    except InputError as error:
        return {"refused": str(error), "proof": proof.refusal}
    ran: list[int] = []
    read = ResidualReader(runner, architecture, 1024, rows).read(requests, lambda done, _total: ran.append(done))
    with quiet_transformers():
        whole = (
            getattr(transformers, architecture.auto_class).from_pretrained(case["folder"], dtype=torch.float32).eval()
        )
    alone = reader_in_memory(whole, architecture, batch_size=rows).read(requests)
    errors, norms = {}, []
    for wanted, found in zip(alone, read, strict=True):
        for layer, one in wanted.items():
            errors[layer] = float((found[layer].read - one.read).norm() / one.read.norm())
            norms.append(abs(found[layer].mean_norm / one.mean_norm - 1))
    assert runner.model is not None
    kept = sum(any(True for _ in block.parameters()) for block in runner.model.get_submodule(sharding.blocks))
    result = {
        "errors": errors,
        "norm": max(norms),
        "towers": sum(name.startswith(architecture.towers) for name, _ in runner.model.named_parameters()),
        "done": ran,
        "held": held(runner.model, sharding.blocks),
        "blocks": kept,
        "effect": float((alone[0][last].read[0] - alone[0][last].read[1]).norm() / alone[0][last].read[0].norm()),
    }
    runner.end()
    return result


def main(cases: Path, results: Path) -> None:
    processes = Processes(world())
    wanted = json.loads(cases.read_text(encoding="utf-8"))
    found = []
    for case in wanted:
        with pytest.MonkeyPatch.context() as patch:
            if not case.get("rule", True):
                patch.setattr(sharded_model, "_plan", lambda stock, blocks: dict(stock._fsdp_plan or {}))
            if processes.world.rank == 0:
                found.append(measure(case, processes))
                print(case["folder"], case["mode"], found[-1], file=sys.stderr, flush=True)
            else:
                with contextlib.suppress(InputError):  # refused in all processes alike
                    assist(processes)
    if processes.world.rank == 0:
        results.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
