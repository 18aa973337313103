"""The text that opens the assistant's turn, chosen so that it is the same before every continuation of a prompt.

A chat template knows two: what it puts before an answer that is there, and the generation prompt, after which the model
answers. They differ where a model thinks. R1 distillations open `<think>` in the generation prompt and cut thoughts out
of answers; Qwen3 puts an empty pair of tags before an answer without thoughts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from patcher.errors import InputError
from patcher.pairs.problems import shown
from patcher.pairs.templates import (
    Message,
    Reading,
    TemplateFailed,
    apply_template,
    holds,
    thinking_switches,
)

_NAMES = "(?:seed:)?(?:think|thinking|thought|reasoning)"
_OPEN = re.compile(
    rf"<{_NAMES}>|\[THINK\]|◁think▷|<\|START_THINKING\|>|<\|begin_of_thought\|>|<\|channel\|>(?:analysis|commentary)"
)
_CLOSE = re.compile(rf"</{_NAMES}>|\[/THINK\]|◁/think▷|<\|END_THINKING\|>|<\|end_of_thought\|>|<\|channel\|>final")
_PROBE = "Seven Words, and no More, Answer This"
_TAG = re.compile(r"[<\[◁]")
_TAIL = 200
"""Characters: longer than any tag or role that ends a header."""


def thinks(answer: str) -> bool:
    """Whether an answer holds thoughts: it begins with the tag that opens them, or has the one that closes them."""
    return bool(_OPEN.match(answer.strip()) or _CLOSE.search(answer.strip(), 1))


def ends_thoughts(text: str) -> bool:
    """Whether a text ends thoughts, such as an empty pair of tags does."""
    return bool(_CLOSE.search(text))


def is_unfinished(text: str) -> bool:
    """Whether thoughts are begun in a text and not ended."""
    opened = max((match.start() for match in _OPEN.finditer(text)), default=-1)
    return opened > max((match.start() for match in _CLOSE.finditer(text)), default=-1)


def common_header(
    messages: Sequence[Message],
    question: str,
    answers: Sequence[str],
    tokenizer: Any,
    reading: Reading,
    where: str,
) -> str:
    """What stands before each of ``answers``, the conversation included.

    - Where no answer holds thoughts and the template leaves all of them as they are: what it puts before an answer.
    - Else neither gets that: the shorter of it and the generation prompt, where one begins with the other, or the
      generation prompt. A tag that opens thoughts at its end is left out, since the answers bring their own.
    - Where every answer goes on with thoughts that the generation prompt began: the generation prompt.

    Args:
        messages: what is asked.
        question: the same through the template, to the end of the generation prompt.
        answers: stripped; may be empty.
        where: the recipe's entry, for errors.

    Raises:
        InputError: the answers hold thoughts that no header of the template leaves room for, or repeat the header.
    """
    opened = _opened(messages, tokenizer, reading)
    given = [answer for answer in answers if answer]
    held = [answer for answer in given if thinks(answer)]
    if given and not held and opened is not None and _all_kept(messages, given, opened, tokenizer, reading):
        header = opened
    else:
        begun = [answer for answer in held if _goes_on(answer)]
        header = _thinking_header(question, begun, given, where) if begun else _bare(question, opened)
        if held and not begun:
            header = _up_to_thoughts(messages, held[0], header, tokenizer, reading)
            _require_room(header, messages, tokenizer, where, held[0])
        _require_form(header, opened, given, where)
    for answer in given:
        _require_once(header, answer, where)
    return header


def _opened(messages: Sequence[Message], tokenizer: Any, reading: Reading) -> str | None:
    """What the template puts before an answer; None where it does not keep answers as they are, or where it then leaves
    out the system turn, as those do that put it before the last turn alone, if that is the user's."""
    text = _answered(messages, _PROBE, tokenizer, reading)
    place = -1 if text is None else text.rfind(_PROBE)
    if text is None or place < 0:
        return None
    first = messages[0]
    lost = first["role"] == "system" and not holds(text[:place], first["content"], tokenizer)
    return None if lost else text[:place]


