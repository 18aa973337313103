"""Run checkpoint folders in vLLM with an image; started by vLLM's Python, as ``vllm_images.py request.json``.

``request.json``: ``jobs`` [{name, folder, prompt, size}] and ``results``, a folder. After each job there is
``NAME.json`` {error, class} and ``NAME.safetensors``: ``logprobs`` fp32 [vocabulary] after the prompt, and
``inputs/KEY``, what the stock processor makes of the same prompt and image.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

for _name, _value in {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}.items():
    os.environ.setdefault(_name, _value)

import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

VOCABULARY = 416


def picture(size: int) -> Any:
    """A generated image of ``size`` x ``size`` random pixels."""
    from PIL import Image

    pixels = torch.randint(0, 256, (size, size, 3), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def run(job: dict[str, Any], tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    import vllm
    from transformers import AutoProcessor

    image = picture(job["size"])
    processor = AutoProcessor.from_pretrained(job["folder"])
    made = processor(text=job["prompt"], images=[image], return_tensors="pt")
    tensors |= {f"inputs/{key}": torch.as_tensor(value).contiguous() for key, value in made.items()}
    model = vllm.LLM(
        model=job["folder"],
        dtype="float32",
        enforce_eager=True,
        max_model_len=256,
        max_num_batched_tokens=512,
        max_logprobs=VOCABULARY,
        max_num_seqs=2,
        enable_prefix_caching=False,
        limit_mm_per_prompt={"image": 1},
        skip_mm_profiling=True,
        seed=0,
    )
    asked = vllm.SamplingParams(max_tokens=1, temperature=0.0, logprobs=VOCABULARY, detokenize=False)
    prompt = {"prompt": job["prompt"], "multi_modal_data": {"image": image}}
    (output,) = model.generate([prompt], asked, use_tqdm=False)
    row = torch.full((VOCABULARY,), float("nan"))
    for token, entry in output.outputs[0].logprobs[0].items():
        row[token] = entry.logprob
    tensors["logprobs"] = row
    tensors["ids"] = torch.tensor(output.prompt_token_ids)
    return {"class": str(model.apply_model(lambda module: type(module).__name__)[0])}


def main(request_path: str) -> None:
    request = json.loads(Path(request_path).read_text(encoding="utf-8"))
    results = Path(request["results"])
    from vllm.distributed import cleanup_dist_env_and_memory

    for job in request["jobs"]:
        tensors: dict[str, torch.Tensor] = {}
        report: dict[str, Any] = {"error": None}
        try:
            report |= run(job, tensors)
        except Exception as error:
            # vLLM wraps what stops a model in exceptions of many kinds; the next model may still run.
            report["error"] = f"{type(error).__name__}: {error}"
        save_file(tensors, results / f"{job['name']}.safetensors")
        (results / f"{job['name']}.json").write_text(json.dumps(report), encoding="utf-8")
        with contextlib.suppress(Exception):
            cleanup_dist_env_and_memory()
        gc.collect()


if __name__ == "__main__":
    main(sys.argv[1])
    sys.stdout.flush()
    os._exit(0)
