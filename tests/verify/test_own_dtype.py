"""A model in fp32 that is cast to its own dtype is, bit by bit, what loading in that dtype gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import default_checkpoint, tiny_checkpoint

from patcher.architectures.model_class import quiet_transformers
from patcher.verify.programs.stock_model import castable

RELEASED = ["meta-llama--Llama-3.2-1B", "openai-community--gpt2"]
TYPES = ["qwen2", "qwen3", "mistral", "gemma2", "phi3", "qwen2_moe", "gpt_neox", "olmo2"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [*RELEASED, *TYPES])
def test_cast_and_loaded_agree(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    from transformers import AutoModelForCausalLM

    make = tiny_checkpoint if name in RELEASED else default_checkpoint
    make(tmp_path / "base", name, dtype=dtype)
    job: dict[str, Any] = {
        "folder": str(tmp_path / "base"), "offload": None, "dequantise": None, "trust_remote_code": False,
    }  # fmt: skip
    with quiet_transformers():
        model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32).eval()
        loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype="auto").eval()
        found = castable(job, model)
    if found is None:
        # The class keeps something in another dtype: it is loaded again, whatever that is.
        assert name not in ("meta-llama--Llama-3.2-1B", "qwen2")
        return
    assert found == dtype
    for parameter in model.parameters():
        parameter.data = parameter.data.to(found)
    ours, theirs = (dict(one.named_parameters()) | dict(one.named_buffers()) for one in (model, loaded))
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert ours[key].dtype == value.dtype and torch.equal(ours[key], value), key
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, loaded(ids).logits)
