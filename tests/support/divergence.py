"""Kullback-Leibler divergence by its definition: what the damage that builds and sweeps report is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from patcher.capture.logits import LogitsSource
from patcher.evaluate.log_probs import next_token_log_probs
from patcher.evaluate.scoring import Rows, Vectors


@dataclass(frozen=True)
class Divergence:
    """KL(first variant || each variant), nats a token.

    Attributes:
        means: [variants, texts], fp64: over the positions of each text. The first row is 0. Where a variant's logits
            are not finite, neither is this.
        tokens: [texts], int64: how many positions each text has.
    """

    means: torch.Tensor
    tokens: torch.Tensor

    def overall(self) -> torch.Tensor:
        """The mean over all positions of all texts, [variants], fp64."""
        return (self.means * self.tokens).sum(dim=1) / self.tokens.sum()


def next_token_divergence(
    source: LogitsSource, texts: Sequence[Sequence[int]], variants: Sequence[Vectors], batch_size: int
) -> Divergence:
    """KL(base || steered) of the next-token distributions at every position of every text (Kullback and Leibler 1951).

    The base's probabilities weigh: what it would have said counts, which makes this a measure of damage.

    Args:
        source: the base model.
        texts: token ids, at least one of them not empty.
        variants: the first is what the others are compared with, ``{}`` for the base itself.
        batch_size: most rows in a batch; the log-probabilities of one batch of the base are kept at a time.
    """
    means = torch.zeros(len(variants), len(texts), dtype=torch.float64)
    base: dict[int, torch.Tensor] = {}

    def use(variant: int, rows: Rows) -> None:
        if variant == 0:
            base.clear()
            base.update(rows)
            return
        for text, steered in rows:
            p = base[text].exp()
            # A token that cannot be said adds nothing.
            terms = torch.where(p > 0, p * (base[text] - steered), 0.0)
            means[variant, text] = terms.double().sum(dim=-1).mean()

    next_token_log_probs(source, texts, variants, batch_size, use)
    return Divergence(means, torch.tensor([len(ids) for ids in texts]))
