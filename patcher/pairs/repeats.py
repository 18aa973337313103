"""Pairs that say the same: told by their content, so that no vector is measured on what it was made of.

Two pairs say the same where they have the same prompt or, without prompts, the same text on any side; where three
hang together by two of them, all three do. White space, case and Unicode's several spellings of a letter do not
count, and a question is the same with its options in another order (data sets after CAA ask each question with the
letters swapped as well).

What nearly all pairs have in common tells none of them from another: a side that more than half of them have
(ActAdd's constant " "), a prompt that more than nine tenths have (one frame before every continuation). It is passed
over; behind such a prompt the sides are compared. Pairs that are equal in all their parts are the same whatever they
share.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Literal

from patcher.pairs.pair import ContrastPair, Prompt

Key = tuple[Literal["pair", "prompt", "text"], Hashable]
Content = tuple[Key, Key, Key]
_MOST_THAT_TELL = {"prompt": 0.9, "text": 0.5}
_OPTION = re.compile(r"[(\[]([A-Za-z1-9])[)\]]|^[ \t]*(?:[-*•][ \t]*)?([A-Za-z1-9])[).:](?=\s)", re.MULTILINE)


def group_numbers(pairs: Sequence[ContrastPair]) -> list[int]:
    """For each pair, the number of its group: pairs that say the same have the same number."""
    return _numbered(_keys([_content(pair) for pair in pairs]))


def unseen(
    pairs: Sequence[ContrastPair], made_of: Sequence[ContrastPair], beside: Sequence[ContrastPair] = ()
) -> list[ContrastPair]:
    """The pairs that say nothing that one of ``made_of`` says too.

    Args:
        pairs: what a vector is to be measured on.
        made_of: what it is made of.
        beside: the rest of a data set that ``pairs`` come from, so that what most of it shares is seen as such.
    """
    if not made_of:
        return list(pairs)
    keys = _keys([_content(pair) for pair in (*pairs, *made_of, *beside)])
    taken = {key for one in keys[len(pairs) : len(pairs) + len(made_of)] for key in one}
    return [pair for pair, own in zip(pairs, keys, strict=False) if taken.isdisjoint(own)]


def repeats(pairs: Sequence[ContrastPair]) -> list[str]:
    """How many pairs say the same as another, and how many share one prompt that tells nothing, for people."""
    said = []
    contents = [_content(pair) for pair in pairs]
    keys = _keys(contents)
    prompts = Counter(prompt for prompt, _positive, _negative in contents if prompt[1])
    for prompt, count in prompts.most_common(1):
        if count > 1 and not any(prompt in one for one in keys):
            said.append(f"{count} of {len(pairs)} pairs have one prompt, so what tells them apart is their texts")
    sizes = [size for size in Counter(_numbered(keys)).values() if size > 1]
    if sizes:
        equal = sum(count for count in Counter(contents).values() if count > 1)
        groups = f"{len(sizes)} groups, the largest of {max(sizes)}" if len(sizes) > 1 else "one group"
        said.append(
            f"{sum(sizes)} of {len(pairs)} pairs have the prompt (or, without one, a text) of another"
            f"{f', {equal} of them the whole of it' if equal else ''}: {groups}; none may stand in two parts of the "
            "split"
        )
    return said


def _numbered(keys: Sequence[set[Key]]) -> list[int]:
    groups = list(range(len(keys)))

    def first_of(group: int) -> int:
        while groups[group] != group:
            groups[group] = groups[groups[group]]
            group = groups[group]
        return group

    seen: dict[Key, int] = {}
    for index, own in enumerate(keys):
        for key in own:
            one, other = first_of(seen.setdefault(key, index)), first_of(index)
            groups[max(one, other)] = min(one, other)
    return [first_of(index) for index in range(len(keys))]


def _keys(contents: Sequence[Content]) -> list[set[Key]]:
    """What each pair says that tells it from others: pairs that have one of these in common say the same."""
    distinct = set(contents)
    counts = Counter(key for content in distinct for key in set(content))

    def tells(key: Key) -> bool:
        return bool(key[1]) and counts[key] <= _MOST_THAT_TELL[key[0]] * len(distinct)

    def keys(content: Content) -> set[Key]:
        prompt, *sides = content
        return {("pair", content), *([prompt] if tells(prompt) else filter(tells, sides))}

    return [keys(content) for content in contents]


def _content(pair: ContrastPair) -> Content:
    """The prompt and both sides, without what does not count."""
    prompt = _prompt_content(pair.prompt) if pair.prompt else ()
    if pair.image is not None:
        prompt = (("image", pair.image.digest), *prompt)
    return ("prompt", prompt), ("text", _normal(pair.positive)), ("text", _normal(pair.negative))


def _prompt_content(prompt: Prompt) -> tuple[tuple[str, Hashable], ...]:
    if isinstance(prompt, str):
        return (("user", _question(prompt)),)
    return tuple((turn.role, _question(turn.content)) for turn in prompt)


def _question(text: str) -> Hashable:
    """The text, or of one with options the sorted lines: without the letters, so that any order is the same."""
    letters = [(first or second).casefold() for first, second in _OPTION.findall(text)]
    if len(letters) < 2 or letters not in (list("abcdefghi")[: len(letters)], list("123456789")[: len(letters)]):
        return _normal(text)
    return tuple(sorted(filter(None, map(_normal, _OPTION.sub("\n", text).splitlines()))))


def _normal(text: str) -> str:
    return " ".join((text if text.isascii() else unicodedata.normalize("NFKC", text)).casefold().split())
