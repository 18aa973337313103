"""Conversations as data sets write them: lists of messages of several forms, and texts of Human and Assistant."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from typing import Any

from patcher.pairs.pair import Prompt, Turn
from patcher.pairs.problems import LeftOver, RowProblem, require_utf8, shown

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
}
"""Names of roles -> those that chat templates have: of the OpenAI API, of ShareGPT, of Gemma."""

_FORMS = (("role", "content"), ("from", "value"))
_WRITTEN_OUT = re.compile(r"\[\s*\{\s*(\\?[\"'])(role|content|from|value)\1\s*:")
_BETWEEN_RECORDS = re.compile(r"(?<=[\"'])\}\s*\{(?=[\"'](?:role|content|from|value)[\"']:)")
_SPEAKER = re.compile(r"(?:\A\s*|\r?\n\r?\n)(Human|Assistant):[ ]?")
_REASONING = ("reasoning_content", "reasoning", "thinking")


def is_conversation(value: object) -> bool:
    """Whether a value of a data set is a list of messages, be it of Arrow's or NumPy's making or written as text."""
    if isinstance(value, str):
        return _WRITTEN_OUT.match(value.lstrip()) is not None
    if isinstance(value, Mapping):
        return any(set(form) <= set(value) for form in _FORMS)
    items = _as_list(value)
    return bool(items) and all(isinstance(item, Mapping) and any(form[0] in item for form in _FORMS) for item in items)


def read_conversation(value: Any, what: str, origin: str, *, image: bool = False) -> tuple[Turn, ...]:
    """The turns of a list of messages.

    Args:
        value: messages ``{role, content}`` or ``{from, value}`` (ShareGPT); contents are texts or lists of
            ``{type: text, text}``. Also one message alone, a mapping of lists, as Arrow turns a list of records round,
            and the JSON or Python text of a list, as a CSV file holds it.
        what: its column, for errors.
        origin: where it was read.
        image: whether the image of the pair is known, so that contents may hold its mark, ``{type: image}``.

    Raises:
        RowProblem: a message has no known role or no text.
    """
    if isinstance(value, str):
        value = _from_text(value, what, origin)
    if isinstance(value, Mapping):
        value = _as_records(value)
    turns = enumerate(_as_list(value), 1)
    return tuple(_turn(item, f"turn {number} of `{what}`", origin, image) for number, item in turns)


def has_reasoning(value: object) -> bool:
    """Whether messages hold reasoning beside their contents, which is not read."""
    messages = [value] if isinstance(value, Mapping) else _as_list(value)
    return any(isinstance(message, Mapping) and any(message.get(key) for key in _REASONING) for message in messages)


def read_dialogue(text: str) -> tuple[Turn, ...] | None:
    r"""The turns of a text ``\n\nHuman: ... \n\nAssistant: ...`` (HH-RLHF, Bai et al. 2022); None if it is not one."""
    pieces = _SPEAKER.split(text)
    if pieces[0].strip() or len(pieces) < 5 or pieces[1] != "Human" or "Assistant" not in pieces[1::2]:
        return None
    roles = {"Human": "user", "Assistant": "assistant"}
    return tuple(Turn(roles[name], content.strip()) for name, content in zip(pieces[1::2], pieces[2::2], strict=True))


def as_prompt(turns: tuple[Turn, ...]) -> Prompt | None:
    """The turns as a prompt; one turn of the user is a text, which needs no chat template."""
    if len(turns) == 1 and turns[0].role == "user":
        return turns[0].content
    return turns or None


def check_turns(turns: tuple[Turn, ...], what: str, origin: str) -> None:
    """A chat template takes turns of user and assistant by turns, after a system prompt.

    Raises:
        LeftOver: these do not alternate, or do not end with the user.
    """
    talk = turns[1:] if turns[:1] and turns[0].role == "system" else turns
    expected = ["user" if index % 2 == 0 else "assistant" for index in range(len(talk))]
    if [turn.role for turn in talk] != expected:
        found = ", ".join(turn.role for turn in turns[:12])
        message = f"the turns of {what} are not those of user and assistant by turns"
        raise LeftOver(message, origin, found, "begin with the user, after at most one system turn")
    if not talk or talk[-1].role != "user":
        message = f"{what} does not end with a turn of the user, so no answer can follow"
        found = f"{turns[-1].role}: {shown(turns[-1].content)}" if turns else "no turns"
        raise LeftOver(message, origin, found, "let it end with the user's turn")


def has_image(value: object) -> bool:
    """Whether messages hold the mark of an image, ``{type: image}``."""
    messages = [value] if isinstance(value, Mapping) else _as_list(value)
    contents = [_as_list(message.get("content")) for message in messages if isinstance(message, Mapping)]
    return any(isinstance(part, Mapping) and part.get("type") == "image" for parts in contents for part in parts)


def _turn(message: Any, what: str, origin: str, image: bool) -> Turn:
    form = next((form for form in _FORMS if isinstance(message, Mapping) and form[0] in message), None)
    if form is None:
        remedy = "a message is {role, content} or {from, value}"
        raise RowProblem(f"{what} has no role", origin, shown(message), remedy)
    role = ROLES.get(str(message[form[0]]).strip().lower())
    if role is None:
        found, remedy = shown(message[form[0]]), "known roles: " + ", ".join(ROLES)
        raise RowProblem(f"{what} is of a role that no chat template is given here", origin, found, remedy)
    content = message.get(form[1])
    if any(_as_list(message.get(key)) for key in ("tool_calls", "function_call")):
        raise RowProblem(f"{what} calls a tool, which is not read", origin, None, "leave such rows out")
    return Turn(role, require_utf8(_content(content, what, origin, image), what, origin))


def _content(content: Any, what: str, origin: str, image: bool) -> str:
    if isinstance(content, str):
        return content
    texts: list[Any] = []
    for part in _as_list(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        text = part.get("text") if isinstance(part, Mapping) else part
        if kind == "image" and image:
            continue
        if kind not in (None, "text"):
            message = f"{what} holds more than text, which is not read"
            raise RowProblem(message, origin, f"a part of type {shown(kind)}", "leave such rows or such parts out")
        texts.append(text)
    if not texts or not all(isinstance(text, str) for text in texts):
        raise RowProblem(f"{what} has no text", origin, f"{type(content).__name__}: {shown(content)}")
    return "".join(texts)


def _as_records(value: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    keys = next(form for form in _FORMS if set(form) <= set(value))
    if not all(_is_list(value[key]) for key in keys):
        return [value]
    return [dict(zip(keys, pair, strict=True)) for pair in zip(*(value[key] for key in keys), strict=False)]


def _from_text(text: str, what: str, origin: str) -> Any:
    # NumPy writes no comma between records.
    text = _BETWEEN_RECORDS.sub("}, {", text)
    for parse in (json.loads, ast.literal_eval):
        try:
            found = parse(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if is_conversation(found) and not isinstance(found, str):
            return found
    message = f"`{what}` is a list of messages that was written as a text, and cannot be read back"
    raise RowProblem(message, origin, shown(text), "save the data as JSON Lines or .parquet, which hold lists")


def _is_list(value: Any) -> bool:
    return not isinstance(value, str | Mapping) and hasattr(value, "__len__") and hasattr(value, "__iter__")


def _as_list(value: Any) -> list[Any]:
    if _is_list(value):
        return list(value)
    return [value] if value else []
