"""A PEFT adapter for the base: LoRA whose matrices are zero and whose bias is the vector.

Of PEFT's tuners, LoRA with ``lora_bias`` loads in the most versions and also takes the Conv1D of GPT-2, which BEFT does
not. The bias is stored as what the residual stream gains; where the model scales its MLP's output (Granite), the
inverse of that factor is the adapter's own scale, ``lora_alpha``.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from patcher.architectures.analysis import Architecture
from patcher.architectures.model_class import on_meta, quiet_transformers, submodule
from patcher.architectures.residual import attached
from patcher.architectures.shrink import shrink_config
from patcher.architectures.stand_in import RandomStandIn, logits_of, run_on
from patcher.errors import CheckFailed, InputError
from patcher.export.edits import Edits
from patcher.routes.plan import NotApplicable
from patcher.routes.rank_one.sites import find_site
from patcher.vectors.files.saving import save_vectors
from patcher.vectors.peft_files import ADAPTER, CONFIG, GAINS, PREFIX, is_marked

SUFFIX = ""


@dataclass(frozen=True)
class BiasPlace:
    """A linear module whose output reaches the residual stream as it is, times ``factor``.

    Attributes:
        module: its name in the causal LM class.
        width: length of its input.
        transposed: it is a Conv1D.
        factor: residual gain per unit of its output.
    """

    module: str
    width: int
    transposed: bool
    factor: float


def is_ours(path: Path) -> bool:
    """Whether it is an adapter that we wrote."""
    return is_marked(path)


def write(edits: Edits, target: Path) -> list[str]:
    """Write the adapter's folder, after stock PEFT was seen to do with such a one what a hook does.

    Raises:
        InputError: no linear module of a block adds to the residual stream alone.
        CheckFailed: PEFT and the hook differ on a tiny model with this config.
    """
    architecture = edits.architecture()
    places = {layer: _place(architecture, layer) for layer in edits.vectors}
    for layer, place in places.items():
        _prove(architecture, layer, place)
    origin = {"base_model_name_or_path": edits.base, "revision": edits.revision} if edits.on_hub else {}
    _write_adapter(target, places, edits.vectors, origin)
    return ["it is for the base model; the patched folder has the vector already"]


def use(edits: Edits, output: Path) -> list[str]:
    """The lines that load it."""
    loader = edits.architecture().auto_class
    return [
        "from peft import PeftModel",
        f"from transformers import {loader}",
        f'base = {loader}.from_pretrained("{edits.place}")',
        f'model = PeftModel.from_pretrained(base, "{output}")',
    ]


def _place(architecture: Architecture, layer: int) -> BiasPlace:
    where, remedy = f"layer {layer}", "bake it: the patched folder itself, or a control vector"
    if layer < 0:
        raise InputError("PEFT has no constant that is added to an embedding", where=where, remedy=remedy)
    try:
        site = find_site(architecture, layer)
    except NotApplicable as finding:
        raise InputError("PEFT has no place for the vector", where=where, found=finding, remedy=remedy) from None
    name = f"{architecture.blocks}.{layer}.{site.module}"
    module = submodule(on_meta(architecture.config, trust_remote_code=architecture.trust_remote_code), name)
    why = None
    if site.experts:
        why = "the MLP is a mixture of experts, whose weights are no linear module"
    elif site.gain == "norm":
        why = "a norm follows the MLP, so that a constant before it is none behind it"
    elif site.gain == "token":
        why = "what the MLP adds is multiplied by a gate of each token's own"
    elif not (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"):
        why = f"`{name}` is a {type(module).__name__}, to which PEFT adds no bias"
    if why is not None:
        raise InputError("PEFT has no place for the vector", where=where, found=why, remedy=remedy)
    return BiasPlace(name, site.width, not isinstance(module, nn.Linear), site.factor)


def _write_adapter(
    target: Path, places: Mapping[int, BiasPlace], vectors: Mapping[int, torch.Tensor], origin: Mapping[str, Any]
) -> None:
    """``vectors``: layer -> fp32 [hidden], what the residual stream gains."""
    target.mkdir()
    tensors, gains = {}, {}
    for layer, place in places.items():
        stem = f"{PREFIX}{place.module}"
        tensors[f"{stem}.lora_A.weight"] = torch.zeros(1, place.width)
        tensors[f"{stem}.lora_B.weight"] = torch.zeros(len(vectors[layer]), 1)
        tensors[f"{stem}.lora_B.bias"] = vectors[layer]
        gains[str(layer)] = f"{stem}.lora_B.bias"
    scales = {place.module: 1.0 / place.factor for place in places.values()}
    first = next(iter(scales.values()))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        **origin,
        "inference_mode": True,
        "target_modules": list(scales),
        "r": 1,
        "lora_alpha": first,
        **({} if len({*scales.values()}) == 1 else {"alpha_pattern": scales}),
        "lora_bias": True,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(place.transposed for place in places.values()),
    }
    (target / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_vectors(target / ADAPTER, tensors, {"tool": "patch-model", GAINS: json.dumps(gains)})


def _prove(architecture: Architecture, layer: int, place: BiasPlace) -> None:
    """Stock PEFT on a tiny model with this config, against a hook on the block."""
    from peft import PeftModel

    config, small_layer = shrink_config(architecture.config, layer)
    stand_in = RandomStandIn.of(config, trust_remote_code=architecture.trust_remote_code)
    model, ids = stand_in.model, stand_in.ids
    block = submodule(model, f"{architecture.blocks}.{small_layer}")
    inside = place.module.removeprefix(f"{architecture.blocks}.{layer}.")
    weight = block.get_submodule(inside).weight
    hidden, width = weight.shape[::-1] if place.transposed else weight.shape
    vector = stand_in.random(hidden)
    # The stand-in follows the same rule with numbers of its own: its factor is measured, the real one was stated.
    tiny = BiasPlace(
        f"{architecture.blocks}.{small_layer}.{inside}", width, place.transposed, _factor(block, inside, model, ids)
    )
    with tempfile.TemporaryDirectory(prefix="patch-model-peft-") as name, torch.no_grad(), quiet_transformers():
        adapter = Path(name) / "adapter"
        _write_adapter(adapter, {small_layer: tiny}, {small_layer: vector}, {})
        plain = logits_of(model, ids)
        _, hooked = run_on(model, block, ids, add=vector)
        tuned = PeftModel.from_pretrained(model, str(adapter)).eval()
        apart = float((logits_of(tuned, ids) - hooked).abs().max())
    effect = float((hooked - plain).abs().max())
    if not apart <= 1e-3 * min(effect, 1.0):
        raise CheckFailed(
            "stock PEFT does not steer this class as a hook does, so no adapter was written",
            where=f"layer {layer}: {place.module}",
            found=f"logits of a tiny model differ by {apart:.3g}; the steering changes them by {effect:.3g}",
            remedy="bake it: the patched folder itself, or a control vector",
        )


def _factor(block: nn.Module, inside: str, model: nn.Module, ids: torch.Tensor) -> float:
    """Residual gain per unit of the module's output."""
    unit = 1.0

    def add(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output + unit

    with torch.no_grad(), quiet_transformers():
        before, _ = run_on(model, block, ids)
        with attached(block.get_submodule(inside).register_forward_hook(add)):
            after, _ = run_on(model, block, ids)
    return float((after - before).double().mean()) / unit
