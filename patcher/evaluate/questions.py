"""From held-out pairs and open-ended prompts to what is asked of the model, also under a system prompt as a control."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from patcher.evaluate.held_out import Option, Question
from patcher.pairs.encoding import TextEncoder
from patcher.pairs.image_prompts import ImagePrompts
from patcher.pairs.pair import ContrastPair, Prompt
from patcher.pairs.tokens import encoded_sides, tokenise_question
from patcher.recipe.vector import VectorSpec


def build_question(
    pair: ContrastPair, tokenizer: Any, spec: VectorSpec, images: ImagePrompts | None = None
) -> Question:
    """What a held-out pair asks: its positive side first, then its negative one, then any other offered answer.

    Sides that the model wrote are measured on the very ids that it wrote, after the question as it was asked.

    Args:
        images: reads pairs with images, where there are such.
    """
    if pair.written is not None and pair.prompt is not None:
        asked = tokenise_question(pair.prompt, tokenizer, spec)
        return Question(tuple(Option(asked + ids, len(asked)) for ids in pair.written), lettered=False)
    others = [choice for choice in pair.choices if choice not in (pair.positive, pair.negative)]
    answers = [pair.positive, pair.negative, *others]
    encoder = TextEncoder(tokenizer, spec, images)
    sides = encoded_sides(pair.prompt, answers, tokenizer, spec, encoder, pair.image, images)
    options = tuple(Option(side.ids, side.encoded.continuation_start, side.encoded.image) for side in sides)
    return Question(options, lettered=pair.format == "ab")


def questions_with_prompt(
    pairs: Sequence[ContrastPair],
    tokenizer: Any,
    spec: VectorSpec,
    system_prompt: str | None,
    images: ImagePrompts | None = None,
) -> list[Question]:
    """What held-out pairs ask under a system prompt, which takes the place of the vector's own.

    Measured under no vector it is prompting alone, under the vector prompting plus steering: the
    comparison of CAA (Rimsky et al. 2024), where the two add up.

    Raises:
        InputError: the model's chat template takes no system prompt.
    """
    prompted = spec.model_copy(update={"system_prompt": system_prompt})
    alone = [replace(pair, prompt=_without_system(pair.prompt)) for pair in pairs]
    return [build_question(pair, tokenizer, prompted, images) for pair in alone]


def _without_system(prompt: Prompt | None) -> Prompt | None:
    """A conversation without the system turn that it brings."""
    return prompt[1:] if isinstance(prompt, tuple) and prompt[0].role == "system" else prompt


def encode_prompts(
    prompts: Sequence[str], tokenizer: Any, spec: VectorSpec, system_prompt: str | None = None
) -> list[tuple[int, ...]]:
    """The ids of open-ended prompts, ready to be continued, rendered as the vector's pairs are.

    Args:
        system_prompt: takes the place of the vector's own, None too.

    Raises:
        InputError: the model's chat template takes no system prompt.
    """
    prompted = spec.model_copy(update={"system_prompt": system_prompt})
    return [tokenise_question(prompt, tokenizer, prompted) for prompt in prompts]
