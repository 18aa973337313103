"""Copies of multimodal wrappers in real vLLM and llama.cpp against the hook in transformers, with texts and images."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from family_runs import build, key_of, run_stacks
from safetensors.torch import load_file
from support.families import Copied, Family, families
from support.stack_runs import environment
from support.stock_loading import stock_model
from support.tiny_patch import hooks
from support.tiny_wrappers import released_wrappers

from patcher.stacks.names import LLAMA_CPP, STACKS, VLLM
from patcher.verify.stack_jobs import clean_variables

KEYS = ("gemma-3", "mistral-small-3.x", "qwen2.5-vl", "qwen3-vl-dense", "internvl-3-without-rope-scaling")
SIZES = {"mistral-small-3.x": 32, "qwen2.5-vl": 16, "qwen3-vl-dense": 16, "internvl-3-without-rope-scaling": 28}
"""Pixels of the side of an image that the processor takes as it is."""
RUNNER = Path(__file__).parents[1] / "support" / "vllm_images.py"

pytestmark = [pytest.mark.slow, pytest.mark.stacks]


@dataclass
class Ran:
    """Records and copies by the family's key, and where vLLM's runs with an image are."""

    records: dict[str, dict]
    copies: dict[str, list[Copied]]
    place: Path


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    for stack in (VLLM, LLAMA_CPP):
        environment(stack)
    place = tmp_path_factory.mktemp("wrappers")
    chosen = {family.key: family for family in families() if family.key in KEYS}
    built = [build(family, place / key) for key, family in chosen.items()]
    run_stacks(built, place)
    records = {key_of(record): record for record, _copies in built}
    return Ran(records, {key_of(record): copies for record, copies in built}, place)


@pytest.mark.parametrize("key", KEYS)
def test_the_copy_equals_the_hook_in_every_stack_that_is_claimed(ran: Ran, key: str) -> None:
    runs = ran.records[key]["runs"]
    assert runs
    for run in runs:
        for stack in STACKS:
            claimed, seen = run["claimed"][stack], run["seen"][stack]
            assert (claimed != "no") == (seen["outcome"] == "exact"), (run["asked"], stack, seen)
    read = {stack for run in runs for stack in STACKS if run["claimed"][stack] != "no"}
    assert read == set(STACKS)


@pytest.fixture(scope="module")
def with_image(ran: Ran) -> Path:
    """vLLM's runs of bases and copies with a generated image between two texts."""
    found = environment(VLLM)
    jobs = []
    for key in SIZES:
        copies = ran.copies[key]
        family = next(family for family in families() if family.key == key)
        files = released_wrappers()[family.wrapper]["files"]
        copied = next(copied for copied in copies if copied.plan.stacks[VLLM] == "native")
        for label, folder in (("base", copied.base), ("copy", copied.folder)):
            for name, content in files.items():
                (folder / name).write_text(json.dumps(content), encoding="utf-8")
            jobs.append({"name": f"{key}-{label}", "folder": str(folder), "prompt": prompt(family), "size": SIZES[key]})
    results = ran.place / "images"
    results.mkdir()
    request = ran.place / "images.json"
    request.write_text(json.dumps({"jobs": jobs, "results": str(results)}), encoding="utf-8")
    subprocess.run([str(found.python), "-I", str(RUNNER), str(request)], env=clean_variables(found), check=False)
    return results


def prompt(family: Family) -> str:
    return f"I love the sea {released_wrappers()[family.wrapper]['image']} and I hate the cold rain"


@pytest.mark.parametrize("key", SIZES)
def test_with_an_image_the_copy_in_vllm_equals_the_hook(ran: Ran, with_image: Path, key: str) -> None:
    copied = next(copied for copied in ran.copies[key] if copied.plan.stacks[VLLM] == "native")
    report, tensors = read(with_image, f"{key}-copy")
    assert report["error"] is None, report["error"]
    model, _info = stock_model(copied.base)
    inputs = {name.removeprefix("inputs/"): value for name, value in tensors.items() if name.startswith("inputs/")}
    assert tensors["ids"].tolist() == inputs["input_ids"][0].tolist()
    plain = after(model, inputs)
    without = {name: value for name, value in inputs.items() if name in ("input_ids", "attention_mask")}
    with hooks(model, copied.plan.blocks, copied.vectors):
        hooked = after(model, inputs)
        blind = after(model, without)
    own = read(with_image, f"{key}-base")[1]["logprobs"]
    difference = float((tensors["logprobs"] - hooked).abs().max())
    effect = float((hooked - plain).abs().max())
    print(f"{key}: {difference:.1e} of {effect:.2g}, own error {float((own - plain).abs().max()):.1e}")
    assert difference <= 1e-4
    assert effect > 100 * difference
    assert float((blind - hooked).abs().max()) > 100 * difference, "the image does not count"


def read(results: Path, name: str) -> tuple[dict, dict[str, torch.Tensor]]:
    return json.loads((results / f"{name}.json").read_text()), load_file(results / f"{name}.safetensors")


def after(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Log-probabilities after the prompt, [vocabulary]."""
    with torch.no_grad():
        return torch.log_softmax(model(**inputs, use_cache=False).logits[0, -1].float(), dim=-1)
