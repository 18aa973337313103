"""Resumed passes give the logits of whole ones, compute less, and are given up where a class hands on more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.old_transformers import skip_if_too_old
from support.tiny_models import VOCABULARY, default_checkpoint, tiny_checkpoint
from transformers import AutoModelForCausalLM

from patcher.architectures.analysis import Architecture
from patcher.architectures.model_class import quiet_transformers
from patcher.capture.batches import padded
from patcher.capture.logits import LoadedModel, LogitsJob
from patcher.capture.resuming import ResumingModel

RELEASED = [
    "openai-community--gpt2",
    "bigscience--bloom-560m",
    "microsoft--phi-2",
    "meta-llama--Llama-3.1-8B-Instruct",
    "openai--gpt-oss-20b",
    "tiiuae--Falcon-H1-0.5B-Instruct",
]
DEFAULTS = ["qwen3", "gemma3_text", "mamba", "mpt", "mixtral", "rwkv"]


def opened(folder: Path) -> tuple[Any, str, int]:
    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    architecture = Architecture(model.config)
    return model, architecture.blocks, architecture.block_count


def jobs_for(model: Any, layers: list[int], variants: int = 3) -> list[LogitsJob]:
    generator = torch.Generator().manual_seed(0)
    hidden = model.get_input_embeddings().weight.shape[1]
    jobs = []
    batches = [
        padded([torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in lengths], "right", 0)[0]
        for lengths in ([5, 7, 7], [9, 4])
    ]
    for layer in layers:
        for inputs in batches:
            columns = torch.tensor([2, 4])
            if layer == layers[0]:
                jobs.append(LogitsJob(inputs, {}, columns))
            for _ in range(variants):
                vectors = {layer: 3 * torch.randn(hidden, generator=generator)}
                if layer != layers[-1]:
                    vectors[layers[-1]] = torch.randn(hidden, generator=generator)
                jobs.append(LogitsJob(inputs, vectors, columns))
    return jobs


def collected(source: Any, jobs: list[LogitsJob]) -> list[torch.Tensor]:
    found: dict[int, torch.Tensor] = {}
    source.logits(jobs, lambda number, logits: found.__setitem__(number, logits.clone()))
    assert sorted(found) == list(range(len(jobs)))
    return [found[number] for number in range(len(jobs))]


@pytest.mark.slow_but(
    "1-openai-community--gpt2",
    "1-meta-llama--*",
    "1-mixtral",
    "1-mamba",
    "10000-gemma3_text",
    "10000-openai-community--gpt2",
)
@pytest.mark.parametrize("name", RELEASED + DEFAULTS)
@pytest.mark.parametrize("tokens", [1, 10_000])
def test_resumed_equals_whole(name: str, tokens: int, tmp_path: Path) -> None:
    skip_if_too_old(name)
    make = default_checkpoint if name in DEFAULTS else tiny_checkpoint
    make(tmp_path / "model", name)
    model, blocks, count = opened(tmp_path / "model")
    jobs = jobs_for(model, sorted({0, count // 2, count - 1}))
    expected = collected(LoadedModel(model, blocks), jobs)
    source = ResumingModel(model, blocks, tokens=tokens, memory=2**30)
    found = collected(source, jobs)
    for mine, whole in zip(found, expected, strict=True):
        assert (mine - whole).abs().max() <= 2e-5 * max(1.0, float(whole.abs().max()))
    assert (expected[1] - expected[0]).abs().max() > 1e-2
    # Nothing is left behind.
    assert torch.equal(collected(LoadedModel(model, blocks), jobs)[0], expected[0])


def test_it_computes_less_and_is_used(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "model", "meta-llama--Llama-3.1-8B-Instruct")
    model, blocks, count = opened(tmp_path / "model")
    calls = [0] * count
    for layer in range(count):
        module = model.get_submodule(f"{blocks}.{layer}.self_attn")

        def add(_module: Any, _inputs: Any, _output: Any, layer: int = layer) -> None:
            calls[layer] += 1

        module.register_forward_hook(add)
    source = ResumingModel(model, blocks, tokens=10_000, memory=2**30)
    last = count - 1
    jobs = [job for job in jobs_for(model, [last], variants=8) if job.vectors]
    collected(source, jobs)
    assert not source.whole
    # Two batches, and to prove it one row whole, the same up to the steered block, and another row whole.
    assert calls[0] == 5
    collected(source, jobs)
    assert calls[0] == 5, "the residuals are kept"


def test_residuals_beyond_the_memory_are_computed_again(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "model", "openai-community--gpt2")
    model, blocks, count = opened(tmp_path / "model")
    jobs = jobs_for(model, [count - 1])
    source = ResumingModel(model, blocks, tokens=10_000, memory=0)
    for mine, whole in zip(collected(source, jobs), collected(LoadedModel(model, blocks), jobs), strict=True):
        assert torch.allclose(mine, whole, atol=1e-5)


def test_a_class_that_hands_on_more_is_computed_whole(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "model", "meta-llama--Llama-3.1-8B-Instruct")
    model, blocks, count = opened(tmp_path / "model")
    # The last block also looks at what the first one did, past the residual stream.
    seen: list[torch.Tensor] = []
    first = model.get_submodule(f"{blocks}.0.mlp")
    first.register_forward_hook(lambda _m, _i, output: seen.append(output))
    model.get_submodule(f"{blocks}.{count - 1}.mlp").register_forward_hook(
        lambda _m, _i, output: output + 5 * seen[-1].mean()
    )
    jobs = jobs_for(model, [count - 2])
    expected = collected(LoadedModel(model, blocks), jobs)
    notes: list[str] = []
    source = ResumingModel(model, blocks, tokens=10_000, memory=2**30, note=notes.append)
    for mine, whole in zip(collected(source, jobs), expected, strict=True):
        assert torch.allclose(mine, whole, atol=1e-5)
    assert source.whole == {count - 2}
    assert notes and "computed whole" in notes[0]
