"""Base and copy, converted by llama.cpp's own converter and run by its server, one after the other in each turn.

    python -I in_llama_cpp.py request.json

Converting and starting is that of the verification's program, whose path is in the request.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from turns import take_turns, tried, write


def main(path: str) -> None:
    request = json.loads(Path(path).read_text(encoding="utf-8"))
    spec = importlib.util.spec_from_file_location("llama_cpp_run", request["program"])
    assert spec is not None and spec.loader is not None
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    about = program.version(request)
    results: dict[str, Any] = {}
    for pair in request["pairs"]:
        results[pair["route"]] = tried(lambda pair=pair: measure(program, pair, request))
        write(request, about, results)


def measure(program: Any, pair: dict[str, Any], request: dict[str, Any]) -> dict[str, list[float]]:
    scratch = Path(request["results"]).parent
    files = {}
    for name in ("base", "copy"):
        files[name] = scratch / f"{pair['route']}-{name}.gguf"
        program.convert(request, {"folder": pair[name]}, files[name])
    files["base again"] = files["base"]
    length = {"ids": [], "greedy_ids": request["prompt"], "greedy_tokens": request["tokens"]}
    length["ids"] = [request["prompt"]]
    body = {
        "prompt": request["prompt"], "n_predict": request["tokens"], "temperature": 0, "ignore_eos": True,
        "return_tokens": True, "cache_prompt": False,
    }  # fmt: skip
    with ExitStack() as stack:
        servers = {name: stack.enter_context(program.engine(request, length, file)) for name, file in files.items()}
        if not all(hasattr(server, "post") for server in servers.values()):
            raise RuntimeError("llama-cpp-python has no server; xllamacpp and llama-server have one")

        def generate(server: Any) -> int:
            return len(server.post("/completion", body)["tokens"])

        found = take_turns(
            {name: lambda server=servers[name]: generate(server) for name in ("base", "base again", "copy")}, request
        )
    for file in set(files.values()):
        file.unlink()
    return found


if __name__ == "__main__":
    main(sys.argv[1])
    sys.stdout.flush()
    os._exit(0)
