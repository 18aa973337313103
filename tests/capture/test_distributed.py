"""Several processes read what one does; what is not really shared out is refused; whoever fails, all end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.building import job_of
from support.tiny_models import default_checkpoint, tiny_checkpoint, write_recipe
from support.tiny_wrappers import released_wrappers, wrapper_checkpoint
from transformers import AutoModelForCausalLM

from patcher.architectures.model_class import quiet_transformers
from patcher.build.planning import plan_build
from patcher.capture.model import load_tokenizer
from patcher.capture.reader import reader_in_memory
from patcher.vectors.finding import find_vectors
from patcher.verify.probes import PROBES

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
CASES: dict[str, dict[str, Any]] = {
    "llama fsdp": {"type": "llama", "mode": "fsdp", "batch_size": 2},
    "gpt2 fsdp": {"type": "gpt2", "mode": "fsdp", "batch_size": 2},
    "mixtral fsdp": {"type": "mixtral", "mode": "fsdp"},
    "qwen2 tp": {"type": "qwen2", "mode": "tp"},
    "gpt2 replicate": {"type": "gpt2", "mode": "replicate"},
    "a wrapper fsdp": {"type": "gemma3", "mode": "fsdp", "batch_size": 2},
    "a wrapper replicate": {"type": "mistral3", "mode": "replicate"},
    "gpt2 tp": {"type": "gpt2", "mode": "tp"},
    "falcon_h1 fsdp": {"type": "falcon_h1", "mode": "fsdp"},
    "gpt2 with its own plan": {"type": "gpt2", "mode": "fsdp", "rule": False, "load": True},
}
WRAPPED = [case for case in CASES if "wrapper" in case]


def launch(*arguments: object, count: int = 2, seconds: float = 300) -> subprocess.CompletedProcess[str]:
    """Torchrun on this machine, as a user would start it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    return subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True, timeout=seconds, env=environment, cwd=ROOT
    )


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Every case, in one launch."""
    folder = tmp_path_factory.mktemp("together")
    for model_type in {case["type"] for case in CASES.values()}:
        if model_type in released_wrappers():
            wrapper_checkpoint(folder / model_type, model_type)
        else:
            default_checkpoint(folder / model_type, model_type, tokenizer=False)
    wanted = [{"folder": str(folder / case["type"]), **case} for case in CASES.values()]
    (folder / "cases.json").write_text(json.dumps(wanted), encoding="utf-8")
    done = launch(ROOT / "tests/support/together.py", folder / "cases.json", folder / "results.json")
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    return dict(zip(CASES, found, strict=True))


@pytest.mark.parametrize("case", ["llama fsdp", "gpt2 fsdp", "mixtral fsdp", "gpt2 replicate", *WRAPPED])
def test_different_batches_in_different_processes_are_read_as_in_one(measured: dict[str, Any], case: str) -> None:
    found = measured[case]
    assert max(found["errors"].values()) == 0 and found["norm"] == 0
    assert found["effect"] > 1e-2
    assert found["held"] == (1 if "replicate" in case else 0.5)
    assert found["done"][-1] == 17 and found["done"] == sorted(found["done"])


def test_processes_that_compute_one_batch_together_agree_with_one(measured: dict[str, Any]) -> None:
    found = measured["qwen2 tp"]
    assert max(found["errors"].values()) <= 1e-6 and found["norm"] <= 1e-6
    assert found["held"] < 0.6


def test_blocks_behind_the_last_one_are_not_kept(measured: dict[str, Any]) -> None:
    assert measured["llama fsdp"]["blocks"] == 3
    assert all(measured[case]["blocks"] == 3 and not measured[case]["towers"] for case in WRAPPED)


def test_a_class_without_a_plan_for_tensor_parallelism_is_refused(measured: dict[str, Any]) -> None:
    refused = measured["gpt2 tp"]["refused"]
    # Older versions of transformers take no notice of what is missing.
    assert "tp_plan" in refused or "each process keeps 100%" in refused


def test_what_is_gathered_as_a_whole_is_refused(measured: dict[str, Any]) -> None:
    """The plan of GPT-2's class names no module that it has: all is gathered at once, and stays."""
    found = measured["gpt2 with its own plan"]
    assert "each process keeps 100%" in found["proof"]
    refused = found["refused"]
    assert "GPT2LMHeadModel is not shared out" in refused and "capture.parallel: replicate" in refused


