"""Prompts and answers that hold a chat template's own marks already, and what is said about how prompts were read."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from patcher.errors import InputError
from patcher.pairs.headers import ends_thoughts, thinks
from patcher.pairs.pair import ContrastPair, Prompt
from patcher.pairs.problems import shown
from patcher.pairs.templates import Message, source_notes, template_source, thinking_switches, writes_date
from patcher.recipe.vector import VectorSpec

_TAG = re.compile(r"<[^<>\s]{1,40}>|\[/?[A-Z_]{3,20}\]")
_ROLE = re.compile(r"(?:^|\s)(\S*\w:)\s*$")
_OTHER_TEMPLATES = (
    "<|im_start|>", "[INST]", "<<SYS>>", "<|begin_of_text|>", "<|start_header_id|>", "<start_of_turn>", "<|user|>",
    "<|User|>", "<｜User｜>", "<|START_OF_TURN_TOKEN|>", "<|start|>", "<|endoftext|>", "### Instruction:", "\n\nHuman:",
    "\nAssistant:", "ASSISTANT:",
)  # fmt: skip
_OTHER_ENDS = (
    "<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<|endoftext|>", "<|end_of_text|>", "<|return|>", "</s>",
    "<｜end▁of▁sentence｜>", "<|END_OF_TURN_TOKEN|>",
)  # fmt: skip
_SHOWN = 4


def special_tokens(tokenizer: Any) -> tuple[str, ...]:
    """The texts that the tokenizer reads as one special token each, the longest first."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    named = [*getattr(tokenizer, "all_special_tokens", []), *(token.content for token in added if token.special)]
    return tuple(sorted({str(token) for token in named if str(token).strip()}, key=lambda text: (-len(text), text)))


def require_bare(messages: Sequence[Message], question: str, tokenizer: Any, where: str) -> None:
    """Refuse a text that begins or ends with what the template puts there: it would stand there twice.

    Args:
        messages: what is asked.
        question: the same through the template.
        where: the recipe's entry, for errors.

    Raises:
        InputError: see there.
    """
    # Earlier answers may begin with thoughts, whose tag the template writes as well.
    for message in (message for message in messages if message["role"] != "assistant"):
        content = message["content"].strip()
        lead = question[: question.find(content)] if content else ""
        marks = set(_TAG.findall(lead)) | set(filter(None, [getattr(tokenizer, "bos_token", None)]))
        if role := _ROLE.search(lead):
            marks |= {role[1], lead.rstrip().rpartition("\n")[2].strip()}
        begins = max((mark for mark in marks if content.startswith(mark)), key=len, default=None)
        if begins is not None:
            raise _held_already("begins", f"{begins} at the front of {shown(content, 60)}", where)
        # One character may end a question by chance.
        after = question.rpartition(content)[2].strip() if content and content in question else ""
        if len(after) > 1 and content.endswith(after):
            raise _held_already("ends", f"{shown(after)} at the end of {shown(content[-60:], 60)}", where)


def _held_already(does: str, found: str, where: str) -> InputError:
    return InputError(
        f"a prompt holds the chat template already: it {does} with what the template {does} with",
        where=where,
        found=found,
        remedy="set `chat_template: false`: prompts are then used as they are, and begin with one BOS token",
    )


def template_notes(pairs: Sequence[ContrastPair], tokenizer: Any, spec: VectorSpec, ending: str) -> Iterator[str]:
    """What a user should know about prompts that went through the chat template.

    Args:
        ending: the end of what was rendered for a prompt, to where the answer begins.
    """
    yield from source_notes(tokenizer)
    answers = [side for pair in pairs if pair.prompt is not None for side in (pair.positive, pair.negative) if side]
    switches, set_here = thinking_switches(tokenizer), spec.chat_template_kwargs or {}
    silent = [name for name in switches if name not in set_here]
    if any(set_here.get(name) for name in switches) and ends_thoughts(ending):
        yield f"the template puts ended thoughts before an answer without any, whatever the switch: {shown(ending)}"
    if silent:
        yield (
            f"the chat template has a switch for thinking ({', '.join(silent)}) that the recipe does not set "
            f"(`chat_template_kwargs`); an answer was read after {shown(ending)}"
        )
    held = sum(thinks(answer) for answer in answers)
    if held:
        yield f"{held} of {len(answers)} answers hold thoughts; every answer was read after {shown(ending)}"
    if unknown := [mark for mark in _OTHER_ENDS if _is_plain(mark, tokenizer)]:
        yield (
            f"the chat template ends turns with {', '.join(map(shown, unknown))}, which is several tokens of plain "
            "text to this tokenizer: is it the one that the model was trained with?"
        )
    if spec.template_date is not None:
        if writes_date(tokenizer, spec):
            yield f"the chat template writes a date into prompts: {spec.template_date} stands there (`template_date`)"
        else:
            yield "`template_date` does nothing: the chat template writes no date"


def _is_plain(mark: str, tokenizer: Any) -> bool:
    return mark in template_source(tokenizer) and len(tokenizer(mark, add_special_tokens=False)["input_ids"]) > 2


def mark_notes(pairs: Sequence[ContrastPair], tokenizer: Any, *, templated: bool) -> Iterator[str]:
    """Says which prompts and answers hold special tokens, or look as if they held another model's template."""
    special = special_tokens(tokenizer)
    prompts = [text for pair in pairs for text in _texts(pair.prompt)]
    answers = [side for pair in pairs for side in (pair.positive, pair.negative) if side]
    if templated:
        yield from _held("prompts", prompts, lambda text: [mark for mark in special if mark in text], _SPECIAL)
    others = [mark for mark in _OTHER_TEMPLATES if mark not in special]
    if templated or not special:
        yield from _held("prompts", prompts, lambda text: [mark for mark in others if mark in text], _FOREIGN)
    yield from _held("sides", answers, lambda text: [m for m in special if text.rstrip().endswith(m)], _LAST)
    ends = [mark for mark in _OTHER_ENDS if mark not in special]
    yield from _held("sides", answers, lambda text: [m for m in ends if text.rstrip().endswith(m)], _FOREIGN_LAST)


_SPECIAL = "hold special tokens of the tokenizer, which the model reads as such"
_FOREIGN = "look as if they held the chat template of another model, which is plain text to this one"
_LAST = "end with a special token of the tokenizer, and `last` reads there: leave it out of the data to read the answer"

_FOREIGN_LAST = (
    "end with what ends a turn of another model, which is plain text to this one, and `last` reads there: leave it out "
    "of the data to read the answer"
)


def _held(what: str, texts: Sequence[str], marks: Callable[[str], list[str]], says: str) -> Iterator[str]:
    found = [held for text in texts if (held := marks(text))]
    if found:
        named = list(dict.fromkeys(mark for held in found for mark in held))
        more = " ..." if len(named) > _SHOWN else ""
        yield f"{len(found)} of {len(texts)} {what} {says}: {', '.join(map(shown, named[:_SHOWN]))}{more}"


def _texts(prompt: Prompt | None) -> list[str]:
    if prompt is None:
        return []
    return [prompt] if isinstance(prompt, str) else [turn.content for turn in prompt]
