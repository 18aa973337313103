"""Tiny checkpoints quantised as released ones are: the same tensor names, dtypes, shapes and config keys.

Written with torch alone, so that what reads them is only the stock loader. A block's linear layers are quantised, its
norms and the embeddings are not, as in released checkpoints.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

GROUP = 32
FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
Tensors = dict[str, torch.Tensor]


def quantise(folder: Path, method: str) -> None:
    """Quantise a saved checkpoint (one file) in place."""
    make, config = METHODS[method]
    file = folder / "model.safetensors"
    result: Tensors = {}
    for name, tensor in load_file(file).items():
        result |= make(name, tensor.float()) if _is_quantised(name, tensor) else {name: tensor}
    save_file({name: tensor.contiguous() for name, tensor in result.items()}, file, {"format": "pt"})
    stated = json.loads((folder / "config.json").read_text())
    stated["quantization_config"] = config
    (folder / "config.json").write_text(json.dumps(stated, indent=2))


def trained_scale(folder: Path) -> None:
    """Make the embeddings of a saved checkpoint as large as a trained model's residual stream is."""
    file = folder / "model.safetensors"
    stored = load_file(file)
    for name, tensor in stored.items():
        if "embed_tokens" in name:
            stored[name] = (tensor.float() / tensor.float().std()).to(tensor.dtype)
    save_file(stored, file, {"format": "pt"})


def _is_quantised(name: str, tensor: torch.Tensor) -> bool:
    if ".experts." in name:
        return not name.endswith("bias")
    inside = ".layers." in name or ".h." in name
    return (
        inside
        and name.endswith(".weight")
        and tensor.ndim == 2
        and not re.search("router|mlp.gate.weight|block_sparse_moe.gate.weight", name)
    )