def _answered(messages: Sequence[Message], answer: str, tokenizer: Any, reading: Reading) -> str | None:
    try:
        return apply_template([*messages, {"role": "assistant", "content": answer}], tokenizer, reading)
    except TemplateFailed:
        return None


def _all_kept(
    messages: Sequence[Message], answers: Sequence[str], opened: str, tokenizer: Any, reading: Reading
) -> bool:
    texts = (_answered(messages, answer, tokenizer, reading) for answer in answers)
    return all(
        text is not None and text.startswith(opened + answer) for text, answer in zip(texts, answers, strict=True)
    )


def _bare(question: str, opened: str | None) -> str:
    """The header that says nothing about thoughts."""
    header = question
    if opened is not None and question.startswith(opened):
        header = opened
    return _without_open_tag(header)


def _without_open_tag(header: str) -> str:
    last = None
    for last in _OPEN.finditer(header):  # noqa: B007
        pass
    return header[: last.start()] if last is not None and not header[last.end() :].strip() else header


def _up_to_thoughts(messages: Sequence[Message], answer: str, header: str, tokenizer: Any, reading: Reading) -> str:
    """The header, with the white space that the template puts between it and an answer's thoughts."""
    rest = (_answered(messages, answer, tokenizer, reading) or "").removeprefix(header)
    space = rest[: len(rest) - len(rest.lstrip())]
    return header + space if _OPEN.match(rest.lstrip()) else header


def _goes_on(answer: str) -> bool:
    """Whether an answer ends thoughts that it does not begin."""
    closed, opened = _CLOSE.search(answer, 1), _OPEN.search(answer)
    return closed is not None and (opened is None or opened.start() > closed.start())


def _thinking_header(question: str, begun: Sequence[str], given: Sequence[str], where: str) -> str:
    if len(begun) < len(given) or _without_open_tag(question) == question:
        closing = _CLOSE.search(begun[0])
        assert closing is not None
        raise InputError(
            f"an answer ends thoughts that it does not begin: it has {closing[0]} without the tag that opens them",
            where=where,
            found=shown(begun[0]),
            remedy="put the tag that opens them at the front of that answer, or leave its thoughts out",
        )
    return question


def _require_room(
    header: str,
    messages: Sequence[Message],
    tokenizer: Any,
    where: str,
    answer: str,
) -> None:
    """Refuse thoughts after a header that has ended them already."""
    content = messages[-1]["content"].strip()
    tail = header[header.rfind(content) + len(content) :] if content and content in header else header
    if not (_CLOSE.search(tail) or _OPEN.search(tail)):
        return
    switches = thinking_switches(tokenizer)
    remedy = "leave the thoughts out of the answers"
    if switches:
        remedy += f", or turn thinking on by the template's switch (`chat_template_kwargs`): {', '.join(switches)}"
    raise InputError(
        "an answer holds thoughts, and the chat template ends them before the answer begins",
        where=where,
        found=f"{shown(tail.strip())} and then {shown(answer)}",
        remedy=remedy,
    )


def _require_form(header: str, opened: str | None, given: Sequence[str], where: str) -> None:
    """Refuse a plain answer beside one that brings marks of its own, where no plain text can follow the header."""
    rest = opened.removeprefix(header).strip() if opened is not None and opened.startswith(header) else ""
    if not re.sub(rf"{_OPEN.pattern}|{_CLOSE.pattern}|\s", "", rest):
        return
    plain = next((answer for answer in given if not thinks(answer) and not answer.startswith(rest)), None)
    if plain is not None:
        raise InputError(
            "one answer brings marks of the chat template and another one does not, so no text can open both",
            where=where,
            found=f"{shown(plain)} would stand without {shown(rest)}",
            remedy="leave the marks out of all answers of the pair, or put them into all of them",
        )


def _require_once(header: str, answer: str, where: str) -> None:
    """Refuse an answer that begins with what stands at the end of the header."""
    end = header[-_TAIL:].rstrip()
    for match in _TAG.finditer(end):
        repeated = end[match.start() :]
        if len(repeated) > 2 and answer.startswith(repeated):
            raise InputError(
                "an answer begins with what the chat template puts before it, which would stand there twice",
                where=where,
                found=shown(answer),
                remedy="leave that out of the answers",
            )
