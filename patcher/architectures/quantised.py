"""Quantised checkpoints: the formats whose stock loaders were seen to read a bias beside a quantised weight.

Each of them replaces a class's linear layers by its own and gives those a bias where the class has one; biases, norms
and embeddings stay floating-point. So a bias can be added or created while every quantised byte is copied.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from patcher.errors import InputError


@dataclass(frozen=True)
class Quantisation:
    """One format.

    Attributes:
        method: ``quant_method`` of config.json.
        packages: what transformers loads it with.
        bias: safetensors dtype of a created bias. A layer that keeps its bias in fp16 would round an fp32 one when it
            is loaded, so the rounded one is what is stored.
        dequantise: for comparisons in fp32, how stock transformers undoes it: a config class that is given
            ``dequantize=True``, or ``method`` for ``model.dequantize``; None where it computes in fp32 as it is. (A
            layer that rounds its input too, to int8 or fp8, turns differences of 1e-7 into visible ones.)
        llama_cpp: whether llama.cpp's converter reads it.
    """

    method: str
    packages: tuple[str, ...]
    bias: str = "F32"
    dequantise: str | None = None
    llama_cpp: bool = True


FORMATS: Mapping[str, Quantisation] = {
    found.method: found
    for found in (
        Quantisation("gptq", ("optimum", "gptqmodel"), bias="F16"),
        Quantisation("awq", ("gptqmodel",), bias="F16", llama_cpp=False),
        Quantisation("compressed-tensors", ("compressed-tensors",), dequantise="CompressedTensorsConfig"),
        Quantisation("fp8", ("accelerate",), dequantise="FineGrainedFP8Config"),
        Quantisation("mxfp4", ("accelerate",), dequantise="Mxfp4Config"),
        Quantisation("bitsandbytes", ("bitsandbytes",), dequantise="method", llama_cpp=False),
    )
}
"""``quant_method`` -> format; a new one is an entry here and a case of the conformance test."""


def quantisation_of(config: Mapping[str, Any], where: str = "config.json") -> Quantisation | None:
    """The format of a checkpoint, by its config.json; None where it is not quantised.

    Raises:
        InputError: it is one that is not in :data:`FORMATS`.
    """
    stated = config.get("quantization_config")
    if not stated:
        return None
    method = stated.get("quant_method") if isinstance(stated, Mapping) else None
    if isinstance(stated, Mapping) and (stated.get("load_in_8bit") or stated.get("load_in_4bit")):
        method = "bitsandbytes"
    if not isinstance(method, str) or method not in FORMATS:
        raise InputError(
            f"the checkpoint is quantised ({method or 'unknown'}), in a format whose biases are not known here",
            where=where,
            found="quantization_config",
            remedy="use the unquantised version of this model, or one quantised as " + ", ".join(FORMATS),
            code="quantised",
        )
    return FORMATS[method]