def _integers(weight: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric integers [out, in] in 0 .. 2^bits - 1 around the middle, and a scale for every group of inputs."""
    rows, columns = weight.shape
    grouped = weight.reshape(rows, columns // GROUP, GROUP)
    middle = 2 ** (bits - 1)
    scale = grouped.abs().amax(dim=-1).clamp(min=1e-6) / (middle - 1)
    scale = scale.half().float()
    whole = (grouped / scale[..., None]).round().clamp(-middle, middle - 1) + middle
    return whole.reshape(rows, columns).to(torch.int64), scale


def _pack(values: torch.Tensor, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """Eight 4-bit values along the last dimension into one int32; value ``order[i]`` takes the i-th place."""
    parts = values.reshape(*values.shape[:-1], -1, 8)[..., list(order)]
    packed = sum(parts[..., place] << (4 * place) for place in range(8))
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)


def _gptq(name: str, weight: torch.Tensor) -> Tensors:
    stem = name.removesuffix("weight")
    whole, scale = _integers(weight, 4)
    groups, rows = scale.shape[1], weight.shape[0]
    return {
        f"{stem}qweight": _pack(whole).T,
        # The format stores zero points less one.
        f"{stem}qzeros": _pack(torch.full((groups, rows), 7)),
        f"{stem}scales": scale.T.half(),
        f"{stem}g_idx": (torch.arange(weight.shape[1]) // GROUP).to(torch.int32),
    }


def _awq(name: str, weight: torch.Tensor) -> Tensors:
    stem = name.removesuffix("weight")
    whole, scale = _integers(weight, 4)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    return {
        f"{stem}qweight": _pack(whole.T, order),
        f"{stem}qzeros": _pack(torch.full((scale.shape[1], weight.shape[0]), 8), order),
        f"{stem}scales": scale.T.half(),
    }


def _fp8(block: int) -> Callable[[str, torch.Tensor], Tensors]:
    def make(name: str, weight: torch.Tensor) -> Tensors:
        rows, columns = weight.shape
        tiles = weight.reshape(rows // block, block, columns // block, block)
        scale = tiles.abs().amax(dim=(1, 3)).clamp(min=1e-6) / 448.0
        held = (tiles / scale[:, None, :, None]).reshape(rows, columns).to(torch.float8_e4m3fn)
        return {name: held, f"{name}_scale_inv": scale}

    return make


def _float_quantised(name: str, weight: torch.Tensor) -> Tensors:
    scale = weight.abs().amax(dim=-1, keepdim=True).clamp(min=1e-6) / 448.0
    return {name: (weight / scale).to(torch.float8_e4m3fn), f"{name}_scale": scale.bfloat16()}


def _int_quantised(name: str, weight: torch.Tensor) -> Tensors:
    scale = weight.abs().amax(dim=-1, keepdim=True).clamp(min=1e-6) / 127.0
    return {name: (weight / scale).round().to(torch.int8), f"{name}_scale": scale.bfloat16()}


def _pack_quantised(name: str, weight: torch.Tensor) -> Tensors:
    whole, scale = _integers(weight, 4)
    return {
        f"{name}_packed": _pack(whole),
        f"{name}_scale": scale.bfloat16(),
        f"{name}_shape": torch.tensor(weight.shape),
    }


def _mxfp4(name: str, weight: torch.Tensor) -> Tensors:
    """[experts, in, out] -> blocks [experts, out, groups, 16] and scales [experts, out, groups]."""
    grouped = weight.transpose(1, 2).reshape(weight.shape[0], weight.shape[2], -1, 32)
    exponent = torch.floor(torch.log2(grouped.abs().amax(dim=-1).clamp(min=1e-12))) - 2
    scaled = grouped / torch.exp2(exponent)[..., None]
    codes = (scaled[..., None] - FP4).abs().argmin(dim=-1)
    blocks = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return {f"{name}_blocks": blocks.to(torch.uint8), f"{name}_scales": (exponent + 127).to(torch.uint8)}


def _experts_only(make: Callable[[str, torch.Tensor], Tensors]) -> Callable[[str, torch.Tensor], Tensors]:
    return lambda name, weight: make(name, weight) if ".experts." in name else {name: weight.bfloat16()}


def _compressed(format: str, weights: dict[str, Any], activations: dict[str, Any] | None = None) -> dict[str, Any]:
    common = {"symmetric": True, "dynamic": False, "observer": "minmax"}
    dynamic = {"symmetric": True, "dynamic": True, "observer": None, "strategy": "token", "num_bits": 8}
    inputs = None if activations is None else {**dynamic, **activations}
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": {**common, **weights}, "input_activations": inputs}
        },
    }


METHODS: dict[str, tuple[Callable[[str, torch.Tensor], Tensors], dict[str, Any]]] = {
    "gptq": (
        _gptq,
        {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": GROUP,
            "desc_act": False,
            "sym": True,
            "checkpoint_format": "gptq",
            "true_sequential": True,
            "damp_percent": 0.1,
        },
    ),
    "awq": (
        _awq,
        {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True},
    ),
    **{
        f"fp8 {block}".removesuffix(f" {GROUP}"): (
            _fp8(block),
            {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [block] * 2},
        )
        for block in (GROUP, 8)
    },
    "compressed-tensors float": (
        _float_quantised,
        _compressed("float-quantized", {"type": "float", "num_bits": 8, "strategy": "channel"}, {"type": "float"}),
    ),
    "compressed-tensors int": (
        _int_quantised,
        _compressed("int-quantized", {"type": "int", "num_bits": 8, "strategy": "channel"}, {"type": "int"}),
    ),
    "compressed-tensors packed": (
        _pack_quantised,
        _compressed("pack-quantized", {"type": "int", "num_bits": 4, "strategy": "group", "group_size": GROUP}),
    ),
    "mxfp4": (
        _experts_only(_mxfp4),
        {
            "quant_method": "mxfp4",
            "modules_to_not_convert": [
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "model.embed_tokens",
                "lm_head",
            ],
        },
    ),
}
"""Method -> how one weight [out, in] is stored, and the config's ``quantization_config``."""


def bitsandbytes(folder: Path, bits: int) -> None:
    """The same with bitsandbytes itself, whose tensors no one else writes; it runs on a CPU."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = (
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
        if bits == 4
        else BitsAndBytesConfig(load_in_8bit=True)
    )
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map="cpu")
    model.save_pretrained(folder)
