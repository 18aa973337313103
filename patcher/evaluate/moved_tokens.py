"""Which tokens steering moves: those of a text, those that come next, and those that make up the divergence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from patcher.capture.logits import LogitsSource
from patcher.evaluate.contributions import Contributions, TokenContributions
from patcher.evaluate.log_probs import next_token_log_probs
from patcher.evaluate.scoring import Rows, Vectors


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


@dataclass(frozen=True)
class TokenShift:
    """The probability of one next token, before and under the vectors.

    Attributes:
        token: its id.
        base, steered: its probabilities.
        log_ratio: log(steered / base), nats.
    """

    token: int
    base: float
    steered: float
    log_ratio: float

    @property
    def difference(self) -> float:
        """steered - base."""
        return self.steered - self.base


@dataclass(frozen=True)
class PromptShifts:
    """The most shifted next tokens of one prompt under one variant.

    Attributes:
        by_log_ratio: the tokens that are among the likeliest before or under the vectors, the most raised first and
            the most lowered last. Of the whole vocabulary the largest ratios belong to tokens that nobody would see.
        by_difference: of the whole vocabulary the largest changes of the probability, up or down, the largest first.
    """

    by_log_ratio: tuple[TokenShift, ...]
    by_difference: tuple[TokenShift, ...]


def most_shifted_tokens(
    source: LogitsSource,
    prompts: Sequence[Sequence[int]],
    variants: Sequence[Vectors],
    batch_size: int,
    *,
    count: int = 10,
) -> list[list[PromptShifts]]:
    """The figure of the ActAdd post (Turner et al. 2023): next tokens of a prompt, and how steering moves them.

    The post shows the ``count`` likeliest tokens of each model, their ratio over the unsteered probability
    (``by_log_ratio``); its code also sorts by the difference.

    Args:
        source: the base model.
        prompts: token ids, none of them empty.
        variants: the first is what the others are compared with, ``{}`` for the base itself.
        batch_size: most rows in a batch.
        count: how many tokens of each model, and how many differences.

    Returns:
        For each variant but the first, for each prompt.
    """
    found: list[dict[int, PromptShifts]] = [{} for _ in variants]
    base: dict[int, torch.Tensor] = {}

    def use(variant: int, rows: Rows) -> None:
        for prompt, log_probs in rows:
            if variant == 0:
                base[prompt] = log_probs[0]
            else:
                found[variant][prompt] = _shifts(base[prompt], log_probs[0], count)

    next_token_log_probs(source, prompts, variants, batch_size, use, last_only=True)
    return [[shifts[prompt] for prompt in range(len(prompts))] for shifts in found[1:]]


def _shifts(base: torch.Tensor, steered: torch.Tensor, count: int) -> PromptShifts:
    count = min(count, len(base))
    likely = torch.unique(torch.cat([base.topk(count).indices, steered.topk(count).indices]))
    ratios = (steered - base)[likely]
    differences = steered.exp() - base.exp()
    return PromptShifts(
        _listed(likely[ratios.argsort(descending=True)], base, steered),
        _listed(differences.abs().topk(count).indices, base, steered),
    )


def _listed(tokens: torch.Tensor, base: torch.Tensor, steered: torch.Tensor) -> tuple[TokenShift, ...]:
    before, after = base[tokens], steered[tokens]
    columns = (tokens, before.exp(), after.exp(), after - before)
    return tuple(TokenShift(*values) for values in zip(*(column.tolist() for column in columns), strict=True))


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
    return contributions_to(source, texts, base, steered, batch_size, last_only=last_only).top(count)


def contributions_to(
    source: LogitsSource,
    texts: Sequence[Sequence[int]],
    base: Vectors,
    steered: Vectors,
    batch_size: int,
    *,
    last_only: bool = False,
) -> Contributions:
    """What :func:`top_contributing_tokens` lists the top of."""
    before: dict[int, torch.Tensor] = {}
    found = Contributions()

    def use(variant: int, rows: Rows) -> None:
        if variant == 0:
            before.clear()
            before.update(rows)
            return
        for text, after in rows:
            found.add(before[text], after)

    next_token_log_probs(source, texts, [base, steered], batch_size, use, last_only=last_only)
    return found
