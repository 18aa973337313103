"""What the model writes under each of several steering vectors, and what can be counted in it."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from patcher.capture.forward import row_vectors, steering_hooks
from patcher.evaluate.scoring import Vectors
from patcher.recipe.vector import GenerateSpec
from patcher.vectors.responses import generate_responses


@dataclass(frozen=True)
class Generation:
    """One continuation of a prompt.

    Attributes:
        ids: its tokens, up to the one that ends the text and without that; may be empty.
        text: the same as text, special tokens left out.
    """

    ids: tuple[int, ...]
    text: str

    @property
    def distinct_1(self) -> float:
        """See :func:`distinct`, of single tokens."""
        return distinct(self.ids, 1)

    @property
    def distinct_2(self) -> float:
        """See :func:`distinct`, of pairs of tokens."""
        return distinct(self.ids, 2)

    @property
    def repetition(self) -> float:
        """See :func:`repetition`."""
        return repetition(self.ids)


def generate_under(
    model: nn.Module,
    blocks: str,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    variants: Sequence[Vectors],
    spec: GenerateSpec,
    *,
    seed: int,
    where: str,
    length_key: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[list[Generation]]:
    """Let the stock ``generate`` continue each prompt under each variant, which is added at every position.

    All variants of a prompt are rows of one batch, padded on the left, so that the weights are read once for all of
    them. They share the noise that decides what is drawn (Gumbel-max), so that where two of them agree on the
    probabilities they draw the same tokens.

    Args:
        model: a causal LM in eval mode.
        blocks: path of its list of decoder blocks.
        tokenizer: its tokenizer.
        prompts: token ids, special tokens included.
        variants: layer -> [hidden] each; ``{}`` is the base.
        spec: how long, how warm (temperature 0: greedy) and how many prompts at a time; ``samples`` is not used.
        seed: of the sampling; the random state of the process is left as it was.
        where: the recipe's entry, for errors.
        length_key: see :func:`patcher.vectors.responses.generate_responses`.
        progress: called with the number of continuations after each variant.

    Returns:
        For each variant, for each prompt.

    Raises:
        InputError: prompt and continuation do not fit the model's positions, or the model cannot generate.
        OutsideError: not enough memory.
    """
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    written = [[Generation((), "")] * len(prompts) for _ in variants]
    for start in range(0, len(order), spec.batch_size):
        chosen = order[start : start + spec.batch_size]
        # From short to long, so that the rows stay in this order.
        rows = [prompts[index] for index in chosen for _ in variants]
        added = {layer: vectors.repeat(len(chosen), 1, 1) for layer, vectors in row_vectors(variants).items()}
        greedy = spec.model_copy(update={"batch_size": len(rows), "temperature": 0.0})
        noise = [_SharedNoise(spec.temperature, len(variants), seed + start)] if spec.temperature else []
        with steering_hooks(model, blocks, added):
            found = generate_responses(
                model, tokenizer, rows, greedy, seed=seed, where=where, length_key=length_key, processors=noise
            )
        for row, ids in enumerate(found):
            written[row % len(variants)][chosen[row // len(variants)]] = Generation(ids, _text(ids, tokenizer))
    if progress is not None:
        for number in range(1, len(variants) + 1):
            progress(number * len(prompts))
    return written


class _SharedNoise:
    """A logits processor: the likeliest token of the noisy scores is one drawn at a temperature (Gumbel-max).

    The variants of a prompt, which stand one below the other, get the same noise.
    """

    def __init__(self, temperature: float, variants: int, seed: int) -> None:
        self.temperature, self.variants = temperature, variants
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """[rows, vocabulary] -> the same."""
        shape = len(scores) // self.variants, scores.shape[-1]
        noise = -torch.empty(shape).exponential_(generator=self.generator).log()
        return scores / self.temperature + noise.repeat_interleave(self.variants, dim=0).to(scores.device)


def distinct(tokens: Sequence[Hashable], n: int) -> float:
    """The fraction of n-grams that are different (Li et al. 2016, there over all tokens); 1 where there is none.

    It falls as a text grows: compare texts of one length.
    """
    grams = [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def repetition(tokens: Sequence[Hashable]) -> float:
    """The fraction of 4-grams that were there before: seq-rep-4 of Welleck et al. 2020; 0 for fewer than 4 tokens."""
    return 1.0 - distinct(tokens, 4)


def word_counts(text: str, words: Sequence[str]) -> dict[str, int]:
    """How often each word stands in the text, as a whole word, in capitals or not (as the ActAdd post counts).

    `wed` is not in `wedding`; an entry of several words is found with any white space between them.
    """
    counts = {}
    for word in words:
        parts = r"\s+".join(re.escape(part) for part in word.split())
        counts[word] = len(re.findall(rf"(?<!\w){parts}(?!\w)", text, re.IGNORECASE)) if parts else 0
    return counts


def _text(ids: Sequence[int], tokenizer: Any) -> str:
    text: str = tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text
