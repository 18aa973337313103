"""Texts that share a row are measured as texts alone, or have a row each."""

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
from patcher.capture.layout import Layout, Text
from patcher.capture.logits import LoadedModel, LogitsJob
from patcher.capture.resuming import ResumingModel
from patcher.capture.shared_prefixes import exactness
from patcher.evaluate.scoring import Rows, run_texts, tokens_run

NAMES = ["meta-llama--Llama-3.2-1B", "openai-community--gpt2", "google--gemma-3-1b-it", "bloom", "mamba"]
PACKED = {"meta-llama--Llama-3.2-1B", "openai-community--gpt2", "google--gemma-3-1b-it"}


def model_of(folder: Path, name: str) -> tuple[Any, Architecture]:
    skip_if_too_old(name)
    (tiny_checkpoint if "--" in name else default_checkpoint)(folder, name)
    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, Architecture(model.config)


def texts() -> list[Text]:
    """Some begin alike, one is empty, one is read nowhere, lengths differ."""
    draw = torch.Generator().manual_seed(0)
    shared = torch.randint(3, VOCABULARY, (9,), generator=draw).tolist()
    own = [torch.randint(3, VOCABULARY, (length,), generator=draw).tolist() for length in (4, 17, 6, 11)]
    found = [Text((*shared, *ids), (len(shared) + len(ids) - 1,)) for ids in own]
    found += [Text(own[1], range(len(own[1]))), Text(own[2], (0, 3)), Text((), ()), Text(own[3], ())]
    return found


def measured(source: Any, variants: list[dict[int, torch.Tensor]]) -> dict[tuple[int, int], torch.Tensor]:
    found: dict[tuple[int, int], torch.Tensor] = {}

    def use(variant: int, rows: Rows) -> None:
        for index, logits in rows:
            found[variant, index] = logits.clone()

    run_texts(source, texts(), variants, 3, use)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_texts_that_share_rows_are_measured_as_texts_alone(name: str, tmp_path: Path) -> None:
    model, architecture = model_of(tmp_path / "model", name)
    hidden = model.get_input_embeddings().weight.shape[1]
    draw = 3 * torch.randn(3, hidden, generator=torch.Generator().manual_seed(1))
    variants: list[dict[int, torch.Tensor]] = [{}, {0: draw[0]}, {0: draw[1], 1: draw[2]}, {1: draw[0]}, {}]
    alone = LoadedModel(model, architecture.blocks)
    layout = Layout(1024, lambda: exactness(architecture, architecture.block_count - 1))
    together = ResumingModel(model, architecture.blocks, tokens=1024, memory=2**30, layout=layout)
    together.prove(texts()[0].ids, variants[1])
    assert layout.packs == (name in PACKED)
    wanted, found = measured(alone, variants), measured(together, variants)
    assert set(found) == set(wanted) and len(wanted) == 6 * len(variants)
    for key, logits in wanted.items():
        assert found[key].shape == logits.shape == (len(texts()[key[1]].read), VOCABULARY)
        assert (found[key] - logits).abs().max() <= 2e-5 * max(1.0, float(logits.abs().max()))
    assert (wanted[1, 0] - wanted[0, 0]).abs().max() > 1e-2
    if layout.packs:
        read = [text for text in texts() if len(text.read)]
        assert tokens_run(together, texts(), 3) < sum(len(text.ids) for text in read) < tokens_run(alone, texts(), 3)
        assert together.meter.spent < alone.meter.spent


def test_what_is_not_exact_on_the_weights_is_given_up(tmp_path: Path) -> None:
    model, architecture = model_of(tmp_path / "model", NAMES[0])

    def leaks(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output + output.mean(dim=1, keepdim=True)

    model.get_submodule(f"{architecture.blocks}.0.mlp").register_forward_hook(leaks)
    notes: list[str] = []
    layout = Layout(1024, lambda: exactness(architecture, architecture.block_count - 1))
    source = ResumingModel(model, architecture.blocks, tokens=1024, memory=0, layout=layout, note=notes.append)
    source.prove(texts()[0].ids, {})
    assert not layout.packs and any("a row of its own" in note for note in notes)


@pytest.mark.parametrize("name", NAMES)
def test_the_head_runs_only_where_it_is_read(name: str, tmp_path: Path) -> None:
    model, architecture = model_of(tmp_path / "model", name)
    inputs = {"input_ids": torch.randint(3, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(0))}
    inputs |= {"attention_mask": torch.ones(2, 7, dtype=torch.long), "position_ids": torch.arange(7).repeat(2, 1)}
    seen: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda _m, _i, out: seen.append(out[..., 0].numel()))
    rows, columns = torch.tensor([1, 0, 1]), torch.tensor([6, 2, 0])
    source, found = LoadedModel(model, architecture.blocks), list[torch.Tensor]()
    for given in (None, rows):
        source.logits([LogitsJob(inputs, {}, columns, given)], lambda _number, logits: found.append(logits.clone()))
    assert torch.allclose(found[1], found[0][rows, torch.arange(3)], atol=1e-5)
    assert seen[-1] == 3


def test_a_class_without_a_head_to_be_found_gives_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, architecture = model_of(tmp_path / "model", NAMES[0])
    inputs = {"input_ids": torch.arange(3, 10)[None], "attention_mask": torch.ones(1, 7, dtype=torch.long)}
    inputs["position_ids"] = torch.arange(7)[None]
    job = LogitsJob(inputs, {}, torch.tensor([1, 6]), torch.tensor([0, 0]))
    source, found = LoadedModel(model, architecture.blocks), list[torch.Tensor]()
    for head in (model.lm_head, None, model.model.norm):
        monkeypatch.setattr(model, "get_output_embeddings", lambda head=head: head)
        source.logits([job], lambda _number, logits: found.append(logits.clone()))
    assert torch.allclose(found[1], found[0], atol=1e-6) and torch.allclose(found[2], found[0], atol=1e-6)
