"""How many tokens a batch may hold."""

from __future__ import annotations

from typing import Any

import torch

CPU_TOKENS = 1024
"""More do not make the matrix products faster, and the activations between them leave the caches."""
_MOST_TOKENS = 65_536
_LEAST_TOKENS = 256
# Of the free memory of an accelerator; the allocator loses some to fragments, and a batch that fails is halved anyway.
_FRACTION = 0.5


def token_budget(config: Any, device: torch.device, dtype: torch.dtype) -> int:
    """The most tokens a batch may hold on this device, by its free memory and the widths of the model."""
    if device.type != "cuda":
        return CPU_TOKENS
    free, _total = torch.cuda.mem_get_info(device)
    hidden = int(config.hidden_size)
    inner = getattr(config, "intermediate_size", None)
    widest = inner if isinstance(inner, int) else 4 * hidden
    # The residual stream and what attention makes of it; the MLP's inner activations; fp32 copies in the norms.
    per_token = dtype.itemsize * (12 * hidden + 4 * widest) + 8 * hidden
    tokens = max(_LEAST_TOKENS, min(_MOST_TOKENS, int(_FRACTION * free / per_token)))
    # A power of two, so that a little more or less free memory does not change the last bits of a result.
    return 1 << (tokens.bit_length() - 1)
