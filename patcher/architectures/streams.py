"""How many residual streams the blocks of a class hand on: counted on a tiny stand-in."""

from __future__ import annotations

from patcher.architectures.analysis import Architecture
from patcher.architectures.model_class import submodule
from patcher.architectures.shrink import shrink_config
from patcher.architectures.stand_in import FAILURES, RandomStandIn, run_on


def stream_count(architecture: Architecture) -> int:
    """The number of residual streams, 1 for most classes; a vector is added to each of them."""

    def look() -> int:
        try:
            tiny, layer = shrink_config(architecture.config, 0)
            stand_in = RandomStandIn.of(tiny, trust_remote_code=architecture.trust_remote_code)
            block = submodule(stand_in.model, f"{architecture.blocks}.{layer}")
            streams, _ = run_on(stand_in.model, block, stand_in.ids)
        except FAILURES:
            return 1
        return streams.shape[2] if streams.ndim == 4 else 1

    return architecture.once(("streams",), look, int)
