"""Prompts with images: what the model's stock processor makes of them, as ids and as inputs beside the ids."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patcher.checkpoint.folder import PROCESSOR_FILES
from patcher.errors import InputError
from patcher.errors.causes import cause_of
from patcher.pairs.images import PairImage, require_pillow
from patcher.pairs.problems import shown

if TYPE_CHECKING:
    import torch

    from patcher.architectures.analysis import Architecture

_OF_TOKENS = ("input_ids", "attention_mask")
_OF_IMAGES = frozenset({"image", "images", "img", "mm", "multimodal", "pixel", "vision", "visual", "vit"})
"""Words of names that are about images."""
_MOST_OPENED = 4
Spans = Sequence[tuple[int, int]] | None


@dataclass(frozen=True)
class SeenImage:
    """An image among the ids of a text.

    Attributes:
        image: the image.
        text: what the processor was given beside it.
        columns: where its tokens stand: the first, and one past the last.
        shift: by how much the ids are longer at the front than those of the processor.
        shapes: of the inputs that stand for it beside the ids; rows of equal shapes may be run together.
        reader: what makes these inputs.
    """

    image: PairImage
    text: str
    columns: tuple[int, int]
    shift: int
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    reader: ImagePrompts = field(compare=False, repr=False)

    @property
    def key(self) -> str:
        """Of its bytes."""
        return self.image.digest

    def moved(self, by: int) -> SeenImage:
        """The same where there are ``by`` more ids at the front."""
        return SeenImage(
            self.image,
            self.text,
            (self.columns[0] + by, self.columns[1] + by),
            self.shift + by,
            self.shapes,
            self.reader,
        )

    def inputs(self, ids: Sequence[int]) -> dict[str, torch.Tensor]:
        """What a forward pass of one row with these ids takes beside ``input_ids`` and ``attention_mask``.

        That is ``pixel_values`` and what else the processor makes. What it says of every token is [1, width].

        Raises:
            InputError: the image cannot be opened, or is not seen in these ids.
        """
        return self.reader.inputs_beside(self, ids)


class ImagePrompts:
    """What reads prompts with images for a model; nothing is loaded before the first of them.

    Args:
        folder: of the model.
        tokenizer: that prompts are read with; None where there is none.
        architecture: of the model.
        trust_remote_code: whether a processor's own code may run.
    """

    def __init__(
        self, folder: Path, tokenizer: Any, architecture: Architecture, *, trust_remote_code: bool = False
    ) -> None:
        self._folder, self._tokenizer, self._trusted = folder, tokenizer, trust_remote_code
        self._architecture = architecture
        self._expanded: dict[str, _Expansion] = {}
        self._opened = lru_cache(_MOST_OPENED)(PairImage.opened)
        self._last: tuple[tuple[str, str], Mapping[str, Any]] | None = None

    @cached_property
    def processor(self) -> Any:
        """The stock processor.

        Raises:
            InputError: the model takes no images, has no processor, or it cannot be loaded.
            MissingExtraError: Pillow is not installed.
        """
        if not takes_images(self._architecture):
            raise no_images(str(self._folder / "config.json"), f"{self._architecture.class_name} takes text alone")
        return load_processor(self._folder, self._tokenizer, trust_remote_code=self._trusted)

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer with the chat template that prompts with images go through: the processor's, if it has one."""
        template = getattr(self.processor, "chat_template", None)
        if not template or template == self._tokenizer.chat_template:
            return self._tokenizer
        changed = copy.copy(self._tokenizer)
        changed.chat_template = template
        return changed

    @cached_property
    def mark(self) -> str:
        """What stands for an image in plain text.

        Raises:
            InputError: the processor names nothing.
        """
        for name in ("image_token", "boi_token", "fake_image_token"):
            found = getattr(self.processor, name, None) or getattr(self._tokenizer, name, None)
            if found:
                return str(found)
        raise InputError(
            "the model's processor names no token for an image, so there is no plain text with one",
            where=str(self._folder),
            found=type(self.processor).__name__,
            remedy="use the chat template: give each pair a `prompt`, and leave `chat_template` out",
        )

    def expanded(
        self, text: str, image: PairImage, ids: Sequence[int], spans: Spans
    ) -> tuple[list[int], list[tuple[int, int]] | None, SeenImage]:
        """The ids of a text in which the image's own tokens stand in the place of its mark.

        Args:
            text: holds the mark of one image.
            ids, spans: of the text, as the tokenizer makes them, without special tokens at the ends.

        Returns:
            The ids, the span of characters of each (none for the image's tokens), and the image among them.

        Raises:
            InputError: the processor does not take the text with the image.
        """
        known = self._expanded.get(image.digest)
        if known is None or not known.fits(ids):
            known = self._expanded[image.digest] = self._expansion(text, image, ids)
        start, end = known.start, known.start + len(known.mark)
        middle: list[tuple[int, int]] = [(0, 0)] * len(known.tokens)
        found = [*ids[:start], *known.tokens, *ids[end:]]
        columns = (start, start + len(known.tokens))
        seen = SeenImage(image, text, columns, 0, known.shapes, self)
        return found, None if spans is None else [*spans[:start], *middle, *spans[end:]], seen

    def inputs_beside(self, seen: SeenImage, ids: Sequence[int]) -> dict[str, torch.Tensor]:
        """See :meth:`SeenImage.inputs`."""
        import torch

        made = self._outputs(seen.text, seen.image)
        own = made["input_ids"][0].tolist()
        common = own[max(0, -seen.shift) : len(ids) - seen.shift]
        if list(ids[max(0, seen.shift) : max(0, seen.shift) + len(common)]) != common:
            raise InputError(
                "the model's processor writes this prompt otherwise when it is asked again",
                where=str(seen.image.place),
                found=shown(seen.text[-100:], 110),
                remedy="report it: this processor cannot be relied on",
            )
        inputs: dict[str, torch.Tensor] = {}
        for name, value in made.items():
            if name in _OF_TOKENS or not isinstance(value, torch.Tensor):
                continue
            if _of_tokens(value, len(own)):
                of_each = torch.zeros(1, len(ids), dtype=value.dtype)
                start = max(0, seen.shift)
                part = value[:, max(0, -seen.shift) :][:, : len(ids) - start]
                of_each[:, start : start + part.shape[1]] = part
                value = of_each
            inputs[name] = value
        return inputs

    def _expansion(self, text: str, image: PairImage, ids: Sequence[int]) -> _Expansion:
        made = self._outputs(text, image)
        whole = made["input_ids"][0].tolist()
        start = _alike(ids, whole)
        rest = min(_alike(ids[::-1], whole[::-1]), min(len(ids), len(whole)) - start)
        # An image's own tokens are alike, so some of them look like the mark in the text.
        own = set(whole[start : len(whole) - rest])
        while start and whole[start - 1] in own:
            start -= 1
        while rest and whole[len(whole) - rest] in own:
            rest -= 1
        tokens, mark = whole[start : len(whole) - rest], ids[start : len(ids) - rest]
        shapes = tuple(
            (name, tuple(value.shape))
            for name, value in sorted(made.items())
            if name not in _OF_TOKENS and hasattr(value, "shape") and not _of_tokens(value, len(whole))
        )
        if not tokens or not shapes:
            raise _not_seen(self._folder, text, "it makes nothing of the image")
        return _Expansion(
            start, tuple(ids[:start]), tuple(mark), tuple(tokens), tuple(ids[len(ids) - rest :][:1]), shapes
        )

    def _outputs(self, text: str, image: PairImage) -> Mapping[str, Any]:
        key = (image.digest, text)
        if self._last is not None and self._last[0] == key:
            return self._last[1]
        given, processor = self._opened(image), self.processor
        from patcher.architectures.model_class import quiet_transformers

        try:
            with quiet_transformers():
                made: Mapping[str, Any] = processor(
                    text=[text], images=[given], return_tensors="pt", add_special_tokens=False
                )
        except MemoryError:
            raise
        except Exception as error:
            # Processors are code of many hands: what they refuse comes as errors of any type.
            raise _not_seen(self._folder, text, cause_of(error)) from None
        self._last = (key, made)
        return made


