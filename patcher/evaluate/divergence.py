"""Which tokens make up the Kullback-Leibler divergence of the steered next-token distributions from the base's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from patcher.capture.logits import LogitsSource
from patcher.evaluate.log_probs import Rows, next_token_log_probs, wide
from patcher.evaluate.scoring import Vectors


@dataclass(frozen=True)
class TokenContribution:
    """What one token adds to a divergence.

    Attributes:
        token: its id.
        contribution: nats a position.
        base: its mean probability before.
        steered: its mean probability under the vectors.
    """

    token: int
    contribution: float
    base: float
    steered: float


@dataclass(frozen=True)
class TokenContributions:
    """Which tokens make up KL(steered || base).

    Attributes:
        divergence: the sum over the whole vocabulary, nats a position.
        tokens: those that add most, the largest first.
    """

    divergence: float
    tokens: tuple[TokenContribution, ...]


def top_contributing_tokens(
    source: LogitsSource,
    texts: Sequence[Sequence[int]],
    base: Vectors,
    steered: Vectors,
    batch_size: int,
    *,
    count: int = 10,
    last_only: bool = False,
) -> TokenContributions:
    """The tokens with the largest p log(p / q), p steered and q base, averaged over positions.

    This is the table of the ActAdd post (Turner et al. 2023, "contribution to KL divergence"): there of one prompt,
    at the position where " wedding" is due, which here is ``last_only``. It splits KL(steered || base), the other
    way round than :class:`patcher.evaluate.damage.Damage`, so that tokens which steering makes likely come first.

    Args:
        texts: token ids.
        base: the vectors to compare with, usually ``{}``.
        count: how many tokens.
        last_only: only the distribution after each text's last token.
    """
    before: dict[int, torch.Tensor] = {}
    sums: list[torch.Tensor] = []
    positions = 0

    def use(variant: int, rows: Rows) -> None:
        nonlocal positions
        if variant == 0:
            before.clear()
            before.update(rows)
            return
        for text, after in rows:
            parts = (_terms(after, before[text]), before[text].exp(), after.exp())
            found = torch.stack([wide(part).sum(dim=0).cpu() for part in parts])
            sums[:] = [sums[0] + found] if sums else [found]
            positions += len(after)

    next_token_log_probs(source, texts, [base, steered], batch_size, use, last_only=last_only)
    means = sums[0] / positions
    top = means[0].topk(min(count, means.shape[1])).indices.tolist()
    found = [TokenContribution(token, *means[:, token].tolist()) for token in top]
    return TokenContributions(float(means[0].sum()), tuple(found))


def _terms(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """p log(p / q) of log-probabilities; a token that cannot be said adds nothing."""
    p = first.exp()
    return torch.where(p > 0, p * (first - second), 0.0)
