"""A tokenizer's chat template: applied in this one place, with the switches that the recipe sets and on a fixed day."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, time
from typing import Any

from patcher.errors import InputError
from patcher.errors.causes import cause_of
from patcher.recipe.vector import VectorSpec

Message = Mapping[str, str]
"""`role` and `content`; with the key :data:`IMAGE` an image stands before the content."""
IMAGE = "image"

_CLOCK = "strftime_now"
_GENERATION = re.compile(r"\{%[-+]?\s*(?:end)?generation\s*[-+]?%\}")
_THINKING = re.compile("think|reason", re.IGNORECASE)
_DIRECTIVES = ("%-d", "%-m", "%-H", "%-I", "%-j", *(f"%{letter}" for letter in "aAbBcdDeFfGgHIjmMpSTuUVwWxXyY"), "%%")
_READ: dict[str, tuple[str, str]] = {}
"""Template -> what it makes of a content that is a text, and of one that is a list of parts; empty: not the text."""
_PROBE = "a few words"
_TAKEN_OUT = re.compile(r"/(?:no_?think|think|system_override)\b")
_DAYS = date(2001, 1, 2), date(2022, 11, 30)


class TemplateFailed(Exception):  # noqa: N818 - it says so to the callers, and never reaches the user
    """The template raised an error; the message is its first line."""


@dataclass(frozen=True)
class Reading:
    """How a template is read.

    Attributes:
        switches: variables of the template's own, such as ``enable_thinking``.
        day: what the template takes for today; None: the day on which it is applied.
    """

    switches: Mapping[str, Any] = field(default_factory=dict)
    day: date | None = None

    @classmethod
    def of(cls, spec: VectorSpec) -> Reading:
        """As a vector's part of a recipe says."""
        return cls(spec.chat_template_kwargs or {}, spec.template_date)


def has_template(tokenizer: Any) -> bool:
    """Whether there is a tokenizer, and it can render a conversation."""
    return bool(getattr(tokenizer, "chat_template", None))


def apply_template(messages: Sequence[Message], tokenizer: Any, reading: Reading, *, ask: bool = False) -> str:
    """The text of a conversation.

    Args:
        ask: end with the generation prompt, after which the model answers.

    Raises:
        TemplateFailed: the template does not render it.
    """
    options: dict[str, Any] = {"add_generation_prompt": ask, **reading.switches}
    if reading.day is not None and _CLOCK in template_variables(tokenizer):
        options["chat_template"] = _on_day(template_source(tokenizer), reading.day)
    return _applied(messages, tokenizer, options, parts=_takes_parts(tokenizer))


