"""What a vector breaks: KL divergence and perplexity on texts that it should leave alone, from one pass."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from patcher.capture.layout import Text
from patcher.capture.logits import LogitsSource
from patcher.evaluate.contributions import Contributions
from patcher.evaluate.scoring import Rows, Vectors, run_texts, tokens_run

_ROWS = 16
"""Rows in a batch."""
POSITIONS = 12
"""Of a text, where it is compared at a sample of them: its head's products are a third of the work, or more."""


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
    """The base's distributions of one text.

    Attributes:
        log_probs: [read, vocabulary], fp32.
        entropy: [read], nats.
        following: [scored]: the tokens that come next; after the last token of a text none does.
        predicted: the mean log-probability of these, nats.
    """

    log_probs: torch.Tensor
    entropy: torch.Tensor
    following: torch.Tensor
    predicted: float

    @classmethod
    def of(cls, logits: torch.Tensor, text: Text) -> _Base:
        log_probs = _numbers(torch.log_softmax(logits.float(), dim=-1))
        entropy = -torch.linalg.vecdot(log_probs.exp(), log_probs)
        places = [place + 1 for place in text.read if place + 1 < len(text.ids)]
        following = torch.tensor([text.ids[place] for place in places], device=logits.device)
        predicted = log_probs[: len(places)].gather(-1, following[:, None]).cpu().double().mean()
        return cls(log_probs, entropy, following, float(predicted))

    @property
    def size(self) -> int:
        return self.log_probs.numel() * self.log_probs.element_size()

    def compare(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """KL(base || steered) [read], log-probabilities of the tokens that follow [scored], and all of them."""
        logits = _numbers(logits.float())
        normaliser = torch.logsumexp(logits, dim=-1)
        cross = torch.linalg.vecdot(self.log_probs.exp(), logits) - normaliser
        divergence = (-self.entropy - cross).clamp(min=0)
        scored = len(self.following)
        picked = logits[:scored].gather(-1, self.following[:, None])[:, 0] - normaliser[:scored]
        return divergence.cpu().double(), picked.cpu().double(), logits - normaliser[:, None]


def sampled_positions(ids: Sequence[int], most: int | None) -> tuple[int, ...]:
    """At most ``most`` positions of a text that another token follows, drawn by the text itself: the same anywhere.

    Where ``most`` is None or there are no more of them: all positions, the last one too.
    """
    if most is None or most >= len(ids) - 1:
        return tuple(range(len(ids)))
    digest = hashlib.blake2b(repr(tuple(map(int, ids))).encode(), digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
    return tuple(sorted(torch.randperm(len(ids) - 1, generator=generator)[:most].tolist()))


@dataclass
class NeutralText:
    """Texts on which the steered model is compared with the base.

    The base's distributions are kept between calls while they fit.

    Args:
        texts: token ids; texts of fewer than two tokens say nothing and are left out.
        memory: bytes that may be kept.
        positions: at how many positions of a text distributions are compared (:func:`sampled_positions`); None: at
            all. What stands for a text is then the mean over these, and the spread over texts holds the error of both.
    """

    texts: Sequence[Sequence[int]]
    memory: int = 0
    positions: int | None = None
    _kept: dict[tuple[int, ...], _Base] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.texts = [ids for ids in self.texts if len(ids) > 1]

    @property
    def tokens(self) -> int:
        """How many tokens the texts have."""
        return sum(len(ids) for ids in self.texts)

    def read(self, texts: int | None = None) -> list[Text]:
        """The first ``texts`` texts, with the positions at which they are compared."""
        return [Text(ids, sampled_positions(ids, self.positions)) for ids in self.texts[:texts]]

    def compared(self, texts: int | None = None) -> int:
        """At how many positions the first ``texts`` texts are compared."""
        return sum(len(text.read) for text in self.read(texts))

    def tokens_run(self, source: LogitsSource, texts: int | None = None) -> int:
        """How many tokens the batches of the first ``texts`` texts hold."""
        return tokens_run(source, self.read(texts), _ROWS)

    def damage(
        self,
        source: LogitsSource,
        variants: Sequence[Vectors],
        texts: int | None = None,
        contributions: Contributions | None = None,
    ) -> list[Damage]:
        """The damage of each variant, on the first ``texts`` texts.

        Logits are computed in the model's dtype; distributions are compared in fp32, sums are fp64.

        Args:
            contributions: of the last variant, which tokens make up its divergence from the base; filled.
        """
        chosen = self.read(texts)
        sizes = torch.tensor([len(text.ids) for text in chosen])
        kl = torch.zeros(len(variants), len(chosen), dtype=torch.float64)
        log_probs = torch.zeros(len(variants), len(chosen), dtype=torch.float64)
        # The base goes first where its distributions are not at hand. Of a few texts that are, and others that are
        # not, it is run on all: they share batches.
        known = all(tuple(text.ids) in self._kept for text in chosen)
        current: dict[int, _Base] = {}
        steered = [variant for variant, vectors in enumerate(variants) if vectors]
        run: list[int | None] = [*([] if known else [None]), *steered]

        def use(number: int, rows: Rows) -> None:
            variant = run[number]
            if variant is None:
                current.clear()
                for index, logits in rows:
                    current[index] = _Base.of(logits, chosen[index])
                    self._keep(tuple(chosen[index].ids), current[index])
                    log_probs[:, index] = current[index].predicted
                return
            for index, logits in rows:
                base = self._kept[tuple(chosen[index].ids)] if known else current[index]
                divergence, picked, after = base.compare(logits)
                kl[variant, index] = divergence.mean()
                log_probs[variant, index] = picked.mean()
                if contributions is not None and variant == len(variants) - 1:
                    contributions.add(base.log_probs, after)

        if known:
            kept = [self._kept[tuple(text.ids)].predicted for text in chosen]
            log_probs[:] = torch.tensor(kept, dtype=torch.float64)
        # What adds nothing is the base itself, and is not run again.
        # One call for everything: a base that is streamed from the disk is read once for each.
        run_texts(source, chosen, [{} if variant is None else variants[variant] for variant in run], _ROWS, use)
        return [Damage(kl[variant], log_probs[variant], sizes) for variant in range(len(variants))]

    def _keep(self, ids: tuple[int, ...], base: _Base) -> None:
        if ids not in self._kept and base.size + sum(kept.size for kept in self._kept.values()) <= self.memory:
            self._kept[ids] = base


def _numbers(logits: torch.Tensor) -> torch.Tensor:
    """A token that cannot be said has a logit of minus infinity, and 0 times that would be no number."""
    return logits.clamp(min=torch.finfo(torch.float32).min)
