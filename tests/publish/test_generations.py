"""The responses that a persona vector was made of: published as they are, but for paths and tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.cards import render_card
from support.publishing import FILES, TOKEN, manifest

from patcher.checkpoint.steering_files import GENERATIONS
from patcher.patched.schema import Manifest
from patcher.publish.contents import left_over, published_files
from patcher.vectors import persona

RECORD = {"vector": "warm", "side": "positive", "question": "How?", "response": "a/b, </s> or 1/2\u2028né", "tokens": 9}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in FILES:
        (tmp_path / name).write_text(json.dumps(manifest()) if name == "steering.json" else "{}", encoding="utf-8")
    return tmp_path


def published(folder: Path, content: str) -> str:
    (folder / GENERATIONS).write_text(content, encoding="utf-8")
    files = {file.name: file for file in published_files(folder, Manifest.model_validate(manifest()))}
    assert set(files) == {*FILES, GENERATIONS}
    return files[GENERATIONS].read().decode()


def lines(*records: dict[str, Any]) -> str:
    return persona.generations_text(records)


def test_the_build_and_the_publisher_mean_the_same_file() -> None:
    assert GENERATIONS == persona.GENERATIONS


def test_what_is_clean_stays_as_it_is(folder: Path) -> None:
    content = lines(RECORD, {**RECORD, "side": "negative", "response": "/help\n/me"})
    assert published(folder, content) == content
    content = content.replace('": "', '":"')
    assert published(folder, content) == content, "to the last byte"


@pytest.mark.parametrize("key", ["system", "question", "response"])
def test_paths_and_tokens_are_cut_from_what_was_written(folder: Path, key: str) -> None:
    dirty = {**RECORD, key: f"Read /home/alice/notes/secret.txt first,\nor C:\\Users\\alice\\x.txt with {TOKEN}"}
    first, second = published(folder, lines(dirty, RECORD)).rstrip("\n").split("\n")
    assert "alice" not in first and TOKEN not in first
    assert json.loads(first)[key] == "Read secret.txt first,\nor x.txt with hf_***"
    assert second + "\n" == lines(RECORD)


def test_a_line_that_is_no_record_is_cleaned_too(folder: Path) -> None:
    assert published(folder, f"see /home/alice/x/y {TOKEN}\n[3]\n") == "see y hf_***\n[3]\n"


def test_another_vectors_responses_go(folder: Path) -> None:
    assert left_over([GENERATIONS, "README.md", "notes.jsonl"], ["README.md"]) == [GENERATIONS]
    assert left_over([GENERATIONS], [GENERATIONS]) == []
    (folder / "notes.jsonl").write_text("{}", encoding="utf-8")
    assert "notes.jsonl" not in published(folder, "")


def test_the_card_says_what_the_vector_is() -> None:
    edit = {**manifest()["edits"][0], "method": "persona"}
    recipe = {"text": "", "resolved": {"vectors": [{"name": "love", "method": "persona", "questions": "q.txt"}]}}
    card = render_card(manifest(edits=[edit], recipe=recipe), None)
    assert "mean difference of the model's own responses under opposite personas" in card
    assert "2507.21509" in card and "2312.06681" not in card
