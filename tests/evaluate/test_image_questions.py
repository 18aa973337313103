"""Held-out pairs with images: what is measured is what the stock class says, run by hand on the processor's inputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.tiny_wrappers import wrapper_checkpoint

from patcher.architectures.analysis import Architecture
from patcher.capture.forward import steering_hooks
from patcher.capture.logits import LoadedModel
from patcher.capture.model import load_causal_lm
from patcher.capture.resuming import ResumingModel
from patcher.checkpoint.prepare import read_config
from patcher.evaluate.held_out import answer_probability, log_odds, texts_of
from patcher.evaluate.questions import build_question
from patcher.evaluate.scoring import tokens_run
from patcher.pairs.formats import load_pairs
from patcher.pairs.image_prompts import ImagePrompts
from patcher.recipe.pairs import InlinePair
from patcher.recipe.vector import VectorSpec


@pytest.mark.parametrize("name", ["qwen2_5_vl", pytest.param("gemma3", marks=pytest.mark.slow)])
def test_what_is_measured_is_what_the_stock_class_says(name: str, tmp_path: Path) -> None:
    folder = wrapper_checkpoint(tmp_path / name, name)
    for number in range(2):
        pixels = np.random.default_rng(number).integers(0, 255, (40, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    model, tokenizer = load_causal_lm(folder, dtype=torch.float32, towers=True)
    architecture = Architecture(read_config(folder))
    images = ImagePrompts(folder, tokenizer, architecture)
    items = [InlinePair(prompt="What?", positive="good", negative="bad", image=f"{number}.png") for number in range(2)]
    items.append(InlinePair(prompt="How is tea?", positive="good", negative="bad"))
    spec = VectorSpec(pairs=items, layer=1)
    pairs = load_pairs(items, base_folder=folder, where="recipe.yaml: vectors.0.pairs")
    questions = [build_question(pair, tokenizer, spec, images) for pair in pairs]
    vectors = {1: torch.randn(architecture.hidden, generator=torch.Generator().manual_seed(0))}

    def by_hand(pair: int, answer: str) -> torch.Tensor:
        """The mean log-probability of an answer's tokens under the vectors."""
        content = [{"type": "image"}, {"type": "text", "text": "What?"}]
        text = images.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        pixels = [Image.open(folder / f"{pair}.png").convert("RGB")]
        inputs = images.processor(text=[text + answer], images=pixels, return_tensors="pt", add_special_tokens=False)
        with torch.no_grad(), steering_hooks(model, architecture.blocks, vectors):
            logits = model(**inputs).logits[0].log_softmax(-1)
        count = len(tokenizer(answer, add_special_tokens=False)["input_ids"])
        ids = inputs["input_ids"][0, -count:]
        return logits[-count - 1 : -1].gather(-1, ids[:, None]).mean()

    wanted = [float(by_hand(pair, "good") - by_hand(pair, "bad")) for pair in range(2)]
    plain = LoadedModel(model, architecture.blocks)
    resuming = ResumingModel(model, architecture.blocks, tokens=512, memory=1 << 26)
    for source in (plain, resuming):
        found = log_odds(source, questions, [{}, vectors], 8)
        assert found[1, :2].tolist() == pytest.approx(wanted, abs=1e-5)
        assert not torch.allclose(found[0, :2], found[1, :2], atol=1e-3)
    assert 1 not in resuming.whole
    # The image counts, and no image has to be opened to count tokens.
    assert wanted[0] != pytest.approx(wanted[1], abs=1e-4)
    assert tokens_run(plain, texts_of(questions), 8) >= sum(len(o.ids) for q in questions for o in q.options)
    lettered = [build_question(pair, tokenizer, spec, images) for pair in _lettered(folder)]
    first, second = (answer_probability(source, lettered, [{}, vectors], 8) for source in (plain, resuming))
    assert torch.allclose(first, second, atol=1e-5)


def _lettered(folder: Path) -> list:
    items = [
        InlinePair(prompt="Is it?\n (A) yes\n (B) no", positive=" (A)", negative=" (B)", image=f"{number}.png")
        for number in range(2)
    ]
    return load_pairs(items, base_folder=folder, format="ab", where="recipe.yaml: vectors.0.pairs")
