"""What text the model is given for a prompt and its continuations: as plain text, or through the chat template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from patcher.errors import InputError
from patcher.pairs.headers import common_header
from patcher.pairs.image_prompts import ImagePrompts
from patcher.pairs.images import PairImage
from patcher.pairs.pair import Prompt
from patcher.pairs.problems import shown
from patcher.pairs.template_marks import require_bare, special_tokens
from patcher.pairs.templates import IMAGE, Message, Reading, TemplateFailed, apply_template, has_template, holds
from patcher.recipe.vector import VectorSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_TEMPLATE_NOTE = "the tokenizer has no chat template: prompts are used as plain text"
_PROCESSORS = (
    "; chat_template.json is a processor's, and tokenizers do not read it: write the template that it holds into "
    "chat_template.jinja to use it"
)
_PROBE = "Six Words that No Template Holds"
_PLAIN = "set `chat_template: false` to use prompts as plain text"


@dataclass(frozen=True)
class RenderedText:
    """A text for the tokenizer, and where in it the answer, continuation or whole text of the pair stands.

    Attributes:
        text: everything the model reads, except for special tokens that the tokenizer adds by itself.
        start: index of the first character of the continuation (after the separating space, if one was put in).
        end: one past its last character.
        templated: whether a chat template made it, and special tokens are therefore part of the text.
        whole: whether the pair had no prompt.
        asked: where in the text the last turn before the answer ends; through a template only.
        image: the image whose mark stands in it, or None.
    """

    text: str
    start: int
    end: int
    templated: bool
    whole: bool
    asked: int = 0
    image: PairImage | None = None

    @property
    def header(self) -> str:
        """What the chat template puts between the prompt and the answer; of a whole text, what it puts after it."""
        return self.text[self.end :] if self.whole else self.text[self.asked : self.start]


def no_template_note(tokenizer: PreTrainedTokenizerBase) -> str:
    """That prompts are plain text, and which file beside the tokenizer holds a template all the same."""
    beside = Path(str(getattr(tokenizer, "name_or_path", "")), "chat_template.json")
    return NO_TEMPLATE_NOTE + (_PROCESSORS if beside.is_file() else "")


def uses_chat_template(prompt: Prompt | None, tokenizer: PreTrainedTokenizerBase, spec: VectorSpec) -> bool:
    """Whether ``chat_template`` of the recipe means a template for this prompt and tokenizer.

    Raises:
        InputError: if a template is demanded of a tokenizer that has none.
    """
    templated = has_template(tokenizer)
    if spec.chat_template is True and not templated:
        raise InputError(
            "the model's tokenizer has no chat template",
            where=f"vector `{spec.name}`: `chat_template: true`",
            remedy="set `chat_template: auto` to use prompts as plain text, or use a chat model",
        )
    if spec.chat_template == "auto":
        return templated and prompt is not None
    return spec.chat_template


def render(
    prompt: Prompt | None, continuation: str, tokenizer: PreTrainedTokenizerBase, spec: VectorSpec
) -> RenderedText:
    """One prompt and continuation; see :func:`render_sides`, which also knows the other sides."""
    return render_sides(prompt, [continuation], tokenizer, spec)[0]


def render_with_image(
    prompt: Prompt | None, continuations: Sequence[str], image: PairImage, images: ImagePrompts, spec: VectorSpec
) -> list[RenderedText]:
    """As :func:`render_sides`, with the mark of an image in the text.

    Through a chat template the image stands before the words of the user's first turn, as the template writes it; in
    plain text the processor's own token for an image stands before the prompt.

    Raises:
        InputError: as :func:`render_sides`; or the model's processor cannot be used.
    """
    mark = "" if uses_chat_template(prompt, images.tokenizer, spec) else images.mark
    rendered = render_sides(prompt, continuations, images.tokenizer, spec, image=mark)
    return [replace(one, image=image) for one in rendered]


def render_sides(
    prompt: Prompt | None,
    continuations: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    spec: VectorSpec,
    *,
    image: str | None = None,
) -> list[RenderedText]:
    """Put system prompt, prompt and each of its continuations together; what stands before these is the same for all.

    As plain text they are concatenated as given, with a blank line after the system prompt and one space between
    prompt and continuation where neither brings whitespace. Through a chat template the continuation opens the
    assistant's turn, and the turn stays open: the last token is the continuation's own and never an end-of-turn token
    (:mod:`patcher.pairs.headers` says which text opens the turn). A whole text becomes the user's turn, and the
    generation prompt ends it.

    Args:
        image: what stands for an image in plain text, where there is one.

    Raises:
        InputError: if the template is missing though demanded, fails, does not take the system prompt or the
            conversation, stands in the prompt already, or has no place for one of the continuations.
    """
    if uses_chat_template(prompt, tokenizer, spec):
        if prompt is None:
            return _whole_texts(continuations, tokenizer, spec, image is not None)
        answers = [continuation.strip() for continuation in continuations]
        messages = _messages(prompt, spec, image is not None)
        question = _applied(messages, tokenizer, spec)
        require_bare(messages, question, tokenizer, f"vector `{spec.name}`")
        header = common_header(messages, question, answers, tokenizer, Reading.of(spec), f"vector `{spec.name}`")
        asked = _asked(question, messages, tokenizer, spec)
        return [_under(header, answer, asked) for answer in answers]
    return [_plain(prompt, continuation, tokenizer, spec, image or "") for continuation in continuations]


def render_question(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, spec: VectorSpec) -> RenderedText:
    """A prompt that the model is to answer itself: through a chat template, it ends with the generation prompt.

    Raises:
        InputError: as :func:`render_sides`.
    """
    if not uses_chat_template(prompt, tokenizer, spec):
        return _plain(prompt, "", tokenizer, spec)
    messages = _messages(prompt, spec)
    question = _applied(messages, tokenizer, spec)
    require_bare(messages, question, tokenizer, f"vector `{spec.name}`")
    return _under(question, "", _asked(question, messages, tokenizer, spec))


def _asked(question: str, messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, spec: VectorSpec) -> int:
    """Where in a rendered question the last message ends."""
    last = messages[-1]["content"].strip()
    if last and question.count(last) == 1:
        return question.find(last) + len(last)
    # The template's own words may hold a short text, such as "a": what follows another text follows this one as well.
    probed = _applied([*messages[:-1], {**messages[-1], "content": _PROBE}], tokenizer, spec)
    rest = probed.rpartition(_PROBE)[2]
    if last in question and question.endswith(rest):
        return len(question) - len(rest)
    # A template may alter the prompt; the end of it is then not known, and the last line stands for what follows it.
    return question.rstrip().rfind("\n") + 1


def _under(front: str, answer: str, asked: int) -> RenderedText:
    return RenderedText(front + answer, len(front), len(front) + len(answer), True, False, asked)


def _plain(
    prompt: Prompt | None, continuation: str, tokenizer: PreTrainedTokenizerBase, spec: VectorSpec, image: str = ""
) -> RenderedText:
    front = (f"{spec.system_prompt}\n\n" if spec.system_prompt else "") + image
    if isinstance(prompt, tuple):
        raise InputError(
            "a conversation of several turns needs a chat template",
            where=f"vector `{spec.name}`",
            found="`chat_template: false`" if tokenizer.chat_template else "the tokenizer has none",
            remedy="write each prompt as one text (a text of Human and Assistant is one with `format: pairs`), or use "
            "a chat model with `chat_template: auto`",
        )
    if prompt is not None:
        front += prompt
        if continuation and not prompt[-1:].isspace() and not continuation[0].isspace():
            # A prompt that holds the template ends with a special token, and the answer follows it at once.
            front += "" if prompt.endswith(special_tokens(tokenizer)) else " "
    text = front + continuation
    return RenderedText(text, len(front), len(text), templated=False, whole=prompt is None)


def _whole_texts(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, spec: VectorSpec, image: bool
) -> list[RenderedText]:
    where = f"vector `{spec.name}`"
    rendered: dict[str, RenderedText] = {}
    frames: set[tuple[str, str]] = set()
    for given in texts:
        content = given.strip()
        messages = _messages(content, spec, image)
        text = _applied(messages, tokenizer, spec)
        require_bare(messages, text, tokenizer, where)
        start = _asked(text, messages, tokenizer, spec) - len(content)
        if start < 0 or text[start : start + len(content)] != content:
            raise InputError(
                "the model's chat template alters the texts, so their tokens cannot be told from its own",
                where=where,
                found=shown(content),
                remedy="set `chat_template: false` to use them as plain text",
            )
        frames.add((text[:start], text[start + len(content) :]))
        rendered[given] = RenderedText(text, start, start + len(content), templated=True, whole=True)
    if len(frames) > 1:
        raise InputError(
            "the model's chat template puts other words around one side than around the other",
            where=where,
            found=" and ".join(shown(text) for text in texts),
            remedy="set `chat_template: false` to use them as plain text",
        )
    return [rendered[given] for given in texts]


def _messages(prompt: Prompt, spec: VectorSpec, image: bool = False) -> list[Message]:
    """What is asked, after the system prompt; an image stands at the front of the user's first turn.

    Raises:
        InputError: the turns of a conversation are not in the order that templates take.
    """
    if isinstance(prompt, str):
        messages: list[Message] = [{"role": "user", "content": prompt.strip()}]
    else:
        messages = [{"role": turn.role, "content": turn.content} for turn in prompt]
        _require_order(messages, spec)
    if image:
        first = next(place for place, message in enumerate(messages) if message["role"] == "user")
        messages[first] = {**messages[first], IMAGE: ""}
    return [{"role": "system", "content": spec.system_prompt}, *messages] if spec.system_prompt else messages


def _require_order(messages: Sequence[Message], spec: VectorSpec) -> None:
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    wrong, remedy = None, "begin with a system turn or with the user, alternate, and end with the user"
    if turns != roles and spec.system_prompt:
        wrong = "a conversation brings a system turn, and the recipe has a `system_prompt` as well"
        remedy = "leave one of the two out"
    elif turns and turns[-1] == "assistant":
        wrong = "a conversation ends with the assistant's turn, and the sides of the pair are the assistant's"
        remedy = "move that turn to the front of both sides, or leave it out"
    elif not turns or turns != [("user", "assistant")[place % 2] for place in range(len(turns))]:
        wrong = "the turns of a conversation are not the user's and the assistant's in alternation"
    if wrong is not None:
        raise InputError(wrong, where=f"vector `{spec.name}`", found=", ".join(roles) or "no turn", remedy=remedy)


def _applied(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, spec: VectorSpec) -> str:
    """The conversation, to the end of the generation prompt."""
    reading = Reading.of(spec)
    try:
        text = apply_template(messages, tokenizer, reading, ask=True)
    except TemplateFailed as error:
        if messages[0]["role"] == "system" and _takes(messages[1:], tokenizer, reading):
            raise _refused_system_prompt(spec, str(error)) from None
        raise InputError(
            "the model's chat template cannot render this conversation",
            where=f"vector `{spec.name}`",
            found=shown(str(error), 200),
            remedy=_PLAIN,
        ) from None
    last = messages[-1]["content"]
    if not holds(text, last, tokenizer):
        raise InputError(
            "the model's chat template leaves the prompt out, or alters it",
            where=f"vector `{spec.name}`",
            found=f"{shown(last, 60)} became {shown(text[-100:], 110)}",
            remedy=_PLAIN,
        )
    # Some templates drop the system turn without a word; the vector would then not be what the recipe says.
    if messages[0]["role"] == "system" and not holds(text, messages[0]["content"], tokenizer):
        raise _refused_system_prompt(spec, "it leaves the system turn out")
    return text


def _takes(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, reading: Reading) -> bool:
    try:
        apply_template(messages, tokenizer, reading, ask=True)
    except TemplateFailed:
        return False
    return True


def _refused_system_prompt(spec: VectorSpec, found: str) -> InputError:
    return InputError(
        "the model's chat template takes no system prompt",
        where=f"vector `{spec.name}`: `system_prompt`",
        found=shown(found, 200),
        remedy="put its text at the front of the prompts, or set `chat_template: false`",
    )
