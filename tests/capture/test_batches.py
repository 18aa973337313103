"""Batches hold every token of every prompt once where it is shared, and little that only fills up."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import pytest

from patcher.capture.batches import Batch, make_batches, plain_rows, shared_rows, side_by_side

LINEAR_TOKENS = 2770.0
"""Of Qwen2-0.5B."""


@dataclass(frozen=True)
class Prompt:
    ids: tuple[int, ...]
    read: tuple[int, ...]


def pairs(count: int, shortest: int, longest: int, seed: int) -> list[Prompt]:
    """Both sides of pairs that differ in the last two tokens but one."""
    draw, made = random.Random(seed), []
    for _ in range(count):
        asked = tuple(draw.randrange(5, 9999) for _ in range(draw.randint(shortest, longest) - 2))
        made += [Prompt((*asked, letter, 1), (len(asked),)) for letter in (3, 4)]
    return made


def size(batches: list[Batch]) -> int:
    return sum(batch.shape[0] * batch.shape[1] for batch in batches)


@pytest.mark.parametrize(("count", "shortest", "longest"), [(12, 60, 200), (40, 50, 70), (40, 61, 61), (200, 20, 300)])
@pytest.mark.parametrize(
    ("budget", "linear", "most"), [(512, LINEAR_TOKENS, 1.04), (4096, LINEAR_TOKENS, 1.08), (512, math.inf, 1.03)]
)
def test_little_is_filled_up(count: int, shortest: int, longest: int, budget: int, linear: float, most: float) -> None:
    for seed in range(5):
        prompts = pairs(count, shortest, longest, seed)
        rows = shared_rows(prompts, linear_tokens=LINEAR_TOKENS, longest=budget)
        packed = side_by_side(rows, linear_tokens=linear, longest=budget, token_budget=budget)
        batches = list(make_batches(packed, prompts, token_budget=budget))
        tokens = sum(len(row.ids) for row in rows)
        assert tokens == sum(len(row.ids) for row in packed) and tokens <= 0.56 * sum(len(one.ids) for one in prompts)
        assert size(batches) <= most * tokens
        assert all(batch.shape[0] * batch.shape[1] <= budget for batch in batches)
        found = {place.prompt: batch.inputs["input_ids"][place.row] for batch in batches for place in batch.places}
        places = {place.prompt: place for batch in batches for place in batch.places}
        for number, prompt in enumerate(prompts):
            row, place = found[number], places[number]
            assert row[list(place.columns)].tolist() == [prompt.ids[at] for at in prompt.read]
            assert row[list(place.counted)].tolist() == list(prompt.ids[1:])


def test_a_batch_holds_rows_within_the_budget_and_one_at_least() -> None:
    prompts = [Prompt(tuple(range(3, 3 + length)), (0,)) for length in (5, 50, 7, 20, 21)]
    shapes = [batch.shape for batch in make_batches(plain_rows(prompts), prompts, token_budget=42)]
    assert shapes == [(1, 50), (2, 21), (2, 7)]
    shapes = [batch.shape for batch in make_batches(plain_rows(prompts), prompts, token_budget=42, most_rows=1)]
    assert shapes == [(1, 50), (1, 21), (1, 20), (1, 7), (1, 5)]
