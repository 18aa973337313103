"""An edit before block 0: what it is stored in, and that the copy equals the hook on what enters that block."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.stock_loading import stock_model
from support.tiny_models import parsed_config, released_config, tiny_checkpoint
from support.tiny_patch import hooks, patch_tiny, probe_ids

from patcher.architectures.analysis import Architecture
from patcher.routes.embedding import probe as embedding_probe
from patcher.routes.embedding import route as embedding
from patcher.routes.embedding.probe import find_embedding_slot
from patcher.routes.plan import NotApplicable

GPT2, LLAMA, GEMMA = "openai-community--gpt2", "meta-llama--Llama-3.2-1B", "google--gemma-3-1b-it"

# (released config, changes, what holds the vector, whether the head is untied)
CASES: list[tuple[str, dict[str, Any], str, bool]] = [
    (GPT2, {}, "transformer.wpe.weight", False),
    ("bigscience--bloom-560m", {}, "transformer.word_embeddings_layernorm.bias", False),
    ("facebook--opt-125m", {}, "model.decoder.embed_positions.weight", False),
    ("meta-llama--Llama-2-7b-chat-hf", {}, "model.embed_tokens.weight", False),
    (LLAMA, {}, "model.embed_tokens.weight", True),
    ("Qwen--Qwen2.5-0.5B", {}, "model.embed_tokens.weight", True),
    (GEMMA, {}, "model.embed_tokens.weight", True),
    ("ibm-granite--granite-3.3-2b-instruct", {}, "model.embed_tokens.weight", True),
    ("tiiuae--Falcon-H1-0.5B-Instruct", {"lm_head_multiplier": 1.0}, "model.embed_tokens.weight", False),
]


@pytest.mark.slow_but("*-single")
@pytest.mark.parametrize("sharded", [False, True], ids=["single", "sharded"])
@pytest.mark.parametrize(("name", "changes", "parameter", "untied"), CASES, ids=[case[0] for case in CASES])
def test_the_copy_equals_the_hook(
    tmp_path: Path, name: str, changes: dict[str, Any], parameter: str, untied: bool, sharded: bool
) -> None:
    tiny_checkpoint(tmp_path / "base", name, sharded=sharded, tokenizer=False, **changes)
    patched = patch_tiny(tmp_path / "base", tmp_path / "copy", [-1])
    assert patched.plan.route == "embedding"
    assert [tensor.parameter for tensor in patched.plan.carriers] == [parameter]
    assert dict(patched.plan.config_changes) == ({"tie_word_embeddings": False} if untied else {})
    assert patched.difference <= 2e-5 < 0.05 < patched.effect
    assert not patched.report


def test_half_precision_rows_are_widened_so_that_all_gain_the_same(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "base", LLAMA, dtype=torch.bfloat16, tokenizer=False)
    patched = patch_tiny(tmp_path / "base", tmp_path / "copy", [-1])
    assert [tensor.dtype for tensor in patched.plan.tensors] == ["F32", "BF16"]
    assert patched.difference <= 2e-5 < 0.05 < patched.effect


def test_without_untying_the_head_would_change_as_well(tmp_path: Path) -> None:
    """In a tied embedding the vector moves all logits of a position alike: probabilities stay, soft-caps do not."""
    tiny_checkpoint(tmp_path / "base", LLAMA, tokenizer=False)
    model, _ = stock_model(tmp_path / "base")
    ids = probe_ids(400)
    vector = torch.randn(64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        with hooks(model, "model.layers", {-1: vector}):
            hooked = model(input_ids=ids).logits
        model.get_input_embeddings().weight.add_(vector)
        assert float((model(input_ids=ids).logits - hooked).abs().max()) > 0.1


@pytest.mark.parametrize(
    ("name", "factor"),
    [(GPT2, 1.0), (GEMMA, 1152**0.5), ("ibm-granite--granite-3.3-2b-instruct", 12.0), ("openbmb--MiniCPM3-4B", 12.0)],
)
def test_the_factor_is_that_of_the_real_config(tmp_path: Path, name: str, factor: float) -> None:
    slot, why = find_embedding_slot(Architecture(parsed_config(released_config(name), tmp_path)))
    assert slot is not None, why
    assert slot.factor == pytest.approx(factor)


def test_a_factor_without_a_rule_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding_probe, "_stated", lambda *_arguments: None)
    architecture = Architecture(parsed_config(released_config(GEMMA), tmp_path))
    with pytest.raises(NotApplicable, match="no rule gives it"):
        embedding.plan(architecture, [-1], None)


def test_a_tied_embedding_of_a_class_that_cannot_untie_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding_probe, "UNTIED", {"tie_word_embeddings": True})
    architecture = Architecture(parsed_config(released_config(LLAMA), tmp_path))
    with pytest.raises(NotApplicable, match="ties it whatever the config says"):
        embedding.plan(architecture, [-1], None)


@pytest.mark.parametrize(("layers", "said"), [([3], "before block 0"), ([-1, 3], "a recipe of its own")])
def test_other_layers_are_not_of_the_embedding(tmp_path: Path, layers: list[int], said: str) -> None:
    architecture = Architecture(parsed_config(released_config(GPT2), tmp_path))
    with pytest.raises(NotApplicable, match=said):
        embedding.plan(architecture, layers, None)