@dataclass(frozen=True)
class _Expansion:
    """How an image's mark among the ids of a text becomes its tokens.

    Attributes:
        start: where the mark begins.
        before: the ids before it.
        mark: its ids.
        tokens: what stands in their place.
        after: the id behind it, if there is one.
        shapes: see :class:`SeenImage`.
    """

    start: int
    before: tuple[int, ...]
    mark: tuple[int, ...]
    tokens: tuple[int, ...]
    after: tuple[int, ...]
    shapes: tuple[tuple[str, tuple[int, ...]], ...]

    def fits(self, ids: Sequence[int]) -> bool:
        """Whether these ids are the same up to the mark, and just behind it."""
        known = (*self.before, *self.mark, *self.after)
        behind = self.after or len(ids) == len(known)
        return bool(behind) and tuple(ids[: len(known)]) == known


def takes_images(architecture: Architecture) -> bool:
    """Whether the class that stock software loads has an input for images."""
    from patcher.architectures.model_class import on_meta

    forward = on_meta(architecture.config, trust_remote_code=architecture.trust_remote_code).forward
    return any(_OF_IMAGES.intersection(name.split("_")) for name in inspect.signature(forward).parameters)


def no_images(where: str, found: str) -> InputError:
    """The refusal of images for a model of text."""
    return InputError(
        "this model takes no images, and pairs of the recipe have some",
        where=where,
        found=found,
        remedy="leave the images out: take `image` out of the pairs, or name the other columns of the data set alone, "
        "`columns: {positive: ..., negative: ...}`; or use a model that takes images",
    )


