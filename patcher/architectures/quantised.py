"""Quantised checkpoints: the formats whose stock loaders were seen to read a bias, or a whole block, beside them.

Each of them replaces a class's linear layers by its own and gives those a bias where the class has one; biases, norms
and embeddings stay floating-point. So a bias can be added or created while every quantised byte is copied. Each also
has a list of modules that stay as the class has them, so that a block can be inserted that is not quantised.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
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
        skip: the key of ``quantization_config`` that lists the modules which stay as the class has them; of GPTQ, the
            ones which do not.
        casts: whether its loader casts a weight that is not quantised to the model's dtype.
        parts: what takes the place of a module's ``weight``, or stands beside it, in the names on disk.
    """

    method: str
    packages: tuple[str, ...]
    skip: str
    parts: tuple[str, ...]
    bias: str = "F32"
    dequantise: str | None = None
    llama_cpp: bool = True
    casts: bool = True

    def weight_of(self, name: str) -> str | None:
        """The class's weight that a tensor on disk is a part of; None for one that is no part of a quantised weight.

        A weight that keeps its name (fp8) is told by its other parts, see :meth:`quantised_weights`.
        """
        for part in self.parts:
            if (match := re.fullmatch(rf"(.+?){part}", name)) is not None:
                stem = match[1]
                return stem + "weight" if stem.endswith(".") else stem
        return None

    def quantised_weights(self, names: Collection[str]) -> dict[str, list[str]]:
        """Quantised weight, as the class calls it -> the names on disk that hold it, of all ``names`` on disk."""
        found: dict[str, list[str]] = {}
        for name in names:
            if (weight := self.weight_of(name)) is not None:
                found.setdefault(weight, []).append(name)
        for weight, parts in found.items():
            if weight in names:
                parts.append(weight)
        return found


_LISTED = "modules_to_not_convert"
_PACKED = (r"(?<=\.)(?:qweight|qzeros|scales|g_idx)",)

FORMATS: Mapping[str, Quantisation] = {
    found.method: found
    for found in (
        Quantisation("gptq", ("optimum", "gptqmodel"), "modules_in_block_to_quantize", _PACKED, bias="F16"),
        Quantisation("awq", ("gptqmodel",), _LISTED, _PACKED, bias="F16", llama_cpp=False),
        Quantisation(
            "compressed-tensors",
            ("compressed-tensors",),
            "ignore",
            (r"(?<=\.)(?:weight_(?:packed|scale|shape|zero_point|g_idx|global_scale)|input_(?:scale|zero_point))",),
            dequantise="CompressedTensorsConfig",
        ),
        Quantisation(
            "fp8",
            ("accelerate",),
            _LISTED,
            (r"(?<=\.)(?:weight_scale_inv|weight_scale|activation_scale|input_scale)",),
            dequantise="FineGrainedFP8Config",
        ),
        Quantisation("mxfp4", ("accelerate",), _LISTED, (r"_(?:blocks|scales)",), dequantise="Mxfp4Config"),
        Quantisation(
            "bitsandbytes",
            ("bitsandbytes",),
            "llm_int8_skip_modules",
            (r"(?<=\.)(?:weight\.(?:absmax|quant_map|nested_\w+|quant_state\.\w+)|SCB|weight_format)",),
            dequantise="method",
            llama_cpp=False,
            casts=False,
        ),
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
