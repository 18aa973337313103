"""A stock load against a hook, in this process: the independent half of the conformance tests."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from patcher.architectures.model_class import quiet_transformers


def log_probs(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return torch.log_softmax(model(input_ids=ids, use_cache=False).logits.float(), dim=-1)


def stock_model(folder: Path) -> tuple[torch.nn.Module, dict]:
    """The class that stock software loads; of a multimodal wrapper the whole."""
    with quiet_transformers():
        wraps = "text_config" in AutoConfig.from_pretrained(folder).sub_configs
        auto = AutoModelForImageTextToText if wraps else AutoModelForCausalLM
        model, info = auto.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    return model.eval(), info


def hooked_against_folder(base: Path, folder: Path, blocks: str, ids: torch.Tensor) -> tuple[float, float, dict]:
    """max |Δ log-prob| of the folder against the hooked base, the steering effect, and the folder's loading info."""
    steered, info = stock_model(folder)
    plain, _ = stock_model(base)
    vectors = load_file(folder / "steering.safetensors")
    candidate, unsteered = log_probs(steered, ids), log_probs(plain, ids)
    for key, vector in vectors.items():
        if key.startswith(("original/", "right/", "spread/")):
            continue
        block = plain.get_submodule(f"{blocks}.{key.rpartition('.')[2]}")

        def add(_module, _inputs, output, vector=vector):
            hidden = output if isinstance(output, torch.Tensor) else output[0]
            # Several residual streams may lie side by side.
            hidden = hidden + vector.repeat(hidden.shape[-1] // len(vector))
            return hidden if isinstance(output, torch.Tensor) else (hidden, *output[1:])

        block.register_forward_hook(add)
    hooked = log_probs(plain, ids)
    return float((candidate - hooked).abs().max()), float((hooked - unsteered).abs().max()), info
