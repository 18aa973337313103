"""Texts to ids and read positions: which token's residual stands for an answer, and how sides are aligned."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from patcher.errors import InputError
from patcher.pairs.encoding import EOS_NOTE, EncodedText, TextEncoder
from patcher.pairs.image_prompts import ImagePrompts
from patcher.pairs.images import PairImage
from patcher.pairs.pair import ContrastPair, Prompt, TokenisedPair, TokenisedSide
from patcher.pairs.problems import Problems, RowProblem, shown
from patcher.pairs.prompts import (
    RenderedText,
    no_template_note,
    render_question,
    render_sides,
    render_with_image,
)
from patcher.pairs.template_marks import mark_notes, template_notes
from patcher.recipe.vector import VectorSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


IN_FRONT_NOTE = "in plain text an image stands right before the prompt, as the token that the processor has for it"


@dataclass(frozen=True)
class EncodedSide:
    """A rendered text and its ids."""

    rendered: RenderedText
    encoded: EncodedText
    ids: tuple[int, ...]  # with alignment padding


def tokenise_pairs(
    pairs: Sequence[ContrastPair],
    tokenizer: PreTrainedTokenizerBase,
    spec: VectorSpec,
    images: ImagePrompts | None = None,
) -> tuple[list[TokenisedPair], list[str]]:
    """Render and tokenize both sides of every pair, and find the tokens to read.

    Where the residual is read follows ``spec.position``:

    - ``answer``: the token that ends the first run of letters and digits of the answer (the "A" of " (A)", as in CAA,
      Rimsky et al. 2024);
    - ``last``: the last token (repeng);
    - ``mean``: all tokens of the continuation; of a whole text, all but the special tokens at the front;
    - an integer: counted from the start, or from the end if negative;
    - ``auto``: ``answer`` for ``ab`` pairs, else ``last``.

    With ``spec.align: spaces`` the shorter side is right-padded with space tokens (ActAdd, Turner et al. 2023), and
    positions count over the padded ids; ``auto`` does so for a single pair of whole plain texts, and wherever one
    side of such a pair is empty. Nothing is ever truncated.

    The sides of a pair with an image share it. Its tokens stand among the ids, as the stock processor puts them there,
    and positions count them.

    Args:
        images: reads pairs with images, where there are such.

    Returns:
        The pairs, in order, and notes for the user, each once.

    Raises:
        InputError: with every row that cannot be used, up to ten; or if the recipe asks for what the tokenizer cannot
            do.
    """
    encoder = TextEncoder(tokenizer, spec, images)
    notes: list[str] = []
    problems = Problems()
    tokenised: list[TokenisedPair] = []
    header: str | None = None
    for pair in pairs:
        with error_in_row(pair.origin):
            sides = (pair.positive, pair.negative)
            positive, negative = encoded_sides(pair.prompt, sides, tokenizer, spec, encoder, pair.image, images)
        notes += _notes(pair, positive.rendered, encoder, tokenizer, spec)
        if positive.rendered.templated and header is None:
            header = positive.rendered.header
        with problems.collected():
            positive, negative = _align(positive, negative, pair, len(pairs) == 1, encoder, spec)
            tokenised.append(_tokenised_pair(positive, negative, pair, encoder, spec))
    problems.raise_if_any(f"vector `{spec.name}` has pairs that cannot be used")
    require_template_used(spec, used=header is not None)
    notes += mark_notes(pairs, tokenizer, templated=header is not None)
    if header is not None:
        notes += template_notes(pairs, tokenizer, spec, header)
    return tokenised, list(dict.fromkeys(notes))


def tokenise_continuation(
    pair_prompt: Prompt | None, continuation: str, tokenizer: PreTrainedTokenizerBase, spec: VectorSpec
) -> tuple[tuple[int, ...], int]:
    """One prompt and continuation; see :func:`tokenise_continuations`, which also knows the other ones."""
    return tokenise_continuations(pair_prompt, [continuation], tokenizer, spec)[0]


def tokenise_continuations(
    prompt: Prompt | None, continuations: Sequence[str], tokenizer: PreTrainedTokenizerBase, spec: VectorSpec
) -> list[tuple[tuple[int, ...], int]]:
    """A prompt with each of its continuations, exactly as :func:`tokenise_pairs` does it, without alignment.

    Returns:
        For each the ids, and the index of the continuation's first token.

    Raises:
        InputError: if the recipe asks for what the tokenizer cannot do.
    """
    sides = encoded_sides(prompt, continuations, tokenizer, spec, TextEncoder(tokenizer, spec))
    return [(side.ids, side.encoded.continuation_start) for side in sides]


def tokenise_question(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, spec: VectorSpec) -> tuple[int, ...]:
    """The ids of a prompt that the model is to answer itself.

    Raises:
        InputError: if the recipe asks for what the tokenizer cannot do.
    """
    return TextEncoder(tokenizer, spec).encode(render_question(prompt, tokenizer, spec)).ids


def require_template_used(spec: VectorSpec, *, used: bool) -> None:
    """Refuse switches for a template that no prompt goes through.

    Raises:
        InputError: see there.
    """
    if spec.chat_template_kwargs and not used:
        raise InputError(
            "the pairs have no prompt, so they go through no chat template, and there is nothing to switch",
            where=f"vector `{spec.name}`: `chat_template_kwargs`",
            remedy="leave it out, or set `chat_template: true` to make each text the user's turn",
        )


@contextmanager
def error_in_row(origin: str) -> Iterator[None]:
    """An error that says in which row of the data it is."""
    try:
        yield
    except InputError as error:
        problem = error.problems[0]
        where = f"{problem.where}, {origin}"
        raise InputError(problem.message, where=where, found=problem.found, remedy=problem.remedy) from None


def encoded_sides(
    prompt: Prompt | None,
    continuations: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    spec: VectorSpec,
    encoder: TextEncoder,
    image: PairImage | None = None,
    images: ImagePrompts | None = None,
) -> list[EncodedSide]:
    """A prompt with each of its continuations, the same text before all of them; see ``render_sides``."""
    sides = []
    if image is None:
        texts = render_sides(prompt, continuations, tokenizer, spec)
    else:
        assert images is not None
        texts = render_with_image(prompt, continuations, image, images, spec)
    for rendered in texts:
        encoded = encoder.encode(rendered)
        sides.append(EncodedSide(rendered, encoded, encoded.ids))
    return sides


def _notes(
    pair: ContrastPair,
    rendered: RenderedText,
    encoder: TextEncoder,
    tokenizer: PreTrainedTokenizerBase,
    spec: VectorSpec,
) -> Iterable[str]:
    if spec.chat_template == "auto" and pair.prompt is not None and not rendered.templated:
        yield no_template_note(tokenizer)
    if rendered.image is not None and not rendered.templated:
        yield IN_FRONT_NOTE
    if encoder.appends_tokens and not rendered.templated:
        yield EOS_NOTE


def _align(
    positive: EncodedSide,
    negative: EncodedSide,
    pair: ContrastPair,
    single: bool,
    encoder: TextEncoder,
    spec: VectorSpec,
) -> tuple[EncodedSide, EncodedSide]:
    templated_text = positive.rendered.whole and positive.rendered.templated
    if spec.align == "spaces" and templated_text:
        raise InputError(
            "whole texts in a chat template cannot be padded with spaces: the template ends them",
            where=f"vector `{spec.name}`: `align: spaces`",
            remedy="set `chat_template: false`",
        )
    plain_text = pair.prompt is None and not templated_text
    if spec.align == "none" or (
        spec.align == "auto" and not (plain_text and (single or not pair.positive or not pair.negative))
    ):
        return positive, negative
    length = max(len(positive.ids), len(negative.ids))
    if len(positive.ids) == len(negative.ids):
        return positive, negative
    space = encoder.space_token()
    if space is None:
        raise InputError(
            "the tokenizer has no token for a single space, so the shorter side cannot be padded",
            where=f"vector `{spec.name}`: `align`",
            remedy="give both sides the same number of tokens, or set `align: none`",
        )
    return _padded(positive, length, space), _padded(negative, length, space)


def _padded(side: EncodedSide, length: int, space: int) -> EncodedSide:
    return EncodedSide(side.rendered, side.encoded, side.ids + (space,) * (length - len(side.ids)))


def without_tokens(name: str, text: str, origin: str, remedy: str | None = None) -> RowProblem:
    """What to say of a text without tokens: it is empty, or the tokenizer has no vocabulary."""
    if not text.strip():
        return RowProblem(f"the {name} is empty: there is no token to read", origin, None, remedy)
    return RowProblem(
        f"the model's tokenizer makes no token of the {name}",
        origin,
        shown(text, 60),
        "its files are incomplete or empty: put those of the model (tokenizer.json or tokenizer.model) into its folder",
    )


def _tokenised_pair(
    positive: EncodedSide, negative: EncodedSide, pair: ContrastPair, encoder: TextEncoder, spec: VectorSpec
) -> TokenisedPair:
    for side, name in ((positive, "positive"), (negative, "negative")):
        if not side.ids:
            given = (pair.positive if side is positive else pair.negative) or str(pair.prompt or "")
            raise without_tokens(f"{name} side", given, pair.origin, "give it a text, or pad it: `align: spaces`")
    if positive.ids == negative.ids:
        message = "both sides are the same tokens, so their difference is nothing"
        found = f"{shown(pair.positive, 60)} and {shown(pair.negative, 60)}"
        raise RowProblem(message, pair.origin, found, "remove the pair, or correct one of its sides")
    sides = [
        TokenisedSide(
            side.ids,
            read_positions(side, f"{name} side", pair, encoder, spec),
            side.encoded.continuation_start,
            side.encoded.image,
        )
        for side, name in ((positive, "positive"), (negative, "negative"))
    ]
    first, second = sides
    if first.read == second.read and first.ids[: first.read[-1] + 1] == second.ids[: second.read[-1] + 1]:
        message = "both sides are the same up to the token that is read, so their difference is nothing"
        found = f"position {spec.position}: token {first.read[-1]} of {len(first.ids)} and {len(second.ids)}"
        raise RowProblem(message, pair.origin, found, "read at a later `position`")
    return TokenisedPair(first, second, pair.origin)


def read_positions(
    side: EncodedSide, name: str, pair: ContrastPair, encoder: TextEncoder, spec: VectorSpec
) -> tuple[int, ...]:
    """Which tokens of a side are read.

    Args:
        name: of the side, for errors.
        pair: for the format and the origin.

    Raises:
        RowProblem: there is no such token.
    """
    length = len(side.ids)
    position = spec.position
    if position == "auto":
        position = "answer" if pair.format == "ab" else "last"
    if position == "last":
        return (length - 1,)
    if position == "mean":
        if side.encoded.continuation_start >= length:
            raise RowProblem(f"the {name} has no token to take the mean over", pair.origin)
        return tuple(range(side.encoded.continuation_start, length))
    if position == "answer":
        return (_answer_token(side, name, pair, encoder),)
    if not -length <= position < length:
        found, remedy = f"the {name} has {length} tokens", f"use a position from {-length} to {length - 1}"
        raise RowProblem(f"`position: {position}` is out of range", pair.origin, found, remedy)
    return (position % length,)


def _answer_token(side: EncodedSide, name: str, pair: ContrastPair, encoder: TextEncoder) -> int:
    text, end = side.rendered.text, side.rendered.end
    first = next((index for index in range(side.rendered.start, end) if text[index].isalnum()), None)
    if first is None:
        found = shown(text[side.rendered.start : end])
        message = f"the {name} has no letter or digit, so there is no answer to read at"
        raise RowProblem(message, pair.origin, found, "set `position: last`")
    last = first
    while last + 1 < end and text[last + 1].isalnum():
        last += 1
    index = encoder.token_holding(side.rendered, side.encoded, last)
    if index is None:
        message = f"the {name}'s answer cannot be found among its tokens"
        raise RowProblem(message, pair.origin, shown(text[first : last + 1]), "set `position: last`")
    return index
