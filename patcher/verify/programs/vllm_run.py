"""Run checkpoint folders in stock vLLM, one after the other, in a process of its own.

It is started as ``python -I vllm_run.py request.json`` by the Python that has vLLM, and imports nothing of this
package; see :mod:`patcher.verify.stack_jobs` for the request and the results.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.modules["patcher"] = None  # type: ignore[assignment]
for _name, _value in {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # One process, so that one exit ends everything.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}.items():
    os.environ.setdefault(_name, _value)

import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402


def main(request_path: str) -> None:
    request = json.loads(Path(request_path).read_text(encoding="utf-8"))
    import vllm

    results = Path(request["results"])
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU"
    facts = {"version": vllm.__version__, "detail": f"torch {torch.__version__}, {device}"}
    (results / "process.json").write_text(json.dumps(facts), encoding="utf-8")
    for job in request["jobs"]:
        (results / "running").write_text(job["name"], encoding="utf-8")
        started = time.monotonic()
        tensors: dict[str, torch.Tensor] = {}
        report: dict[str, Any] = {"error": None}
        try:
            report.update(run(vllm, job, tensors))
        except Exception as error:
            # vLLM wraps what stops a model in exceptions of many kinds; the next model may still run.
            report["error"] = f"{type(error).__name__}: {error}"
        report["seconds"] = time.monotonic() - started
        save_file(tensors, results / f"{job['name']}.safetensors")
        (results / f"{job['name']}.json").write_text(json.dumps(report), encoding="utf-8")
        (results / "running").unlink()
        release()


def run(vllm: Any, job: dict[str, Any], tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Load one folder in fp32; log-probabilities of every position, and a greedy continuation."""
    longest = max(len(ids) for ids in [*job["ids"], job["greedy_ids"]]) + job["greedy_tokens"] + 1
    model = vllm.LLM(
        model=job["folder"],
        skip_tokenizer_init=True,
        dtype="float32",
        enforce_eager=True,
        max_model_len=min(longest, job["positions"]) if job["positions"] else longest,
        max_logprobs=job["top"],
        max_num_seqs=8,
        enable_prefix_caching=False,
        trust_remote_code=job["trust_remote_code"],
        seed=0,
        **({"language_model_only": True} if wraps(Path(job["folder"])) else {}),
    )
    top = {"logprobs": job["top"], "prompt_logprobs": job["top"]}
    probe = vllm.SamplingParams(max_tokens=1, temperature=0.0, detokenize=False, **top)
    prompts = [{"prompt_token_ids": ids} for ids in job["ids"]]
    for number, output in enumerate(model.generate(prompts, probe, use_tqdm=False)):
        # An entry is the distribution that its token was drawn from, so the first token has none.
        keep(tensors, f"{number}", [*output.prompt_logprobs[1:], output.outputs[0].logprobs[0]], job["top"])
    greedy = vllm.SamplingParams(max_tokens=job["greedy_tokens"], temperature=0.0, detokenize=False)
    (output,) = model.generate([{"prompt_token_ids": job["greedy_ids"]}], greedy, use_tqdm=False)
    return {"class": loaded_class(model), "greedy": list(output.outputs[0].token_ids)}


def wraps(folder: Path) -> bool:
    """Whether it is a multimodal wrapper: the prompts are texts, and its class asks for a processor otherwise."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return "text_config" in config or "vision_config" in config


def keep(tensors: dict[str, torch.Tensor], name: str, entries: Any, top: int) -> None:
    """``tokens/NAME`` int32 and ``logprobs/NAME`` fp32, both [positions, top], likeliest first; -1 fills up a row."""
    rows = [sorted(((value.logprob, token) for token, value in entry.items()), reverse=True) for entry in entries]
    rows = [row[:top] for row in rows]
    width = max(len(row) for row in rows)
    tokens = [[token for _, token in row] + [-1] * (width - len(row)) for row in rows]
    values = [[value for value, _ in row] + [0.0] * (width - len(row)) for row in rows]
    tensors[f"tokens/{name}"] = torch.tensor(tokens, dtype=torch.int32)
    tensors[f"logprobs/{name}"] = torch.tensor(values, dtype=torch.float32)


def loaded_class(model: Any) -> str:
    """The class of vLLM that read the folder; its Transformers backend has one of its own."""
    with contextlib.suppress(Exception):
        return str(model.apply_model(lambda module: type(module).__name__)[0])
    return "unknown"


def release() -> None:
    """Free the model before the next one is loaded."""
    from vllm.distributed import cleanup_dist_env_and_memory

    with contextlib.suppress(Exception):
        cleanup_dist_env_and_memory()
    gc.collect()


if __name__ == "__main__":
    main(sys.argv[1])
    sys.stdout.flush()
    # Its threads may outlive the work; every result is on the disk.
    os._exit(0)
