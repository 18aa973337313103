"""How far steering moves the next-token distributions: Kullback-Leibler divergence, and which tokens make it up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from patcher.capture.logits import LogitsSource
from patcher.evaluate.log_probs import Rows, next_token_log_probs, wide
from patcher.evaluate.scoring import Vectors


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
            means[variant, text] = wide(_terms(base[text], steered)).sum(dim=-1).mean().cpu()

    next_token_log_probs(source, texts, variants, batch_size, use)
    return Divergence(means, torch.tensor([len(ids) for ids in texts]))


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
    way round than :func:`next_token_divergence`, so that tokens which steering makes likely come first.

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
