"""Activations of prompts with images: those of the stock class, run by hand on what the stock processor makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.tiny_wrappers import wrapper_checkpoint

from patcher.architectures.analysis import Architecture
from patcher.capture.batches import image_batches
from patcher.capture.model import load_causal_lm
from patcher.capture.reader import reader_in_memory
from patcher.checkpoint.prepare import read_config
from patcher.pairs.formats import load_pairs
from patcher.pairs.image_prompts import ImagePrompts
from patcher.pairs.tokens import tokenise_pairs
from patcher.recipe.pairs import InlinePair
from patcher.recipe.vector import VectorSpec

WITHOUT_TORCHVISION = ["gemma3", "qwen2_5_vl", "qwen3_vl", "llava", "internvl", "glm4v", "gemma4"]
WITH_TORCHVISION = ["mistral3", "kimi_k25"]
QUESTIONS = ("What is it?", "What is it?", "Is it good? It is long.")
ANSWERS = ((" yes", " no!"), (" yes", " no!"), (" (A)", " (B)"))


def save_images(folder: Path) -> list[str]:
    """Two random images of equal sizes, and one of another."""
    for number, size in enumerate([(40, 30), (40, 30), (20, 44)]):
        pixels = np.random.default_rng(number).integers(0, 255, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return [f"{number}.png" for number in range(3)]


def opened(folder: Path, template: str = "auto") -> tuple[Any, Any, Any, list[Any]]:
    """The model, its architecture, what reads its images, and tokenised pairs: three with an image, one without."""
    model, tokenizer = load_causal_lm(folder, dtype=torch.float32, towers=True)
    names = save_images(folder)
    items = [
        InlinePair(prompt=question, positive=positive, negative=negative, image=name)
        for question, (positive, negative), name in zip(QUESTIONS, ANSWERS, names, strict=True)
    ]
    items.append(InlinePair(prompt="How are you?", positive="well", negative="ill"))
    spec = VectorSpec(pairs=items, layer=1, position="answer", chat_template=template)
    architecture = Architecture(read_config(folder))
    images = ImagePrompts(folder, tokenizer, architecture)
    pairs = load_pairs(items, base_folder=folder, where="recipe.yaml: vectors.0.pairs")
    found, _notes = tokenise_pairs(pairs, tokenizer, spec, images)
    return model, architecture, images, found


def by_hand(model: Any, processor: Any, blocks: str, question: str, answer: str, image: Path) -> torch.Tensor:
    """[blocks, width, hidden] of one prompt: a plain hook on the stock class, the stock processor's own inputs."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    pixels = Image.open(image).convert("RGB")
    inputs = processor(text=[text + answer], images=[pixels], return_tensors="pt", add_special_tokens=False)
    seen: list[torch.Tensor] = []

    def keep(_block: Any, _inputs: Any, output: Any) -> None:
        seen.append(output if isinstance(output, torch.Tensor) else output[0])

    hooks = [block.register_forward_hook(keep) for block in model.get_submodule(blocks)]
    with torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    return torch.cat(seen)


@pytest.mark.slow_but("gemma3", "qwen2_5_vl")
@pytest.mark.parametrize("name", [*WITHOUT_TORCHVISION, *WITH_TORCHVISION])
def test_what_is_read_is_what_a_plain_hook_on_the_stock_class_sees(name: str, tmp_path: Path) -> None:
    if name in WITH_TORCHVISION:
        pytest.importorskip("torchvision")
    folder = wrapper_checkpoint(tmp_path / name, name)
    model, architecture, images, pairs = opened(folder)
    sides = [side for pair in pairs for side in (pair.positive, pair.negative)]
    layers = [0, architecture.block_count - 1]
    [found] = reader_in_memory(model, architecture).read([(sides, layers)])
    number = 0
    for question, answers, image in zip(QUESTIONS, ANSWERS, save_images(folder), strict=True):
        for answer in answers:
            wanted = by_hand(model, images.processor, architecture.blocks, question, answer.strip(), folder / image)
            [at] = sides[number].read
            assert wanted.shape[1] == len(sides[number].ids)
            for layer in layers:
                assert (found[layer].read[number] - wanted[layer, at]).abs().max() <= 1e-5 * wanted.abs().max()
            norms = wanted[layers[1]].norm(dim=-1)[1:]
            start, end = sides[number].image.columns
            counted = torch.cat([norms[: start - 1], norms[end - 1 :]])
            assert found[layers[1]].tokens[number] == len(counted)
            assert found[layers[1]].norm_sums[number] == pytest.approx(float(counted.sum()), rel=1e-4)
            number += 1
    # The image counts: another one gives another residual, at the same tokens.
    assert sides[0].ids == sides[2].ids
    last = found[layers[1]].read
    assert not torch.allclose(last[0], last[2], atol=1e-3)


@pytest.mark.parametrize("name", ["gemma3", "qwen2_5_vl"])
def test_rows_of_equal_shapes_are_run_together_and_give_the_same(name: str, tmp_path: Path) -> None:
    folder = wrapper_checkpoint(tmp_path / name, name)
    model, architecture, _images, pairs = opened(folder)
    sides = [side for pair in pairs[:2] for side in (pair.positive, pair.negative)]
    together = list(image_batches(sides, range(4), token_budget=512))
    assert next(iter(together)).shape[0] > 1
    [found] = reader_in_memory(model, architecture).read([(sides, [2])])
    [alone] = reader_in_memory(model, architecture, batch_size=1).read([(sides, [2])])
    assert torch.allclose(found[2].read, alone[2].read, atol=1e-5)
    first, second = together[0].halves()
    assert first.images + second.images == together[0].images
