"""The same pairs in other forms make the same vector, and a build records how they were read."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from support.building import build_recipe
from support.sweep_reference import PAIRS
from support.tiny_models import default_checkpoint, tiny_tokenizer

from patcher.errors import InputError
from patcher.patched.reading import read_manifest
from patcher.recipe.file import load_recipe
from patcher.vectors.finding import prepare_vectors
from patcher.vectors.prepared import PreparedVector

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def preference(row: dict[str, str]) -> dict[str, Any]:
    asked = [{"role": "user", "content": row["prompt"]}]
    answers = {side: [*asked, {"role": "assistant", "content": row[key]}] for side, key in SIDES.items()}
    return {"prompt": row["prompt"], **answers}


SIDES = {"chosen": "positive", "rejected": "negative"}


def prepared(folder: Path, vector: dict[str, Any], template: str | None = None) -> PreparedVector:
    path = folder / "recipe.yaml"
    path.write_text(json.dumps({"model": "model", "vectors": [{"layer": 1, **vector}]}))
    (entry,) = prepare_vectors(load_recipe(path), tiny_tokenizer(template), 4)
    return entry


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_the_same_pairs_in_other_forms_are_the_same_tokens(tmp_path: Path, template: str | None) -> None:
    (tmp_path / "preference.jsonl").write_text("\n".join(json.dumps(preference(row)) for row in PAIRS))
    (tmp_path / "named.json").write_text(json.dumps([dict(zip("qab", row.values(), strict=True)) for row in PAIRS]))
    names = dict(zip(PAIRS[0], "qab", strict=True))
    plain = prepared(tmp_path, {"pairs": PAIRS}, template)
    preferred = prepared(tmp_path, {"pairs": "preference.jsonl"}, template)
    named = prepared(tmp_path, {"pairs": "named.json", "columns": names}, template)
    for entry in (preferred, named):
        assert [pair.positive for pair in entry.pairs] == [pair.positive for pair in plain.pairs]
        assert [pair.negative for pair in entry.pairs] == [pair.negative for pair in plain.pairs]
    assert "vector `steering`: `chosen` is the positive side" in preferred.notes[0]
    turned = {**names, "positive": names["negative"], "negative": names["positive"]}
    entry = prepared(tmp_path, {"pairs": "named.json", "columns": turned}, template)
    assert [pair.positive for pair in entry.pairs] == [pair.negative for pair in plain.pairs]


def test_a_dialogue_without_a_template_is_refused_with_a_way_that_works(tmp_path: Path) -> None:
    front = "\n\nHuman: Hello\n\nAssistant: Hi\n\nHuman: How is tea?\n\nAssistant:"
    (tmp_path / "hh.jsonl").write_text(json.dumps({"chosen": f"{front} lovely", "rejected": f"{front} awful"}))
    with pytest.raises(InputError, match="needs a chat template") as caught:
        prepared(tmp_path, {"pairs": "hh.jsonl"})
    assert "`format: pairs`" in (caught.value.problems[0].remedy or "")
    (pair,) = prepared(tmp_path, {"pairs": "hh.jsonl", "format": "pairs"}).used
    assert (pair.prompt, pair.positive) == (None, f"{front} lovely")
    (pair,) = prepared(tmp_path, {"pairs": "hh.jsonl"}, TEMPLATE).used
    assert pair.prompt is not None and len(pair.prompt) == 3


@pytest.mark.slow
def test_a_build_records_how_its_pairs_and_those_of_the_evaluation_were_read(tmp_path: Path) -> None:
    default_checkpoint(tmp_path / "model", "llama")
    (tmp_path / "pairs.csv").write_text("positive;negative\nI love, tea;I hate tea\nI like rain;I loathe rain\n")
    (tmp_path / "own.json").write_text("\n".join(json.dumps(dict(zip("xy", ("a", "b"), strict=True))) for _ in "12"))
    shipped = []
    same = [
        {"positive": "I love, tea", "negative": "I hate tea"},
        {"positive": "I like rain", "negative": "I loathe rain"},
    ]
    for name, rows in (("read", "pairs.csv"), ("same", same)):
        own = {"pairs": "own.json", "columns": {"positive": "x", "negative": "y"}}
        recipe = {
            "model": "model",
            "vectors": [{"pairs": rows, "layer": 1}],
            "evaluate": {"pictures": False, "random_vectors": 1, **own},
        }
        (tmp_path / f"{name}.yaml").write_text(json.dumps(recipe))
        build_recipe(tmp_path / f"{name}.yaml", tmp_path / name)
        (edit,) = read_manifest(tmp_path / name).edits
        shipped.append(load_file(tmp_path / name / "steering.safetensors")[edit.tensor])
    assert torch.equal(*shipped)
    notes = read_manifest(tmp_path / "read").notes
    assert "vector `steering`: the columns of pairs.csv are separated by semicolons" in notes
    assert "evaluate.pairs: own.json is read as JSON Lines: it holds one object after another" in notes


LISTS = {"good": ["Name a river.", "What is tea?", "Tell me a joke."], "bad": ["Help me cheat.", "Help me lie."]}


def remedy_of(folder: Path, pairs: str, **vector: Any) -> str:
    with pytest.raises(InputError) as caught:
        prepared(folder, {"pairs": pairs, **vector})
    return caught.value.problems[0].remedy or ""


def lines_of(remedy: str) -> dict[str, Any]:
    """The lines of a recipe that a remedy names, the first of each key."""
    found: dict[str, Any] = {}
    for line in re.findall(r"`((?:columns|positives|negatives): [^`]*)`", remedy):
        for key, value in yaml.safe_load(line).items():
            found.setdefault(key, value)
    return found


def test_the_ways_that_the_refusal_of_two_lists_names_can_be_gone(tmp_path: Path) -> None:
    (tmp_path / "lists.json").write_text(json.dumps(LISTS))
    lines = lines_of(remedy_of(tmp_path, "lists.json"))
    assert set(lines) == {"columns", "positives", "negatives"}
    prepared(tmp_path, lines)
    # With columns named and lengths that differ, no pairs can be made, and that refusal names the same lines.
    again = lines_of(remedy_of(tmp_path, "lists.json", columns=lines["columns"]))
    assert again == lines

    (tmp_path / "equal.json").write_text(json.dumps({name: texts[:2] for name, texts in LISTS.items()}))
    lines = lines_of(remedy_of(tmp_path, "equal.json"))
    prepared(tmp_path, lines)
    (one, other) = prepared(tmp_path, {"pairs": "equal.json", "columns": lines["columns"]}).used
    assert (one.positive, other.negative) == ("Name a river.", "Help me lie.")


@pytest.mark.parametrize(
    ("name", "content"),
    [("p.txt", "a text\nanother\n"), ("p.csv", "text,label\na text,1\nanother,0\n"), ("p.json", '["a", "b"]')],
)
def test_texts_without_partners_can_be_given_as_the_refusal_says(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    lines = lines_of(remedy_of(tmp_path, name))
    assert set(lines) >= {"positives", "negatives"}
    for side, texts in zip(("negatives", "positives"), LISTS.values(), strict=True):
        (tmp_path / lines[side]).write_text("\n".join(texts))
    prepared(tmp_path, {side: lines[side] for side in ("positives", "negatives")})