def test_a_class_that_computes_other_numbers_when_it_is_shared_out_is_refused(measured: dict[str, Any]) -> None:
    """Falcon-H1's multipliers are a buffer that sharded loading leaves as it finds the memory (transformers 5.23)."""
    found = measured["falcon_h1 fsdp"]
    if "refused" in found:
        assert "computes other numbers" in found["refused"]
    else:
        assert max(found["errors"].values()) <= 1e-6


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("build")
    layer = tiny_checkpoint(folder / "base", "openai-community--gpt2")
    keys: dict[str, Any] = {"evaluate": {"enabled": False}, "verify": {"probes": ["The sea is cold in winter."]}}
    return write_recipe(folder / "recipe.yaml", folder / "base", layer, folder / "out", **keys)


@pytest.mark.slow
def test_a_build_over_two_processes_gives_the_vector_of_one(recipe: Path) -> None:
    done = launch("-m", "patcher", recipe, "--json")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("\n") == 1 and json.loads(done.stdout)["manifest"]["verification"][0]["passed"]
    assert done.stderr.count("reading the model's config") == 1
    assert "loading the model in 2 processes (float32, cpu, fsdp" in done.stderr
    written = load_file(recipe.parent / "out" / "steering.safetensors")
    (vector,) = (value for name, value in written.items() if name.startswith("love"))
    assert float(vector.norm()) > 0.1
    assert torch.equal(vector, alone(recipe))


@pytest.mark.slow
def test_held_out_pairs_are_read_by_two_processes_as_by_one(recipe: Path) -> None:
    content = json.loads(recipe.read_text())
    content["vectors"][0] |= {
        "pairs": [{"positive": f"I love {word}", "negative": f"I hate the {word}"} for word in "abcdefghijkl"],
        "refit": True,
    }
    content["evaluate"] = {"limit": 1, "random_vectors": 1, "generate_tokens": 0, "neutral_limit": 2, "pictures": False}
    content["output"] = str(recipe.parent / "refitted")
    path = recipe.parent / "refit.yaml"
    path.write_text(json.dumps(content))
    done = launch("-m", "patcher", path, "--json")
    assert done.returncode == 0, done.stderr[-3000:]
    made_of = json.loads(done.stdout)["manifest"]["edits"][0]["made_of"]
    assert (made_of["count"], made_of["measured"]) == (12, 10) and made_of["cosine"] < 0.99999
    written = load_file(recipe.parent / "refitted" / "steering.safetensors")
    (vector,) = (value for name, value in written.items() if name.startswith("love"))
    assert torch.equal(vector, alone(path))


def alone(path: Path) -> torch.Tensor:
    planned = plan_build(job_of(path, path.parent / "elsewhere"))
    folder = planned.source.folder
    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = load_tokenizer(folder)
    neutral = [tokenizer(text)["input_ids"] for text in PROBES]
    reader = reader_in_memory(model, planned.architecture)
    (vector,) = find_vectors(planned.prepared, reader, neutral=neutral)
    return vector.values


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("killed", "another process of this build has ended"),
        ("refuses", "error: a test (process 1 of 2"),
    ],
)
def test_when_one_process_fails_all_end_and_one_says_why(recipe: Path, fault: str, says: str) -> None:
    output = recipe.parent / f"out-{fault}"
    done = launch(ROOT / "tests/support/failing_process.py", fault, recipe, "--output", output)
    assert done.returncode != 0
    own = done.stderr.split("torch/distributed/elastic")[0]  # what follows is the launcher's
    # Where a process is killed, the launcher may stop the other before it notices by itself.
    assert says in own or (fault == "killed" and "interrupted; nothing unfinished is left" in own), own
    # The launcher may also stop the other while it notices.
    stopped_too = says in own and "error: interrupted" in done.stderr
    assert done.stderr.count("error: ") - stopped_too == 1, done.stderr
    assert not output.exists() and not list(recipe.parent.glob(f".{output.name}*"))
