"""Which tokens of a text steering makes more or less likely: the text in green and red."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from patcher.capture.logits import LogitsSource
from patcher.evaluate.log_probs import Rows, next_token_log_probs
from patcher.evaluate.scoring import Vectors


def token_changes(
    source: LogitsSource, texts: Sequence[Sequence[int]], variants: Sequence[Vectors], batch_size: int
) -> list[list[torch.Tensor]]:
    """log p(token) under each variant minus that under the first, of each token after those before it.

    The colours of the ActAdd post (Turner et al. 2023): green where steering helps to predict a token, red where it
    hurts.

    Args:
        source: the base model.
        texts: token ids.
        variants: the first is what the others are compared with, ``{}`` for the base itself.
        batch_size: most rows in a batch.

    Returns:
        For each variant but the first, for each text, [tokens], fp64, nats. The first token of a text has nothing
        before it and is never predicted: 0.
    """
    found = [[torch.zeros(len(ids), dtype=torch.float64) for ids in texts] for _ in variants]

    def use(variant: int, rows: Rows) -> None:
        for text, log_probs in rows:
            ids = torch.tensor(list(texts[text][1:]), dtype=torch.long, device=log_probs.device)
            found[variant][text][1:] = log_probs[:-1].gather(-1, ids[:, None])[:, 0].cpu().double()

    next_token_log_probs(source, texts, variants, batch_size, use)
    return [[own - first for own, first in zip(variant, found[0], strict=True)] for variant in found[1:]]