def _applied(messages: Sequence[Message], tokenizer: Any, options: Mapping[str, Any], *, parts: bool) -> str:
    import jinja2

    chat: list[dict[str, Any]] = [dict(message) for message in messages]
    for message in chat:
        image = [{"type": "image"}] if message.pop(IMAGE, None) is not None else []
        if parts or image:
            message["content"] = [*image, {"type": "text", "text": message["content"]}]
    try:
        text: str = tokenizer.apply_chat_template(chat, tokenize=False, **options)
    except (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise TemplateFailed(cause_of(error)) from None
    return text


def _takes_parts(tokenizer: Any) -> bool:
    """Whether the template reads contents as lists of parts alone, as those of some models with images do.

    A text is to such a template a list of characters, none of which is a part: it leaves the whole of it out.
    """
    text, parts = _as_read(tokenizer)
    return bool(parts) and not text


def _as_read(tokenizer: Any) -> tuple[str, str]:
    source = template_source(tokenizer)
    if source not in _READ:
        found = []
        for parts in (False, True):
            try:
                text = _applied([{"role": "user", "content": _PROBE}], tokenizer, {}, parts=parts)
            except TemplateFailed:
                text = ""
            found.append(text if _PROBE in text else "")
        _READ[source] = found[0], found[1]
    return _READ[source]


def source_notes(tokenizer: Any) -> list[str]:
    """Whose the template is, where it is not the tokenizer's own; and what had to be guessed of it."""
    name, notes = getattr(tokenizer, "template_file", None), []
    if name:
        notes.append(f"the tokenizer has no chat template: that of the processor is used ({name})")
    text, parts = _as_read(tokenizer)
    if text and parts not in ("", text) and not re.search("""['"]type['"]""", parts):
        notes.append(
            "the chat template writes a text otherwise than a list with this text in it (as prompts with images are "
            "given); here it was given texts"
        )
    return notes


def template_variables(tokenizer: Any) -> frozenset[str]:
    """The names that the template looks for and does not set itself; none where it cannot be parsed."""
    return _variables(template_source(tokenizer)) if has_template(tokenizer) else frozenset()


def thinking_switches(tokenizer: Any) -> list[str]:
    """Those of the names that by their name turn thinking on or off, or say how long it lasts."""
    return sorted(name for name in template_variables(tokenizer) if _THINKING.search(name))


def holds(rendered: str, text: str, tokenizer: Any) -> bool:
    """Whether a rendered conversation holds a text, white space and case apart.

    Words by which some templates turn thinking on or off, such as ``/no_think``, may have been taken out of it.
    """
    source = template_source(tokenizer)
    rest = _TAKEN_OUT.sub(lambda word: "" if word[0] in source else word[0], text)
    return any(_letters(form) in _letters(rendered) for form in (text, rest))


def _letters(text: str) -> str:
    return "".join(text.split()).casefold()


def settled(spec: VectorSpec, tokenizer: Any, today: date, where: str) -> VectorSpec:
    """The recipe's entry with the day that its template writes into prompts, so that a later build writes the same.

    Args:
        today: used where the recipe fixes no day and the template writes one.
        where: the recipe's entry, for errors.

    Raises:
        InputError: a switch of the recipe is none of the template's.
    """
    if spec.chat_template is False:
        return spec
    if spec.chat_template_kwargs:
        require_known(spec.chat_template_kwargs, tokenizer, f"{where}.chat_template_kwargs")
    if spec.template_date is not None or not writes_date(tokenizer, spec):
        return spec
    return spec.model_copy(update={"template_date": today})


def writes_date(tokenizer: Any, spec: VectorSpec) -> bool:
    """Whether prompts of this vector differ from day to day."""
    if _CLOCK not in template_variables(tokenizer):
        return False
    systems = [spec.system_prompt, *(spec.personas.sides("positive") if spec.personas else [])]
    turns = [*(("system", text) for text in systems[:2] if text), ("user", "Hello")]
    chat: list[Message] = [{"role": role, "content": text} for role, text in turns]
    switches = spec.chat_template_kwargs or {}
    try:
        first, second = (apply_template(chat, tokenizer, Reading(switches, day), ask=True) for day in _DAYS)
    except TemplateFailed:
        return True
    return first != second


def require_known(switches: Mapping[str, Any], tokenizer: Any, where: str) -> None:
    """Refuse names that the template does not look for: they would do nothing, without a word.

    Raises:
        InputError: see there.
    """
    if not has_template(tokenizer):
        raise InputError(
            "the model's tokenizer has no chat template, so there is nothing to switch",
            where=where,
            found=", ".join(switches),
            remedy="leave it out",
        )
    known = template_variables(tokenizer)
    unknown = [name for name in switches if name not in known]
    if not unknown:
        return
    special = {"messages", "tools", "documents", "add_generation_prompt", _CLOCK, "raise_exception"}
    own = sorted(name for name in known - special if not name.endswith("_token"))
    raise InputError(
        "the model's chat template does not use this switch, so it would do nothing",
        where=where,
        found=", ".join(unknown),
        remedy=f"what it uses: {', '.join(own)}" if own else "leave it out: the template has no switches",
    )


def template_source(tokenizer: Any) -> str:
    """The template that is used, as it is written."""
    source = tokenizer.chat_template
    if isinstance(source, Mapping):
        source = source.get("default", "")
    return str(source or "")


@functools.lru_cache(maxsize=16)
def _variables(source: str) -> frozenset[str]:
    import jinja2
    from jinja2 import meta, nodes

    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        # Stock transformers adds this tag, which only marks the assistant's words.
        tree = environment.parse(_GENERATION.sub("", source))
    except jinja2.TemplateError:
        return frozenset()
    own = {name.name for name in tree.find_all(nodes.Name) if name.ctx == "store"}
    asked = [(test.name, test.node) for test in tree.find_all((nodes.Test, nodes.Filter))]
    # A switch may get a default: `{% if not thinking is defined %}{% set thinking = false %}{% endif %}`.
    defaulted = {
        node.name
        for name, node in asked
        if isinstance(node, nodes.Name) and name in ("defined", "undefined", "default", "d")
    }
    return frozenset(meta.find_undeclared_variables(tree) - (own - defaulted))


@functools.lru_cache(maxsize=16)
def _on_day(source: str, day: date) -> str:
    """The template with a clock of its own, which stands at the beginning of a day.

    Written in the template's language, because stock transformers passes no functions to templates.
    """
    midnight = datetime.combine(day, time())
    stand = "".join(
        f" | replace('{directive}', {json.dumps(midnight.strftime(directive), ensure_ascii=False)})"
        for directive in _DIRECTIVES
        if midnight.strftime(directive) != directive
    )
    # The line break is dropped by the environment of stock transformers (trim_blocks).
    return f"{{% macro {_CLOCK}(format) %}}{{{{ format{stand} }}}}{{% endmacro %}}\n{source}"
