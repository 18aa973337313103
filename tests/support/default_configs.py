"""The default configs of the package, as far as an older transformers computes them."""

from __future__ import annotations

from support.old_transformers import is_too_old

from patcher.architectures.default_configs import NEEDED, default_config, needs_is_decoder

__all__ = ["default_config", "needs_is_decoder"]

if is_too_old("zamba2 with two shared transformers"):
    NEEDED["zamba2"] = {"num_mem_blocks": 1}
