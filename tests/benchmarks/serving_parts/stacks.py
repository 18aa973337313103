"""The stacks that run the models, each in a process and an environment of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from serving_parts.models import Pair
from support.llama_cpp_converter import with_tiny_tokenizers

from patcher.errors import PatchModelError
from patcher.stacks.environments import Environment, find
from patcher.stacks.names import LLAMA_CPP, TRANSFORMERS
from patcher.verify import llama_cpp_stack
from patcher.verify.stack_jobs import clean_variables

WORKERS = Path(__file__).parents[1] / "serving_workers"


def run(
    stack: str, pairs: Sequence[Pair], scratch: Path, *, prompt: list[int], tokens: int, repeats: int
) -> dict[str, Any]:
    """``{"about": {version, detail}, "routes": {route: {"rates": {variant: [tokens/s]}} or {"error": why}}}``.

    Where the stack is not there, ``{"missing": why}``.
    """
    try:
        environment = find(stack)
    except PatchModelError as error:
        return {"missing": str(error)}
    if not isinstance(environment, Environment):
        return {"missing": environment.why}
    request = {
        "pairs": [pair.request() for pair in pairs],
        "prompt": prompt,
        "tokens": tokens,
        "repeats": repeats,
        "results": str(scratch / f"{stack}.json"),
    }
    if stack == LLAMA_CPP:
        process = llama_cpp_stack.llama_cpp_process(with_tiny_tokenizers(environment, scratch))
        # As many threads as the others take by themselves.
        request |= process.extra | {"program": str(llama_cpp_stack.RUNNER), "threads": torch.get_num_threads()}
    asked = scratch / f"{stack}-request.json"
    asked.write_text(json.dumps(request), encoding="utf-8")
    worker = WORKERS / f"in_{stack.replace('.', '_')}.py"
    done = subprocess.run(
        [str(environment.python), "-I", str(worker), str(asked)],
        capture_output=True,
        text=True,
        errors="replace",
        env=clean_variables(environment) | ({"CUDA_VISIBLE_DEVICES": ""} if stack == TRANSFORMERS else {}),
        check=False,
    )
    if not Path(request["results"]).is_file():
        print(done.stderr[-3000:], file=sys.stderr)
        return {"missing": f"its process ended with {done.returncode}"}
    found: dict[str, Any] = json.loads(Path(request["results"]).read_text(encoding="utf-8"))
    for pair in pairs:
        died = {"error": f"the process ended with {done.returncode}"}
        found["routes"].setdefault(pair.route, died)
    return found
