"""A prompt of a text, one image and a text, for a class that takes images.

The image goes through the folder's own processor, as a stranger's does. Where that cannot be loaded, its image
processor alone makes the pixel values, or they are random in the shapes that the class takes; the number of
placeholders in the prompt is then what the class itself makes of the image.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any

import torch

SIDE = 56
"""Of the generated image, in pixels."""
BY_PROCESSOR = "its own processor"
BY_IMAGE_PROCESSOR = "its own image processor"
AT_RANDOM = "random pixel values"
TYPES = ("token_type_ids", "mm_token_type_ids")
"""Keywords that say of each token whether it stands for a part of an image."""
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
ERRORS = (
    *(RuntimeError, ValueError, TypeError, NotImplementedError, AttributeError),
    *(ImportError, KeyError, IndexError, AssertionError, OSError),
)


@dataclass
class ImagePrompt:
    """One row, and how it was made.

    Attributes:
        ids: of all tokens, placeholders included.
        pixels: the keywords of the image, which belong to the whole batch; first the pixel values.
        types: keywords with one number a token.
        by: what made the pixel values.
        why: what went wrong with a better way; empty if nothing did.
    """

    ids: list[int]
    pixels: dict[str, torch.Tensor]
    types: dict[str, list[int]]
    by: str
    why: str = ""

    def keywords(self, rows: Sequence[Sequence[int]], device: str) -> dict[str, torch.Tensor]:
        """The keywords of a batch in which one row of ids, of any padding and length, holds the image."""
        places = self.types_of(rows)
        found = {**self.pixels, **places}
        return {name: value.to(device) for name, value in found.items()}

    def types_of(self, rows: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
        marked = {
            name: {token for token, kind in zip(self.ids, kinds, strict=True) if kind}
            for name, kinds in self.types.items()
        }
        return {
            name: torch.tensor([[int(token in tokens) for token in row] for row in rows])
            for name, tokens in marked.items()
        }


Make = Callable[[], ImagePrompt]


def takes_images(model: Any) -> bool:
    """Whether the forward pass of a model's class has pixel values among its keywords."""
    return "pixel_values" in signature(type(model).forward).parameters


def image_prompt(
    model: Any,
    folder: str,
    texts: Sequence[str],
    rows: Sequence[Sequence[int]],
    run: Callable[[ImagePrompt], torch.Tensor],
    *,
    trust_remote_code: bool = False,
) -> tuple[ImagePrompt | None, str]:
    """The first prompt that the model runs, and why there is none (empty where there is one).

    Args:
        model: takes images.
        folder: holds the processor's files, or none.
        texts: what stands before and behind the image.
        rows: the same as ids.
        run: a prompt -> logits [1, positions, vocabulary].
    """
    failed: list[str] = []
    ways: dict[str, Callable[[], Iterator[Make]]] = {
        BY_PROCESSOR: partial(_by_processor, folder, texts, trust_remote_code),
        BY_IMAGE_PROCESSOR: partial(_by_image_processor, model, folder, rows, trust_remote_code),
        AT_RANDOM: partial(_at_random, model, rows),
    }
    for by, tries in ways.items():
        last = "nothing fits this class"
        try:
            for make in tries():
                try:
                    prompt = make()
                    logits = run(prompt)
                except ERRORS as error:
                    last = _said(error, folder)
                    continue
                if logits.shape[1] == len(prompt.ids) and bool(torch.isfinite(logits).all()):
                    prompt.by, prompt.why = by, "; ".join(failed)
                    return prompt, ""
                last = "the model gives no logits for it"
        except ERRORS as error:
            last = _said(error, folder)
        failed.append(f"{by}: {last}")
    return None, "; ".join(failed)


def _said(error: BaseException, folder: str) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[0].strip().replace(folder, "the folder").split(". ")[0][:200]


def _has_processor(folder: str) -> None:
    found = [name for name in PROCESSOR_FILES if os.path.exists(os.path.join(folder, name))]  # noqa: PTH110, PTH118
    if not found:
        raise ValueError("the folder has no processor files")


