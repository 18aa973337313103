"""Tiny checkpoints and what a stock loader makes of them."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from patcher.architectures.model_class import quiet_transformers
from patcher.checkpoint.steering_files import MANIFEST

HIDDEN, VOCABULARY, LAYERS = 32, 64, 2


def llama(**changes: Any) -> torch.nn.Module:
    keys: dict[str, Any] = {
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    }
    torch.manual_seed(0)
    return _random(LlamaForCausalLM(LlamaConfig(**{**keys, **changes})))


def gpt2(**changes: Any) -> torch.nn.Module:
    keys: dict[str, Any] = {
        "n_embd": HIDDEN,
        "n_layer": LAYERS,
        "n_head": 4,
        "n_positions": 64,
        "vocab_size": VOCABULARY,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    torch.manual_seed(0)
    return _random(GPT2LMHeadModel(GPT2Config(**{**keys, **changes})))


def _random(model: torch.nn.Module) -> torch.nn.Module:
    """Biases of zero and norms of one would hide mistakes."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def save(model: torch.nn.Module, folder: Path, dtype: torch.dtype = torch.float32, *, sharded: bool = False) -> Path:
    with quiet_transformers():
        model.to(dtype).save_pretrained(folder, max_shard_size="20KB" if sharded else "5GB")
    assert (folder / "model.safetensors").exists() is not sharded
    return folder


def load(folder: Path, dtype: torch.dtype | str = torch.float32) -> Any:
    """The folder in stock transformers; a missing or unexpected key is an error."""
    with quiet_transformers():
        model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(24).reshape(2, 12) * 5 % VOCABULARY
    with torch.no_grad():
        return model(ids).logits.float()


@contextlib.contextmanager
def hooked(model: Any, layer: int, vector: torch.Tensor) -> Iterator[None]:
    """The definition of steering: the residual stream after a block gains the vector."""
    blocks = model.model.layers if hasattr(model, "model") else model.transformer.h

    def add(_module: Any, _inputs: Any, output: Any) -> Any:
        return (output[0] + vector, *output[1:]) if isinstance(output, tuple) else output + vector

    handle = blocks[layer].register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder's weight files, as safetensors itself reads them."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        with safe_open(file, "pt") as handle:
            for name in handle.keys():  # noqa: SIM118 - not a mapping
                assert name not in found, f"{name} is stored twice"
                found[name] = handle.get_tensor(name)
    return found


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    return torch.equal(left.reshape(-1).view(torch.uint8), right.reshape(-1).view(torch.uint8))


def assert_same_but(before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor], changed: set[str]) -> None:
    """Bit for bit equal, apart from the tensors named."""
    assert set(after) == set(before) | changed
    different = {name for name in before if not same_bits(before[name], after[name])}
    assert different == changed & set(before)


def hashes(folder: Path) -> dict[str, str]:
    """Relative path -> SHA-256 of everything in a folder."""
    files = sorted(item for item in folder.rglob("*") if item.is_file())
    return {str(item.relative_to(folder)): hashlib.sha256(item.read_bytes()).hexdigest() for item in files}


def names(folder: Path) -> list[str]:
    return sorted(item.name for item in folder.iterdir())


# A folder as patch-model writes it, for tests that only look at names and whole or half contents.


def fill(stage: Path, text: str = "new") -> None:
    (stage / MANIFEST).write_text(text)
    (stage / "sub").mkdir()
    (stage / "sub" / "file").write_text(text)


def ours(folder: Path, text: str = "old") -> Path:
    folder.mkdir()
    fill(folder, text)
    return folder


def whole(folder: Path, text: str = "new") -> bool:
    return (folder / MANIFEST).read_text() == (folder / "sub" / "file").read_text() == text
