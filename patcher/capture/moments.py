"""Mean squares of the residual stream, token by token: what an epsilon in a norm has to be compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from patcher.capture.batches import Batch, padded
from patcher.capture.residuals import Runner

Moments = Callable[[torch.Tensor], torch.Tensor]


def stream_moments(
    runner: Runner,
    rows: Sequence[Sequence[int]],
    layers: Sequence[int],
    moments: Moments,
    vectors: Mapping[int, torch.Tensor] | None = None,
) -> dict[int, list[torch.Tensor]]:
    """Run token ids up to the last of ``layers``, each row alone, and measure the residual stream after each layer.

    Args:
        runner: the model, in memory or streamed.
        rows: token ids.
        layers: 0-based block indices; -1 is the residual stream that enters block 0.
        moments: of residuals [..., hidden], measured in their place: [..., n].
        vectors: layer -> [hidden]; what is added at earlier layers. What later blocks make of it is not computed.

    Returns:
        For each layer and row, [tokens, n].

    Raises:
        InputError, OutsideError: as the runner raises them.
    """
    batches = [Batch(padded([ids], "right", 0)[0], ()) for ids in rows]
    found: dict[int, list[torch.Tensor]] = {layer: [torch.empty(0)] * len(rows) for layer in layers}
    earlier = {layer: [added for at, added in (vectors or {}).items() if at < layer] for layer in layers}

    def collect(layer: int, number: int, hidden: torch.Tensor) -> None:
        residual = hidden[0].float()
        for vector in earlier[layer]:
            residual = residual + vector.to(residual.device)
        found[layer][number] = moments(residual.cpu())

    # Only the runner of several processes asks more of what collects.
    runner.run(batches, sorted(layers), collect, None)  # type: ignore[arg-type]
    return found
