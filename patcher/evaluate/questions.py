"""From held-out pairs to what is asked of the model."""

from __future__ import annotations

from typing import Any

from patcher.evaluate.held_out import Option, Question
from patcher.pairs import ContrastPair, tokenise_continuation
from patcher.recipe.schema import VectorSpec


def build_question(pair: ContrastPair, tokenizer: Any, spec: VectorSpec) -> Question:
    """What a held-out pair asks: its positive side first, then its negative one, then any other offered answer."""
    others = [choice for choice in pair.choices if choice not in (pair.positive, pair.negative)]
    others = [pair.negative, *others]
    options = []
    for text in (pair.positive, *others):
        ids, start = tokenise_continuation(pair.prompt, text, tokenizer, spec)
        options.append(Option(tuple(ids), start))
    return Question(tuple(options), lettered=pair.format == "ab")
