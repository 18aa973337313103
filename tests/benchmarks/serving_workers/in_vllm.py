"""Base and copy in stock vLLM, both in this one process: ``python -I in_vllm.py request.json``."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from turns import take_turns, tried, write

for _name, _value in {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}.items():
    os.environ.setdefault(_name, _value)


def main(path: str) -> None:
    request = json.loads(Path(path).read_text(encoding="utf-8"))
    import torch
    import vllm

    about = {"version": vllm.__version__, "detail": f"torch {torch.__version__}"}
    results: dict[str, Any] = {}
    for pair in request["pairs"]:
        results[pair["route"]] = tried(lambda pair=pair: measure(vllm, pair, request))
        write(request, about, results)
        release()


def measure(vllm: Any, pair: dict[str, Any], request: dict[str, Any]) -> dict[str, list[float]]:
    folders = {"base": pair["base"], "base again": pair["base"], "copy": pair["copy"]}
    models = {name: load(vllm, folder, request) for name, folder in folders.items()}
    count = request["tokens"]
    sampling = vllm.SamplingParams(
        max_tokens=count, min_tokens=count, temperature=0.0, detokenize=False, ignore_eos=True
    )  # fmt: skip

    def generate(model: Any) -> int:
        (output,) = model.generate([{"prompt_token_ids": request["prompt"]}], sampling, use_tqdm=False)
        return len(output.outputs[0].token_ids)

    return take_turns({name: lambda model=model: generate(model) for name, model in models.items()}, request)


def load(vllm: Any, folder: str, request: dict[str, Any]) -> Any:
    return vllm.LLM(
        model=folder,
        skip_tokenizer_init=True,
        dtype="float32",
        enforce_eager=True,
        max_model_len=len(request["prompt"]) + request["tokens"] + 1,
        max_num_seqs=1,
        enable_prefix_caching=False,
        seed=0,
    )


def release() -> None:
    """Free the models before the next ones are loaded."""
    from vllm.distributed import cleanup_dist_env_and_memory

    with contextlib.suppress(Exception):
        cleanup_dist_env_and_memory()
    gc.collect()


if __name__ == "__main__":
    main(sys.argv[1])
    sys.stdout.flush()
    # Its threads may outlive the work; every result is on the disk.
    os._exit(0)
