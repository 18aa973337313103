"""Text to ids: special tokens at the front, none at the end, and which token holds a character."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from patcher.errors import InputError
from patcher.pairs.image_prompts import ImagePrompts, SeenImage
from patcher.pairs.images import PairImage
from patcher.pairs.prompts import RenderedText
from patcher.recipe.vector import VectorSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EOS_NOTE = "the tokenizer ends every text with a special token; it is left out, so that the last token is the text's"


@dataclass(frozen=True)
class EncodedText:
    """Ids of a text, where the continuation starts in them, and the spans of characters where they are known.

    Attributes:
        ids: token ids, special tokens at the front included.
        front: how many of them are special tokens at the front.
        continuation_start: index of the first token that depends on the continuation.
        spans: (start, end) characters of every token, empty ones for special tokens and for those of an image; None
            for slow tokenizers.
        image: the image among them, or None.
    """

    ids: tuple[int, ...]
    front: int
    continuation_start: int
    spans: tuple[tuple[int, int], ...] | None
    image: SeenImage | None = None


class TextEncoder:
    """Tokenizes rendered texts the way the recipe's ``add_bos`` asks for.

    Args:
        tokenizer: of the model.
        spec: for ``add_bos``, and for the name in errors.
        images: reads texts with images, where there are such.

    Raises:
        InputError: if a beginning-of-text token is demanded of a tokenizer that has none.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, spec: VectorSpec, images: ImagePrompts | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self._images = images
        self._add_bos = spec.add_bos
        self._bos: int | None = tokenizer.bos_token_id
        if spec.add_bos is True and self._bos is None:
            raise InputError(
                "the tokenizer has no beginning-of-text token",
                where=f"vector `{spec.name}`: `add_bos: true`",
                remedy="set `add_bos: auto`, which does what the tokenizer does",
            )
        front, self.appends_tokens = self._own_special_tokens()
        if spec.add_bos is True and self._bos is not None and self._bos not in front:
            front = (self._bos, *front)
        self._front: tuple[int, ...] = () if spec.add_bos is False else front
        self._prefixes: dict[tuple[str, bool, PairImage | None], tuple[int, ...]] = {}

    def encode(self, rendered: RenderedText) -> EncodedText:
        """Tokenize a rendered text."""
        ids, spans, image = self._ids(rendered.text, rendered.templated, rendered.image)
        front = self._front_length(ids, rendered.templated)
        if rendered.whole and (rendered.templated or rendered.start == 0):
            return EncodedText(ids, front, front, spans, image)
        prefix = self._prefix_ids(rendered.text[: rendered.start], rendered.templated, rendered.image)
        start = 0
        while start < min(len(ids), len(prefix)) and ids[start] == prefix[start]:
            start += 1
        if rendered.end > rendered.start:
            # Merging tokenizers may swallow the continuation; its text is then in the last token.
            start = min(start, len(ids) - 1)
        return EncodedText(ids, front, start, spans, image)

    def token_holding(self, rendered: RenderedText, encoded: EncodedText, character: int) -> int | None:
        """Index of the token that ends the character at ``character`` of the text; None if none is found."""
        for index in reversed(range(len(encoded.spans or ()))):
            start, end = (encoded.spans or ())[index]
            if start <= character < end:
                return index
        return self._by_decoding(rendered, encoded, len(rendered.text) - character - 1)

    def space_token(self) -> int | None:
        """The token that one more space at the end of a text is; None if there is no such single token."""
        # In context, because alone " " is two spaces to SentencePiece, which puts one in front of every text.
        for stem in ("x", "word", "1", ""):
            bare, spaced = self._plain_ids(stem), self._plain_ids(f"{stem} ")
            known = spaced[-1:] != (self._tokenizer.unk_token_id,)
            if known and len(spaced) == len(bare) + 1 and spaced[: len(bare)] == bare:
                return spaced[-1]
        vocabulary: dict[str, int] = self._tokenizer.get_vocab()
        return vocabulary.get("▁")

    def _own_special_tokens(self) -> tuple[tuple[int, ...], bool]:
        """What the tokenizer adds before a text, and whether it adds anything after it."""
        for probe in ("x", "a b", "0"):
            bare = self._plain_ids(probe)
            full = tuple(self._tokenizer(probe, add_special_tokens=True, verbose=False)["input_ids"])
            for start in range(len(full) - len(bare) + 1 if bare else 0):
                if full[start : start + len(bare)] == bare:
                    return full[:start], start + len(bare) < len(full)
        return (), False

    def _plain_ids(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _prefix_ids(self, text: str, templated: bool, image: PairImage | None) -> tuple[int, ...]:
        key = (text, templated, image)
        if key not in self._prefixes:
            self._prefixes.clear()  # both sides of a pair share their prompt; nothing older is asked for again
            self._prefixes[key] = self._ids(text, templated, image)[0]
        return self._prefixes[key]

    def _ids(
        self, text: str, templated: bool, image: PairImage | None
    ) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...] | None, SeenImage | None]:
        fast = bool(getattr(self._tokenizer, "is_fast", False))
        options = {"return_offsets_mapping": True} if fast else {}
        encoding = self._tokenizer(text, add_special_tokens=False, verbose=False, **options)
        ids = list(encoding["input_ids"])
        spans = [(int(start), int(end)) for start, end in encoding["offset_mapping"]] if fast else None
        seen: SeenImage | None = None
        if image is not None:
            assert self._images is not None
            ids, spans, seen = self._images.expanded(text, image, ids, spans)
        dropped = self._leading_bos_to_drop(ids, templated)
        front = self._front_to_add(ids[dropped:], templated)
        ids = [*front, *ids[dropped:]]
        if spans is not None:
            spans = [(0, 0)] * len(front) + spans[dropped:]
        seen = None if seen is None else seen.moved(len(front) - dropped)
        return tuple(ids), None if spans is None else tuple(spans), seen

    def _leading_bos_to_drop(self, ids: list[int], templated: bool) -> int:
        if self._bos is None:
            return 0
        count = 0
        while count < len(ids) and ids[count] == self._bos:
            count += 1
        keep = 0 if templated and self._add_bos is False else 1
        return max(count - keep, 0)

    def _front_to_add(self, ids: list[int], templated: bool) -> tuple[int, ...]:
        has_bos = self._bos is not None and ids[:1] == [self._bos]
        if templated:
            return (self._bos,) if self._add_bos is True and self._bos is not None and not has_bos else ()
        if has_bos and self._bos in self._front:
            return tuple(token for token in self._front if token != self._bos)
        return self._front

    def _front_length(self, ids: tuple[int, ...], templated: bool) -> int:
        if not templated and self._front and ids[: len(self._front)] == self._front:
            return len(self._front)
        return 1 if self._bos is not None and ids[:1] == (self._bos,) else 0

    def _by_decoding(self, rendered: RenderedText, encoded: EncodedText, after: int) -> int | None:
        """Decode growing prefixes until all but the last ``after`` characters are there."""
        whole = self._decode(encoded.ids)
        wanted = whole[: len(whole) - after]
        if len(whole) <= after or rendered.text[rendered.start : rendered.end].rstrip() not in whole:
            return None
        for index in range(encoded.continuation_start, len(encoded.ids)):
            if self._decode(encoded.ids[: index + 1]).startswith(wanted):
                return index
        return None

    def _decode(self, ids: tuple[int, ...]) -> str:
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text
