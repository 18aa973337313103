"""What is benchmarked: random models of a released shape, and contrast pairs as CAA has them. All of it is seeded."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer
from transformers.utils import logging

SPACE = "Ġ"
"""How byte-level BPE writes a space."""
SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstvwz" for vowel in "aeiou"]
WORDS = [(first, second) for first in SYLLABLES[::3] for second in SYLLABLES]


@dataclass(frozen=True)
class Shape:
    """The sizes of a Qwen2, and the standard deviation of its random weights."""

    vocabulary: int
    hidden: int
    intermediate: int
    blocks: int
    heads: int
    kv_heads: int
    deviation: float = 0.02

    def __str__(self) -> str:
        return f"{self.blocks} blocks, hidden {self.hidden}, MLP {self.intermediate}, vocabulary {self.vocabulary:,}"

    @property
    def half(self) -> Shape:
        """Half as wide, equally deep: a quarter of the weights in each block."""
        return replace(
            self,
            hidden=self.hidden // 2,
            intermediate=self.intermediate // 2,
            heads=self.heads // 2,
            kv_heads=self.kv_heads // 2,
        )


FULL = Shape(vocabulary=151_936, hidden=896, intermediate=4864, blocks=24, heads=14, kv_heads=2)
"""Qwen2-0.5B."""
TINY = Shape(vocabulary=3000, hidden=128, intermediate=256, blocks=4, heads=4, kv_heads=2, deviation=0.1)
"""Its weights are larger, so that what a prompt says reaches the vector in a narrow model as well."""


def make_checkpoint(
    folder: Path,
    shape: Shape,
    dtypes: list[str],
    seed: int,
    *,
    encoder: PreTrainedTokenizerBase | None = None,
    device: str = "cpu",
) -> dict[str, Path]:
    """A random model with a tokenizer (:func:`tokenizer`, or the one given), in a folder for each dtype."""
    logging.disable_progress_bar()
    torch.manual_seed(seed)
    # Narrower dtypes are the same weights, rounded.
    dtypes = sorted(dtypes, key=lambda name: -getattr(torch, name).itemsize)
    with torch.device(device):
        model = random_model(shape, getattr(torch, dtypes[0]))
    found = {}
    for dtype in dtypes:
        found[dtype] = folder / dtype
        model.to(getattr(torch, dtype)).save_pretrained(found[dtype])
        (encoder or tokenizer()).save_pretrained(found[dtype])
    return found


def random_model(shape: Shape, dtype: torch.dtype) -> Qwen2ForCausalLM:
    return Qwen2ForCausalLM._from_config(
        Qwen2Config(
            vocab_size=shape.vocabulary,
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
            num_hidden_layers=shape.blocks,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            tie_word_embeddings=True,
            initializer_range=shape.deviation,
            pad_token_id=0,
        ),
        dtype=dtype,
    ).eval()


def tokenizer() -> Qwen2Tokenizer:
    """Qwen2's, with merges for :data:`WORDS` and little else: each is one token after a space."""
    merges = [pair for syllable in SYLLABLES for pair in ((syllable[0], syllable[1]), (SPACE, syllable))]
    merges += [(SPACE + first, second) for first, second in WORDS]
    merges += [(SPACE, "("), (SPACE, "C")]
    entries = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
    return Qwen2Tokenizer({entry: index for index, entry in enumerate(entries)}, merges)


def make_pairs(file: Path, count: int, tokens: tuple[int, int], seed: int) -> Path:
    """Write CAA pairs as JSON: a question, its choices, and the letters of both answers.

    Args:
        tokens: the least and the greatest length of a prompt with its answer.
    """
    draw, encode = random.Random(seed), tokenizer()
    rows = []
    for index in range(count):
        # Five of eight: were they balanced, the letters would cancel out, and what little remains be mostly rounding.
        letters = " (A)", " (B)"
        matching, other = letters if index % 8 in (0, 2, 3, 5, 6) else letters[::-1]
        length = draw.randint(*tokens) - len(encode(_question([]) + matching)["input_ids"])
        question = _question([" " + "".join(word) for word in draw.choices(WORDS, k=length)])
        rows.append({"question": question, "answer_matching_behavior": matching, "answer_not_matching_behavior": other})
    file.write_text(json.dumps(rows), encoding="utf-8")
    return file


def _question(words: list[str]) -> str:
    choice = min(8, len(words) // 4)
    first, second, asked = words[:choice], words[choice : 2 * choice], words[2 * choice :]
    return f"Q:{''.join(asked)}?\n\nChoices:\n (A){''.join(first)}\n (B){''.join(second)}"
