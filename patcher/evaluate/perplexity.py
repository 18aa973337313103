"""Perplexity of sentences under each of several steering vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from patcher.capture.logits import LogitsSource
from patcher.evaluate.scoring import Vectors, mean_log_probs


@dataclass(frozen=True)
class SentencePerplexities:
    """How well sentences are predicted, each on its own.

    Attributes:
        surprises: [variants, sentences], fp64: the mean negative log-probability of a sentence's tokens, nats a token.
        tokens: [sentences], int64: how many tokens of each were scored.
    """

    surprises: torch.Tensor
    tokens: torch.Tensor

    def per_sentence(self) -> torch.Tensor:
        """exp of a sentence's mean negative log-probability a token, [variants, sentences]."""
        return self.surprises.exp()

    def mean(self) -> torch.Tensor:
        """The mean of the sentences' perplexities, [variants]; a few strange sentences can rule it."""
        return self.per_sentence()[:, self.tokens > 0].mean(dim=1)

    def overall(self) -> torch.Tensor:
        """exp of the mean negative log-probability over all tokens of all sentences, [variants], as the post has it."""
        return ((self.surprises * self.tokens).sum(dim=1) / self.tokens.sum()).exp()


def sentence_perplexities(
    source: LogitsSource, sentences: Sequence[Sequence[int]], variants: Sequence[Vectors], batch_size: int
) -> SentencePerplexities:
    """Score every sentence on its own, with nothing before it but the token that begins a text.

    So does the ActAdd post (Turner et al. 2023, quantitative part). Its essays are cut into sentences, and each is run
    alone after GPT-2's `<|endoftext|>`. Its ratio of perplexities is exp of minus the change of the mean
    log-probability over all tokens of all sentences: ``overall()[steered] / overall()[base]``. No sentence and no token
    is left out. (The post leaves out the first tokens, on which its vectors lie; here they lie on all.)

    Args:
        source: the base model.
        sentences: token ids, from :func:`patcher.evaluate.texts.encode_texts`. The first token of each, which begins
            the text, is not scored; a sentence of that token alone has 0 scored tokens and counts nowhere.
        variants: layer -> [hidden] each.
        batch_size: most rows in a batch.
    """
    means = mean_log_probs(source, sentences, [1] * len(sentences), variants, batch_size)
    return SentencePerplexities(-means, torch.tensor([max(0, len(ids) - 1) for ids in sentences]))