def states_images(config: Mapping[str, Any]) -> bool:
    """Whether anything in a config.json is about images; where nothing is, the model takes none."""
    return any(
        _OF_IMAGES.intersection(str(key).lower().split("_")) or (isinstance(value, Mapping) and states_images(value))
        for key, value in config.items()
    )


def load_processor(folder: Path, tokenizer: Any, *, trust_remote_code: bool = False) -> Any:
    """The model's processor, with this tokenizer; one that lacks only torchvision for its videos is made without them.

    Raises:
        InputError: there is none, or it cannot be loaded.
        MissingExtraError: Pillow is not installed.
    """
    require_pillow()
    from transformers import AutoProcessor

    from patcher.architectures.model_class import quiet_transformers

    of_images = PROCESSOR_FILES[:2]
    if not any((folder / name).is_file() for name in of_images):
        raise InputError(
            "the model folder has no processor, and pairs with images need one",
            where=str(folder),
            found=f"no {' or '.join(of_images)}",
            remedy="put the processor's files of the model into its folder, or leave the images out of the pairs",
        )
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "local_files_only": True}
    try:
        with quiet_transformers(), _without_videos():
            processor = AutoProcessor.from_pretrained(folder, **options)
    except MemoryError:
        raise
    except Exception as error:
        # Damaged files surface as errors of any type; a package that lacks, as ImportError or ValueError.
        if "torchvision" in str(error).lower():
            raise InputError(
                "the model's processor needs the package torchvision, which is not installed",
                where=str(folder),
                found=cause_of(error),
                remedy="install the torchvision that goes with this torch, or leave the images out of the pairs",
                code="missing_extra",
            ) from None
        raise InputError(
            "the model's processor cannot be loaded",
            where=str(folder),
            found=cause_of(error),
            remedy="stock AutoProcessor.from_pretrained fails on it in the same way; correct its files",
        ) from None
    if getattr(processor, "image_processor", None) is None or getattr(processor, "tokenizer", None) is None:
        raise InputError(
            "the model's processor reads no images",
            where=str(folder),
            found=type(processor).__name__,
            remedy="leave the images out of the pairs",
        )
    if processor.tokenizer.get_vocab() != tokenizer.get_vocab():
        # That of the adapter.
        processor.tokenizer = tokenizer
    return processor


@contextlib.contextmanager
def _without_videos() -> Iterator[None]:
    """While open, and without torchvision, a processor is loaded without its part for videos, which alone needs it."""
    from transformers.models.auto import video_processing_auto
    from transformers.processing_utils import ProcessorMixin
    from transformers.utils import is_torchvision_available

    class NoVideos(dict[str, Any]):
        """Processors are written as JSON when they are made."""

    def checked(self: Any, name: str, argument: Any) -> Any:
        return None if isinstance(argument, NoVideos) else check(self, name, argument)

    videos: Any = video_processing_auto.AutoVideoProcessor
    mixin: Any = ProcessorMixin
    load, check = videos.__dict__["from_pretrained"], mixin.check_argument_for_proper_class
    if is_torchvision_available():
        yield
        return
    try:
        videos.from_pretrained = classmethod(lambda _class, *_args, **_options: NoVideos())
        mixin.check_argument_for_proper_class = checked
        yield
    finally:
        videos.from_pretrained, mixin.check_argument_for_proper_class = load, check


def _of_tokens(value: Any, width: int) -> bool:
    return value.dim() == 2 and tuple(value.shape) == (1, width)


def _alike(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens both begin with."""
    return next(
        (at for at, (one, other) in enumerate(zip(first, second, strict=False)) if one != other),
        min(len(first), len(second)),
    )


def _not_seen(folder: Path, text: str, found: str) -> InputError:
    return InputError(
        "the model's processor does not take this prompt with its image",
        where=str(folder),
        found=f"{shown(text[:100], 110)}: {found}",
        remedy="if the chat template leaves the image out, set `chat_template: false`",
    )
