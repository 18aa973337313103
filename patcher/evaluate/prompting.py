"""Prompting as a control: what a system prompt does alone, and what steering adds to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from patcher.evaluate.held_out import Question
from patcher.evaluate.questions import build_question
from patcher.pairs import ContrastPair, tokenise_continuation
from patcher.recipe.schema import VectorSpec


def questions_with_prompt(
    pairs: Sequence[ContrastPair], tokenizer: Any, spec: VectorSpec, system_prompt: str | None
) -> list[Question]:
    """What held-out pairs ask under a system prompt, which takes the place of the vector's own.

    Measured under no vector it is prompting alone, under the vector prompting plus steering: the
    comparison of CAA (Rimsky et al. 2024), where the two add up.

    Raises:
        InputError: the model's chat template takes no system prompt.
    """
    prompted = spec.model_copy(update={"system_prompt": system_prompt})
    return [build_question(pair, tokenizer, prompted) for pair in pairs]


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
    return [tuple(tokenise_continuation(prompt, "", tokenizer, prompted)[0]) for prompt in prompts]
