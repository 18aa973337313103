"""How large a checkpoint becomes in memory, read from its headers alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from patcher.architectures.quantised import quantisation_of
from patcher.checkpoint.folder import CheckpointFolder
from patcher.checkpoint.safetensors_header import FLOATS, TensorInfo

FP32 = 4
_BNB_SCALES = ".absmax"
_PACKED_WORDS: Mapping[str, int] = {"I32": 32, "U8": 8}


def fp32_bytes(checkpoint: CheckpointFolder) -> int:
    """Bytes of the weights when stock transformers computes in fp32: quantised ones as what they are undone to.

    A format that computes on the packed weights (GPTQ, AWQ) keeps those as they are stored. Scales and zero points
    are counted although some loaders drop them, so this is a little too much rather than too little.

    Args:
        checkpoint: in a safetensors layout.

    Raises:
        InputError: a weight file is damaged, or quantised in a format that is not known.
    """
    return sum(size for _, size in tensor_fp32_bytes(checkpoint))


def tensor_fp32_bytes(checkpoint: CheckpointFolder) -> Iterator[tuple[str, int]]:
    """The same for every stored tensor."""
    size = _size_rule(checkpoint.config, checkpoint.tensors)
    for name, info in checkpoint.tensors.items():
        yield name, size(info)


def largest_part(checkpoint: CheckpointFolder) -> int:
    """The fp32 bytes of the largest decoder block, or of the largest tensor outside of them if that is larger."""
    parts: dict[str, int] = {}
    for name, size in tensor_fp32_bytes(checkpoint):
        words = name.split(".")
        place = next((number for number, word in enumerate(words) if word.isdigit()), len(words))
        part = ".".join(words[: place + 1])
        parts[part] = parts.get(part, 0) + size
    return max(parts.values(), default=0)


def file_bytes(checkpoint: CheckpointFolder) -> int:
    """Bytes of the weight files."""
    return sum(_file_sizes(checkpoint))


def mapped_bytes(checkpoint: CheckpointFolder) -> int:
    """The most bytes of address space that transformers maps at once: every weight file, and the largest again."""
    return file_bytes(checkpoint) + max(_file_sizes(checkpoint), default=0)


def _file_sizes(checkpoint: CheckpointFolder) -> list[int]:
    return [(checkpoint.path / name).stat().st_size for name in checkpoint.weight_files]


def _size_rule(config: Mapping[str, Any], stored: Mapping[str, TensorInfo]) -> Callable[[TensorInfo], int]:
    quantisation = quantisation_of(config)

    def whole(info: TensorInfo) -> int:
        return FP32 * math.prod(info.shape)

    def as_stored(info: TensorInfo) -> int:
        return whole(info) if info.dtype in FLOATS else info.size

    def unpacked(info: TensorInfo) -> int:
        word = _PACKED_WORDS.get(info.dtype)
        return whole(info) * (1 if word is None else max(1, word // bits))

    def four_bit(info: TensorInfo) -> int:
        # Its packed weights can lie in tensors of any dtype (`bnb_4bit_quant_storage`).
        return FP32 * 2 * info.size if info.name + _BNB_SCALES in stored else whole(info)

    if quantisation is None:
        return whole
    stated = config["quantization_config"]
    if quantisation.dequantise is None:
        return as_stored
    if quantisation.method == "bitsandbytes":
        return four_bit if stated.get("load_in_4bit") else whole
    bits = 4 if quantisation.method == "mxfp4" else _fewest_bits(stated)
    return unpacked


def _fewest_bits(stated: Mapping[str, Any]) -> int:
    """Of the groups of a compressed-tensors config; 8, which packs nothing, where none says it."""
    groups = stated.get("config_groups")
    entries = list(groups.values()) if isinstance(groups, Mapping) else []
    weights = [entry.get("weights") for entry in entries if isinstance(entry, Mapping)]
    bits = [entry.get("num_bits") for entry in weights if isinstance(entry, Mapping)]
    return min((number for number in bits if isinstance(number, int) and number > 0), default=8)