def _image() -> Any:
    """A picture with an edge and a slope in every channel."""
    import numpy
    from PIL import Image

    across = numpy.linspace(0, 255, SIDE)
    sides = numpy.stack(
        [numpy.add.outer(across, across) / 2, numpy.tile(across, (SIDE, 1)), 255 - across[:, None] + 0 * across]
    )
    sides[:, SIDE // 4 : SIDE // 2, SIDE // 4 : SIDE // 2] = 20
    return Image.fromarray(sides.transpose(1, 2, 0).astype("uint8"))


def _by_processor(folder: str, texts: Sequence[str], trust_remote_code: bool) -> Iterator[Make]:
    from transformers import AutoProcessor

    _has_processor(folder)
    processor = AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    if not hasattr(processor, "image_processor"):
        raise ValueError("the folder has no processor for images")
    image, before, after = _image(), f"{texts[0]} ", f" {texts[-1]}"
    tokenizer = processor.tokenizer
    words = [getattr(one, name, None) for one in (processor, tokenizer) for name in ("boi_token", "image_token")]
    for word in dict.fromkeys(word for word in words if isinstance(word, str)):
        text = [before + word + after]
        yield partial(_of_processor, partial(processor, images=[image], text=text, return_tensors="pt"))
    parts = [{"type": "text", "text": before}, {"type": "image", "image": image}, {"type": "text", "text": after}]
    chat = [{"role": "user", "content": parts}]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    yield partial(_of_processor, partial(processor.apply_chat_template, chat, **options))


def _of_processor(process: Callable[[], Mapping[str, Any]]) -> ImagePrompt:
    """What a processor makes of one text and one image."""
    given = process()
    ids = given["input_ids"]
    types = {name: given[name][0].tolist() for name in TYPES if name in given}
    pixels = {
        name: value
        for name, value in given.items()
        if isinstance(value, torch.Tensor) and name not in ("input_ids", "attention_mask", *TYPES)
    }
    if "pixel_values" not in pixels:
        raise ValueError("the processor made no pixel values")
    return ImagePrompt(ids[0].tolist(), pixels, types, BY_PROCESSOR)


def _by_image_processor(
    model: Any, folder: str, rows: Sequence[Sequence[int]], trust_remote_code: bool
) -> Iterator[Make]:
    from transformers import AutoImageProcessor

    _has_processor(folder)
    processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    made = processor(images=[_image()], return_tensors="pt")
    known = signature(type(model).forward).parameters
    pixels = {name: value for name, value in made.items() if isinstance(value, torch.Tensor) and name in known}
    yield partial(_with_placeholders, model, pixels, rows)


def _at_random(model: Any, rows: Sequence[Sequence[int]]) -> Iterator[Make]:
    for pixels in _shapes(model):
        yield partial(_with_placeholders, model, pixels, rows)


def _shapes(model: Any) -> Iterator[dict[str, torch.Tensor]]:
    """Pixel values and what goes with them, in the forms that classes take; random, the same in every process."""
    known = signature(type(model).forward).parameters
    vision = getattr(model.config, "vision_config", None) or model.config

    def number(*names: str, default: int) -> int:
        for name in names:
            value = getattr(vision, name, None)
            value = value[0] if isinstance(value, (list, tuple)) and value else value
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
        return default

    patch, channels = number("patch_size", default=14), number("in_channels", "num_channels", "in_chans", default=3)
    merge = number("spatial_merge_size", "merge_kernel_size", "pooling_kernel_size", default=2)
    merge = max(merge, int(getattr(model.config, "spatial_merge_size", None) or 1))
    frames = number("temporal_patch_size", default=1)
    side, whole = 2 * merge, number("image_size", default=2 * merge * patch)
    generator = torch.Generator().manual_seed(9)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    if "image_grid_thw" in known:
        grid = {"image_grid_thw": torch.tensor([[1, side, side]])}
        yield {"pixel_values": random(side * side, channels * frames * patch * patch), **grid}
        yield {"pixel_values": random(side * side, channels, patch, patch), **grid}
    if "image_position_ids" in known:
        count = merge * merge * number("default_output_length", default=4)
        across = int(count**0.5)
        places = torch.tensor([[[index % across, index // across] for index in range(across * across)]])
        yield {"pixel_values": random(1, across * across, channels * patch * patch), "image_position_ids": places}
    if "spatial_shapes" in known:
        yield {
            "pixel_values": random(1, side * side, channels * patch * patch),
            "spatial_shapes": torch.tensor([[side, side]]),
            "pixel_attention_mask": torch.ones(1, side * side, dtype=torch.long),
        }
    if "image_sizes" in known:
        small = side * patch
        yield {"pixel_values": random(1, channels, small, small), "image_sizes": torch.tensor([[small, small]])}
        sizes = {"image_sizes": torch.tensor([[whole, whole]])}
        yield {"pixel_values": random(1, channels, whole, whole), **sizes}
        yield {"pixel_values": random(1, 2, channels, whole, whole), **sizes}
    yield {"pixel_values": random(1, channels, whole, whole)}
    yield {"pixel_values": random(1, 1, channels, whole, whole)}


def _with_placeholders(model: Any, pixels: dict[str, torch.Tensor], rows: Sequence[Sequence[int]]) -> ImagePrompt:
    """As many placeholders as the class makes features of the image, between two texts."""
    config = model.config
    names = ("image_token_id", "image_token_index", "media_placeholder_token_id")
    token = next((value for value in (getattr(config, name, None) for name in names) if isinstance(value, int)), None)
    if token is None:
        raise ValueError("the config names no token that stands for an image")
    count = feature_count(model, pixels)
    ids = [*rows[0], *[token] * count, *rows[-1][1:]]
    known = signature(type(model).forward).parameters
    types = {name: [int(one == token) for one in ids] for name in TYPES if name in known}
    return ImagePrompt(ids, pixels, types, AT_RANDOM)


def feature_count(model: Any, pixels: Mapping[str, torch.Tensor]) -> int:
    """How many positions an image takes: the rows that the class's ``get_image_features`` gives."""
    device = model.get_input_embeddings().weight.device
    given = {name: value.to(device) for name, value in pixels.items()}
    takes = signature(model.get_image_features).parameters
    with torch.no_grad():
        made = model.get_image_features(**{name: value for name, value in given.items() if name in takes})
    made = getattr(made, "pooler_output", made)
    parts = made if isinstance(made, (list, tuple)) else [made]
    return sum(part.numel() // part.shape[-1] for part in parts)
