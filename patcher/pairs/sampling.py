"""Which pairs are used: seeded samples, the held-out split, and the balance of the answers."""

from __future__ import annotations

import random
from collections.abc import Sequence

from patcher.pairs.pair import ContrastPair

MINIMUM_TO_HOLD_OUT = 10
LARGEST_FRACTION_OF_AN_ANSWER = 0.6


def sample_pairs(pairs: Sequence[ContrastPair], limit: int | None, seed: int) -> list[ContrastPair]:
    """A sample of at most ``limit`` pairs, in their original order.

    ``ab`` pairs are taken as equally often as possible from each matching answer, so that the vector does not come
    to mean a letter; other pairs uniformly. The same seed gives the same sample.
    """
    if limit is None or limit >= len(pairs):
        return list(pairs)
    rng = random.Random(seed)
    queues = _shuffled_groups(pairs, rng)
    rng.shuffle(queues)  # which answer gets the odd pair must not depend on its name
    chosen: list[int] = []
    while len(chosen) < limit:
        for queue in queues:
            if queue and len(chosen) < limit:
                chosen.append(queue.pop())
    return [pairs[index] for index in sorted(chosen)]


def split_held_out(
    pairs: Sequence[ContrastPair], fraction: float, seed: int
) -> tuple[list[ContrastPair], list[ContrastPair]]:
    """Split into (used, held out), each in original order.

    ``round(fraction * n)`` pairs are held out, at least one is used, and fewer than ten pairs are not split at all.
    ``ab`` pairs are drawn so that each matching answer has the same fraction in both parts as it has in the whole.
    The same seed gives the same split.
    """
    wanted = min(round(fraction * len(pairs)), len(pairs) - 1)
    if len(pairs) < MINIMUM_TO_HOLD_OUT or wanted <= 0:
        return list(pairs), []
    groups = _shuffled_groups(pairs, random.Random(seed))
    # Largest remainders, in whole numbers: the counts then add up to exactly what is wanted.
    quotas = [divmod(wanted * len(group), len(pairs)) for group in groups]
    counts = [whole for whole, _ in quotas]
    by_remainder = sorted(range(len(groups)), key=lambda group: -quotas[group][1])
    for group in by_remainder[: wanted - sum(counts)]:
        counts[group] += 1
    held = {index for group, count in zip(groups, counts, strict=True) for index in group[:count]}
    used = [pair for index, pair in enumerate(pairs) if index not in held]
    return used, [pair for index, pair in enumerate(pairs) if index in held]


def letter_imbalance(pairs: Sequence[ContrastPair]) -> str | None:
    """A warning when one matching answer has more than 60 % of the ``ab`` pairs, else None."""
    answers = [pair.positive for pair in pairs if pair.format == "ab"]
    counts: dict[str, int] = {}
    for answer in answers:
        key = normalised_answer(answer)
        counts[key] = counts.get(key, 0) + 1
    if not counts:
        return None
    top = max(counts, key=lambda key: counts[key])
    if counts[top] <= LARGEST_FRACTION_OF_AN_ANSWER * len(answers):
        return None
    spelled = next(answer.strip() for answer in answers if normalised_answer(answer) == top)
    return (
        f"{counts[top]} of {len(answers)} pairs ({counts[top] / len(answers):.0%}) have {spelled} as the matching "
        "answer, so the vector may mean that answer rather than the behaviour; set `limit` to use a balanced sample"
    )


def normalised_answer(answer: str) -> str:
    """The answer without case, whitespace, brackets and punctuation at its ends: ``" (A)"`` is ``"a"``."""
    start, end = 0, len(answer)
    while start < end and not answer[start].isalnum():
        start += 1
    while end > start and not answer[end - 1].isalnum():
        end -= 1
    return answer[start:end].casefold() or answer.strip()


def _shuffled_groups(pairs: Sequence[ContrastPair], rng: random.Random) -> list[list[int]]:
    groups: dict[str, list[int]] = {}
    for index, pair in enumerate(pairs):
        groups.setdefault(normalised_answer(pair.positive) if pair.format == "ab" else "", []).append(index)
    ordered = [groups[key] for key in sorted(groups)]
    for group in ordered:
        rng.shuffle(group)
    return ordered
