"""Measuring in the half precision that a base is stored in, on a CPU that computes faster in it.

Reading activations stays in fp32, where it fits: vectors are means of small differences. What is measured under them
is the model as people run it, and its weights go back to what they are on the disk without loss.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator

import torch
from torch import nn

from patcher.capture.forward import forward

HALF = torch.bfloat16
_WORTH = 1.3
"""Times as fast: less is not worth the rounding."""
_FEWEST = 50_000_000
"""Parameters: a smaller model takes no time in fp32 either."""
_SIZE = 768
"""Of the matrices that are tried where torch does not say what the CPU has."""


def turned_to_half(model: nn.Module, stored: torch.dtype) -> bool:
    """Turn an fp32 model on a CPU into the bf16 one that is on the disk, if that is faster here.

    Parameters are changed one by one, so that there are never two copies; those that the class keeps in fp32 and all
    buffers (rotary frequencies) stay as they are, as when transformers loads the model in bf16. A class that cannot
    compute so is turned back.

    Args:
        stored: the dtype on the disk.

    Returns:
        Whether the model computes in bf16 now; a small one stays in fp32.
    """
    changed = list(_parameters(model)) if stored == HALF else []
    if not changed or sum(p.numel() for p in changed) < _FEWEST:
        return False
    if any(p.device.type != "cpu" or p.dtype != torch.float32 for p in changed) or not fast_in_half():
        return False
    _cast(changed, HALF)
    try:
        forward(model, {"input_ids": torch.zeros(1, 2, dtype=torch.long)})
    except (RuntimeError, TypeError, ValueError):
        _cast(changed, torch.float32)
        return False
    return True


def _cast(parameters: list[nn.Parameter], dtype: torch.dtype) -> None:
    for parameter in parameters:
        parameter.data = parameter.data.to(dtype)


def _parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    kept = {
        name
        for attribute in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
        for name in getattr(model, attribute, None) or ()
    }
    for path, parameter in model.named_parameters():
        if parameter.is_floating_point() and not kept & set(path.split(".")):
            yield parameter


@functools.cache
def fast_in_half() -> bool:
    """Whether this CPU multiplies bf16 matrices clearly faster than fp32 ones; tried out where torch does not know."""
    known = [getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
    if any(found is not None and found() for found in known):
        return True
    return _seconds(torch.float32) >= _WORTH * _seconds(HALF)


def _seconds(dtype: torch.dtype) -> float:
    """The least of a few products."""
    first, second = torch.ones(_SIZE // 4, _SIZE, dtype=dtype), torch.ones(_SIZE, _SIZE, dtype=dtype)
    taken = []
    with torch.no_grad():
        for _ in range(5):
            start = time.perf_counter()
            torch.nn.functional.linear(first, second)
            taken.append(time.perf_counter() - start)
    return min(taken)
