"""What a vector breaks: KL divergence and perplexity on texts that it should leave alone, from one pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from patcher.capture.batches import padded
from patcher.capture.logits import LogitsJob, LogitsSource
from patcher.evaluate.scoring import Vectors

_ROWS = 4
"""Texts in a batch: every position's logits are kept."""


@dataclass(frozen=True)
class Damage:
    """Of one variant, over texts.

    Attributes:
        kl: [texts], fp64: KL(base || steered) of the next-token distributions, nats, mean over the text's positions.
        log_probs: [texts], fp64: mean log-probability of the text's tokens after the first, nats.
        tokens: [texts], int64: how many tokens each text has.
    """

    kl: torch.Tensor
    log_probs: torch.Tensor
    tokens: torch.Tensor

    @property
    def mean_kl(self) -> float:
        """Nats a token, over all tokens."""
        return float((self.kl * self.tokens).sum() / self.tokens.sum())

    @property
    def perplexity(self) -> float:
        """Over all tokens but the first of each text."""
        scored = self.tokens - 1
        return float(torch.exp(-(self.log_probs * scored).sum() / scored.sum()))


@dataclass(frozen=True)
class _Base:
    """The base's distributions of one batch.

    Attributes:
        probabilities: [rows, width, vocabulary], fp32.
        entropy: [rows, width], nats.
        following: [rows, width - 1]: the tokens that come next.
    """

    probabilities: torch.Tensor
    entropy: torch.Tensor
    following: torch.Tensor

    @classmethod
    def of(cls, logits: torch.Tensor, ids: torch.Tensor) -> _Base:
        log_probs = _numbers(torch.log_softmax(logits.float(), dim=-1))
        probabilities = log_probs.exp()
        entropy = -torch.linalg.vecdot(probabilities, log_probs)
        return cls(probabilities, entropy, ids[:, 1:].to(logits.device))

    @property
    def size(self) -> int:
        return self.probabilities.numel() * self.probabilities.element_size()

    def compare(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """KL(base || steered) [rows, width], and log-probabilities of the tokens that follow, [rows, width - 1]."""
        logits = _numbers(logits.float())
        normaliser = torch.logsumexp(logits, dim=-1)
        cross = torch.linalg.vecdot(self.probabilities, logits) - normaliser
        divergence = (-self.entropy - cross).clamp(min=0)
        picked = logits[:, :-1].gather(-1, self.following[..., None])[..., 0] - normaliser[:, :-1]
        return divergence.cpu().double(), picked.cpu().double()


@dataclass
class NeutralText:
    """Texts on which the steered model is compared with the base.

    The base's distributions are kept between calls while they fit.

    Args:
        texts: token ids; texts of fewer than two tokens say nothing and are left out.
        memory: bytes that may be kept.
    """

    texts: Sequence[Sequence[int]]
    memory: int = 0
    _kept: dict[tuple[int, ...], _Base] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.texts = [ids for ids in self.texts if len(ids) > 1]

    @property
    def tokens(self) -> int:
        """How many positions are compared."""
        return sum(len(ids) for ids in self.texts)

    def damage(self, source: LogitsSource, variants: Sequence[Vectors], texts: int | None = None) -> list[Damage]:
        """The damage of each variant, on the first ``texts`` texts.

        Logits are computed in the model's dtype; distributions are compared in fp32, sums are fp64.
        """
        chosen = self.texts[: len(self.texts) if texts is None else texts]
        sizes = torch.tensor([len(ids) for ids in chosen])
        kl = torch.zeros(len(variants), len(chosen), dtype=torch.float64)
        log_probs = torch.zeros(len(variants), len(chosen), dtype=torch.float64)
        order = sorted(range(len(chosen)), key=lambda index: len(chosen[index]))
        # One call for everything: a base that is streamed from the disk is read once for each.
        jobs: list[LogitsJob] = []
        origins: list[tuple[tuple[int, ...], int | None]] = []
        for start in range(0, len(order), _ROWS):
            rows = tuple(order[start : start + _ROWS])
            inputs, _ = padded([chosen[index] for index in rows], "right", 0)
            columns = torch.arange(inputs["input_ids"].shape[1])
            if rows not in self._kept:
                jobs.append(LogitsJob(inputs, {}, columns))
                origins.append((rows, None))
            jobs += [LogitsJob(inputs, vectors, columns) for vectors in variants]
            origins += [(rows, variant) for variant in range(len(variants))]
        current: dict[tuple[int, ...], _Base] = {}

        def use(number: int, logits: torch.Tensor) -> None:
            rows, variant = origins[number]
            if variant is None:
                current.clear()
                current[rows] = _Base.of(logits, jobs[number].inputs["input_ids"])
                self._keep(rows, current[rows])
                return
            base = current[rows] if rows in current else self._kept[rows]
            divergence, picked = base.compare(logits)
            for row, index in enumerate(rows):
                kl[variant, index] = divergence[row, : sizes[index]].mean()
                log_probs[variant, index] = picked[row, : sizes[index] - 1].mean()

        source.logits(jobs, use)
        return [Damage(kl[variant], log_probs[variant], sizes) for variant in range(len(variants))]

    def _keep(self, rows: tuple[int, ...], base: _Base) -> None:
        if base.size + sum(kept.size for kept in self._kept.values()) <= self.memory:
            self._kept[rows] = base


def _numbers(logits: torch.Tensor) -> torch.Tensor:
    """A token that cannot be said has a logit of minus infinity, and 0 times that would be no number."""
    return logits.clamp(min=torch.finfo(torch.float32).min)
