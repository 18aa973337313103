"""Base, copy, and base with a hook in stock transformers: ``generate``, greedy, with its cache.

python in_transformers.py request.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))
from turns import take_turns, tried, write


def main(path: str) -> None:
    request = json.loads(Path(path).read_text(encoding="utf-8"))
    transformers.utils.logging.set_verbosity_error()
    about = {"version": transformers.__version__, "detail": f"torch {torch.__version__}"}
    results: dict[str, Any] = {}
    for pair in request["pairs"]:
        results[pair["route"]] = tried(lambda pair=pair: measure(pair, request))
        write(request, about, results)


def measure(pair: dict[str, Any], request: dict[str, Any]) -> dict[str, list[float]]:
    models = {name: load(pair["base"]) for name in ("base", "base again", "hooked")}
    models["copy"] = load(pair["copy"])
    added = load_file(pair["vector"])["added"]
    block = models["hooked"].get_submodule(pair["blocks"])[pair["layer"]]
    block.register_forward_hook(
        lambda _module, _inputs, output: output + added if torch.is_tensor(output) else (output[0] + added, *output[1:])
    )
    ids = torch.tensor([request["prompt"]])

    def generate(model: Any) -> int:
        count = request["tokens"]
        with torch.inference_mode():
            found = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count, do_sample=False,
                pad_token_id=0,
            )  # fmt: skip
        return int(found.shape[1] - ids.shape[1])

    return take_turns({name: lambda model=model: generate(model) for name, model in models.items()}, request)


def load(folder: str) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


if __name__ == "__main__":
    main(sys.argv[1])
