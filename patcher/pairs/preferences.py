"""From the values of a row to a contrast pair: texts, message lists, and the turns that both sides share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from patcher.pairs.columns import Form, value_at
from patcher.pairs.messages import (
    as_prompt,
    check_turns,
    has_image,
    has_reasoning,
    is_conversation,
    read_conversation,
    read_dialogue,
)
from patcher.pairs.pair import SIDES, ContrastPair, Prompt, Record, Turn
from patcher.pairs.problems import LeftOver, RowProblem, require_text, shown
from patcher.pairs.unknown_columns import keys_of

Said = str | tuple[Turn, ...]
"""What a column holds: a text, or the turns of a conversation."""

DIALOGUES = (
    "texts of Human and Assistant are read as the turns of a conversation; `format: pairs` takes them as they are"
)
WRITTEN_OUT = "lists of messages that stand in the file as texts are read as messages"
SHARED = "the turns that both sides share are the prompt"
OTHER_PROMPT = "rows whose `{prompt}` is not among the turns that both sides share: those turns are the prompt"
REASONING = "the reasoning that messages hold beside their contents is not used"
IN_FRONT = "the image of a conversation stands at the front of the user's first turn, wherever its messages mark it"
REPEATED = "both sides repeat the prompt, and what follows it is used"


def pair_of(row: Record, form: Form, *, dialogues: bool, notes: dict[str, int]) -> ContrastPair:
    """The contrast pair of a row.

    A side is a text, or a conversation that ends with the assistant's answer (preference data, as TRL describes it);
    the turns before that answer are shared by both sides, and are the prompt.

    Args:
        form: how it is read.
        dialogues: whether texts of Human and Assistant are conversations.
        notes: what was done, and to how many rows; added to.

    Raises:
        LeftOver: the row is preference data without a contrast.
        RowProblem: the row cannot be used.
    """
    values = {key: _value(row, column, key in form.optional) for key, column in form.columns.items()}
    if form.judge:
        values = _judged(row, form, values)
    if any(isinstance(value, str) and is_conversation(value) for value in values.values()):
        notes[WRITTEN_OUT] = notes.get(WRITTEN_OUT, 0) + 1
    if any(has_reasoning(value) for value in values.values()):
        notes[REASONING] = notes.get(REASONING, 0) + 1
    if form.image is not None and any(has_image(value) for value in values.values()):
        notes[IN_FRONT] = notes.get(IN_FRONT, 0) + 1
    for key, value in values.items():
        may_lack, image = key in ("prompt", "system"), form.image is not None
        values[key] = _said(value, form.columns[key], row.origin, may_lack, image)
    if dialogues:
        values = _with_dialogues(values, notes)
    prompt, positive, negative = _joined(values, form, row.origin, notes)
    if values.get("system"):
        prompt = _with_system(_text_of(values["system"]), prompt)
    if isinstance(prompt, tuple):
        check_turns(prompt, "the prompt", row.origin)
        prompt = as_prompt(prompt)
    if form.preference and positive.strip() == negative.strip():
        raise LeftOver("both sides are the same", row.origin, shown(positive))
    return ContrastPair(prompt or None, positive, negative, row.origin)


def without_repeated_prompts(pairs: Sequence[ContrastPair]) -> list[ContrastPair] | None:
    """The pairs without the prompt at the front of both sides, if every pair repeats it there; else None."""
    found = []
    for pair in pairs:
        prompt = pair.prompt
        if not isinstance(prompt, str) or not (pair.positive.startswith(prompt) and pair.negative.startswith(prompt)):
            return None
        rest = {side: getattr(pair, side)[len(prompt) :] for side in SIDES}
        found.append(replace(pair, **rest))
    return found


def text_at(row: Record, column: str) -> str:
    """The text that a row holds in a column.

    Raises:
        RowProblem: it holds none.
    """
    found = _said(_value(row, column, False), column, row.origin, False)
    if not isinstance(found, str):
        raise RowProblem(f"`{column}` is not text", row.origin, "a list of messages")
    return found


def _value(row: Record, column: str, optional: bool) -> Any:
    try:
        value = value_at(row.values, column)
    except KeyError:
        if optional:
            return None
        raise RowProblem(f"the key `{column}` is missing", row.origin, keys_of(row.values)) from None
    # NumPy's arrays and numbers, as a data set may give them.
    return value.tolist() if hasattr(value, "tolist") and not isinstance(value, str) else value


def _said(value: Any, column: str, origin: str, may_lack: bool, image: bool = False) -> Said | None:
    if may_lack and (value is None or (isinstance(value, float) and math.isnan(value))):
        return None
    if is_conversation(value):
        return read_conversation(value, column, origin, image=image)
    remedy = f"name one member of it in `columns`: `{column}.0`" if isinstance(value, list) and value else None
    return require_text(value, f"`{column}`", origin, remedy)


def _judged(row: Record, form: Form, values: Mapping[str, Any]) -> dict[str, Any]:
    assert form.judge is not None
    column, better = form.judge
    value = _value(row, column, False)
    first_is_better = better(value)
    if first_is_better is None:
        raise LeftOver(f"`{column}` prefers neither side", row.origin, shown(value))
    sides = [values["positive"], values["negative"]]
    return {**values, **dict(zip(SIDES, sides if first_is_better else sides[::-1], strict=True))}


def _with_dialogues(values: Mapping[str, Any], notes: dict[str, int]) -> dict[str, Any]:
    """Both sides as turns if both are texts of Human and Assistant, and so the prompt."""
    read = {key: read_dialogue(value) for key, value in values.items() if isinstance(value, str) and key != "system"}
    found = dict(values)
    if read.get("positive") and read.get("negative"):
        found |= {key: turns for key, turns in read.items() if turns}
    elif read.get("prompt"):
        found["prompt"] = read["prompt"]
    if found != values:
        notes[DIALOGUES] = notes.get(DIALOGUES, 0) + 1
    return found


def _joined(
    values: Mapping[str, Any], form: Form, origin: str, notes: dict[str, int]
) -> tuple[Prompt | None, str, str]:
    prompt, positive, negative = values.get("prompt"), values["positive"], values["negative"]
    if isinstance(prompt, tuple) and len(prompt) > 1 and prompt[-1].role == "assistant" and not prompt[-1].content:
        # The turn that the sides are to fill.
        prompt = prompt[:-1]
    if isinstance(positive, str) and isinstance(negative, str):
        return prompt, positive, negative
    if isinstance(positive, str) or isinstance(negative, str):
        raise LeftOver("one side is a text, the other a list of messages", origin)
    shared = 0
    while shared < min(len(positive), len(negative)) - 1 and positive[shared] == negative[shared]:
        shared += 1
    front, answers = positive[:shared], (positive[shared:], negative[shared:])
    if any(len(rest) != 1 for rest in answers):
        message = "the two sides differ in more than the last answer, so no prompt is shared by them"
        raise LeftOver(message, origin, f"{len(positive)} and {len(negative)} turns, the first {shared} shared")
    texts = [_answer(rest[0], form.columns[side], origin) for rest, side in zip(answers, SIDES, strict=True)]
    if front:
        notes[SHARED] = notes.get(SHARED, 0) + 1
    return _front(prompt, front, form, origin, notes), texts[0], texts[1]


def _front(
    prompt: Said | None, front: tuple[Turn, ...], form: Form, origin: str, notes: dict[str, int]
) -> Prompt | None:
    """The prompt of a row, whose own may be repeated by the turns that both sides share."""
    if not prompt or not front:
        return prompt or front or None
    if isinstance(prompt, tuple):
        if front[: len(prompt)] == prompt:
            return front
        for first, second in ((front, prompt), (prompt, front)):
            if all(turn.role == "system" for turn in first) and second[0].role != "system":
                return (*first, *second)
        raise LeftOver("the sides begin with other turns than the prompt", origin)
    asked = [turn.content.strip() for turn in front if turn.role == "user"]
    if not asked:
        return (*front, Turn("user", prompt))
    if not any(text in prompt or prompt.strip() in text for text in asked):
        note = OTHER_PROMPT.format(prompt=form.columns["prompt"])
        notes[note] = notes.get(note, 0) + 1
    return front


def _answer(turn: Turn, column: str, origin: str) -> str:
    if turn.role != "assistant":
        message = f"`{column}` does not end with an answer of the assistant"
        raise LeftOver(message, origin, f"{turn.role}: {shown(turn.content)}")
    return turn.content


def _with_system(system: str, prompt: Prompt | None) -> Prompt | None:
    turns = (Turn("user", prompt),) if isinstance(prompt, str) else prompt or ()
    return turns if turns and turns[0].role == "system" else (Turn("system", system), *turns)


def _text_of(said: Said) -> str:
    return said if isinstance(said, str) else "\n\n".join(turn.content for turn in said)
