"""The quickstart's model: small, reproducible text, and steering that really shows."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

from patcher.architectures.analysis import Architecture
from patcher.capture.forward import steering_hooks
from patcher.capture.logits import LoadedModel
from patcher.capture.model import load_causal_lm
from patcher.capture.reader import reader_in_memory
from patcher.demo import demo_folder
from patcher.demo.write import write_demo
from patcher.errors import InputError
from patcher.evaluate.held_out import answer_probability
from patcher.evaluate.questions import build_question
from patcher.pairs.formats import load_pairs
from patcher.pairs.pair import ContrastPair
from patcher.recipe.file import load_recipe
from patcher.recipe.schema import Recipe, recipe_schema
from patcher.vectors.finding import find_vectors, prepare_vectors
from patcher.vectors.steering_vector import sum_by_layer
from tools.demo.grammar import PAIRS_SEED, TEST_SEED, documents, questions
from tools.demo.words import ADJECTIVES
from tools.demo.write_pairs import neutral_text, pairs_text

RECIPES = Path(__file__).parents[2] / "recipes"
LIMIT = 4_000_000


@pytest.fixture(scope="module")
def steering() -> tuple[torch.nn.Module, object, dict[int, torch.Tensor]]:
    """The model and what the quickstart's recipe adds at coefficient 1."""
    path = demo_folder() / "quickstart.yaml"
    loaded = load_recipe(path, ("vectors.0.coefficient=1",))
    model, tokenizer = load_causal_lm(demo_folder() / "model", dtype=torch.float32)
    prepared = prepare_vectors(loaded, tokenizer, model.config.num_hidden_layers)
    reader = reader_in_memory(model, Architecture(model.config))
    found = find_vectors(prepared, reader, neutral=[])
    return model, tokenizer, sum_by_layer(found)


def scaled(vectors: dict[int, torch.Tensor], coefficient: float) -> dict[int, torch.Tensor]:
    return {layer: coefficient * vector for layer, vector in vectors.items()}


def test_the_grammar_repeats_itself_for_the_same_seed_only() -> None:
    assert list(documents(5, 20)) == list(documents(5, 20)) != list(documents(6, 20))
    assert questions(5, 20) == questions(5, 20) != questions(6, 20)
    first = sum(question.text.index(question.answers["positive"]) < question.text.index(question.answers["negative"])
                for question in questions(5, 200))  # fmt: skip
    assert 70 < first < 130


def test_the_package_stays_small() -> None:
    size = sum(item.stat().st_size for item in (demo_folder() / "model").iterdir())
    assert size <= LIMIT


def test_the_neutral_texts_are_the_grammars() -> None:
    text = (demo_folder() / "neutral.txt").read_text(encoding="utf-8")
    assert text == neutral_text() and len(text.splitlines()) == 60
    loaded = {word for words in ADJECTIVES.values() for word in words}
    assert not loaded & set(text.lower().replace(".", " ").split())


def test_the_pairs_are_the_grammars() -> None:
    assert (demo_folder() / "pairs.jsonl").read_text(encoding="utf-8") == pairs_text()
    rows = load_pairs("pairs.jsonl", base_folder=demo_folder(), where="test")
    assert len(rows) == 120
    assert {row.positive.strip() for row in rows} <= set(ADJECTIVES["positive"])
    assert {row.negative.strip() for row in rows} <= set(ADJECTIVES["negative"])


def test_both_recipes_say_the_same() -> None:
    def resolved(path: Path) -> Recipe:
        return load_recipe(path).recipe

    packaged, shown = resolved(demo_folder() / "quickstart.yaml"), resolved(RECIPES / "quickstart.yaml")
    moved = shown.model_dump()
    moved["model"] = "./model" if packaged.model == "./model" else "model"
    moved["vectors"][0]["pairs"] = packaged.vectors[0].pairs
    moved["evaluate"]["neutral"] = packaged.evaluate.neutral
    assert packaged.model_dump() == moved


def test_the_schema_beside_the_recipes_is_current() -> None:
    written = json.loads((RECIPES / "recipe.schema.json").read_text(encoding="utf-8"))
    assert written == recipe_schema(), "regenerate it: patch-model schema > recipes/recipe.schema.json"


def test_the_probability_of_the_matching_answer_rises_with_the_coefficient(steering) -> None:
    model, tokenizer, vectors = steering
    seen = {question.text for question in questions(PAIRS_SEED, 120)}
    asked = [question for question in questions(TEST_SEED, 80) if question.text not in seen][:50]
    held_out = [
        ContrastPair(question.text, f" {question.answers['positive']}", f" {question.answers['negative']}", "test",
                     tuple(f" {answer}" for answer in question.answers.values()), "ab")
        for question in asked
    ]  # fmt: skip
    spec = load_recipe(demo_folder() / "quickstart.yaml").recipe.vectors[0]
    options = [build_question(pair, tokenizer, spec) for pair in held_out]

    def p_match(coefficient: float) -> float:
        source = LoadedModel(model, "model.layers")
        return float(answer_probability(source, options, [scaled(vectors, coefficient)], 16).mean())

    measured = [p_match(coefficient) for coefficient in (-2, -1, 0, 1, 2)]
    assert all(low < high for low, high in itertools.pairwise(measured)), measured
    assert measured[0] < 0.35 and 0.35 < measured[2] < 0.65 and measured[-1] > 0.65, measured


def test_completions_turn(steering) -> None:
    model, tokenizer, vectors = steering

    def balance(coefficient: float) -> int:
        torch.manual_seed(0)
        prompts = ["the film was", "The kettle", "I think that the"]
        total = 0
        with steering_hooks(model, "model.layers", scaled(vectors, coefficient)):
            for prompt in prompts:
                ids = torch.tensor([tokenizer(prompt)["input_ids"]] * 6)
                made = model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=30,
                    do_sample=True,
                    pad_token_id=3,
                )
                for text in tokenizer.batch_decode(made, skip_special_tokens=True):
                    words = text.lower().replace(".", " ").replace(",", " ").split()
                    total += sum(word in ADJECTIVES["positive"] for word in words)
                    total -= sum(word in ADJECTIVES["negative"] for word in words)
        return total

    down, up = balance(-2), balance(2)
    assert down < -5 < 5 < up, (down, up)


def test_the_demo_is_written_once(tmp_path: Path) -> None:
    recipe = write_demo(tmp_path / "demo")
    load_recipe(recipe)
    assert (tmp_path / "demo" / "model" / "model.safetensors").is_file()
    assert (tmp_path / "demo" / "recipe.schema.json").is_file()
    with pytest.raises(InputError, match="not empty"):
        write_demo(tmp_path / "demo")
