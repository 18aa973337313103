"""Questions that the model is to answer: every form they come in, and what a refusal says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from patcher.errors import InputError, OutsideError
from patcher.pairs.questions import load_questions

WHERE = "recipe.yaml: vectors.0.questions"
TEXTS = ["Who are you?", "What is a good day?"]


def load(folder: Path, name: str, content: str | bytes) -> list[tuple[str | None, str]]:
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    found = load_questions(name, base_folder=folder, where=WHERE)
    assert all((pair.positive, pair.negative, pair.format) == ("", "", "pairs") for pair in found)
    return [(pair.prompt, pair.origin) for pair in found]


def refusal(folder: Path, source: Any) -> InputError:
    with pytest.raises(InputError) as caught:
        load_questions(source, base_folder=folder, where=WHERE)
    assert caught.value.exit_code == 2
    return caught.value


def test_a_list_in_the_recipe(tmp_path: Path) -> None:
    found = load_questions([" Who are you?\n", TEXTS[1], TEXTS[0]], base_folder=tmp_path, where=WHERE)
    assert [pair.prompt for pair in found] == TEXTS  # once each
    assert [pair.origin for pair in found] == [f"{WHERE}.0", f"{WHERE}.1"]


def test_text_one_a_line(tmp_path: Path) -> None:
    found = load(tmp_path, "q.txt", "\ufeff Who are you?\r\n\n  \nWhat is a good day?\nWho are you?\n")
    assert found == [(TEXTS[0], "q.txt:1"), (TEXTS[1], "q.txt:4")]


@pytest.mark.parametrize(
    "document",
    [
        TEXTS,
        [{"question": text, "answer": 3} for text in TEXTS],
        [{"prompt": text} for text in TEXTS],
        [TEXTS[0], {"question": TEXTS[1]}],
        {"questions": TEXTS, "instruction": [{"pos": "Be good.", "neg": "Be bad."}], "eval_prompt": "?"},
    ],
)
def test_json(tmp_path: Path, document: Any) -> None:
    assert [text for text, _ in load(tmp_path, "q.json", json.dumps(document, indent=1))] == TEXTS


def test_json_says_where(tmp_path: Path) -> None:
    assert load(tmp_path, "q.json", json.dumps(TEXTS))[1] == (TEXTS[1], "q.json[1]")
    assert load(tmp_path, "t.json", json.dumps({"questions": TEXTS}))[1] == (TEXTS[1], "t.json: questions[1]")


@pytest.mark.parametrize("name", ["q.jsonl", "q.ndjson"])
def test_json_lines(tmp_path: Path, name: str) -> None:
    text = '{"question": "Who are\u2028you?"}\n\n"What is a good day?"\r\n'
    assert load(tmp_path, name, text) == [("Who are\u2028you?", f"{name}:1"), (TEXTS[1], f"{name}:3")]


def test_csv(tmp_path: Path) -> None:
    found = load(tmp_path, "q.csv", 'id,question\n1,Who are you?\n2,"What is\na good day?"\n')
    assert found == [("Who are you?", "q.csv:2"), ("What is\na good day?", "q.csv:3")]


def test_paths_are_relative_to_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "q.txt").write_text(TEXTS[0], encoding="utf-8")
    assert load_questions("data/q.txt", base_folder=tmp_path, where=WHERE)[0].origin == "data/q.txt:1"
    assert load_questions(str(tmp_path / "data" / "q.txt"), base_folder=Path("/"), where=WHERE)[0].prompt == TEXTS[0]


@pytest.mark.parametrize(
    ("name", "content", "where", "said"),
    [
        ("q.txt", "\n \n", "q.txt", "there are no questions"),
        ("q.json", "", "q.json", "there are no questions"),
        ("q.json", "[]", "q.json", "there are no questions"),
        ("q.json", '["a",\n "b" "c"]', "q.json:2", "broken JSON at column 6"),
        ("q.json", '{"question": "a"}', "q.json", 'or {"questions": [...]}'),
        ("q.json", "[" * 100_000, "q.json", "cannot be read"),
        ("q.json", '["a", ""]', "q.json[1]", "this question is empty"),
        ("q.json", '["a", 3]', "q.json[1]", "found:  int: 3"),
        ("q.json", '[{"question": null}]', "q.json[0]", "a question is a text"),
        ("q.json", '[{"qestion": "a"}]', "q.json[0]", "did you mean this by `qestion`? Name it `question`"),
        ("q.json", '[{"text": "a"}]', "q.json[0]", "found:  keys: text"),
        ("q.json", '["\\ud800"]', "q.json[0]", "surrogate"),
        ("q.jsonl", '"a"\n{"question": \n', "q.jsonl:2", "cannot be read"),
        ("q.csv", "name\nx\n", "q.csv:2", "the key `question` is missing"),
        ("q.txt", b"a\xff", "q.txt", "not UTF-8"),
        ("q.docx", "a", WHERE, "one on each line"),
    ],
)
def test_refusals_name_the_place(tmp_path: Path, name: str, content: str | bytes, where: str, said: str) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    error = refusal(tmp_path, name)
    assert error.problems[0].where == where
    assert said in str(error)


def test_all_bad_questions_are_named_at_once(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text('"a"\n{}\n3\n""\n{"q\n', encoding="utf-8")
    where = [problem.where for problem in refusal(tmp_path, "q.jsonl").problems]
    assert sorted(filter(None, where)) == ["q.jsonl:2", "q.jsonl:3", "q.jsonl:4", "q.jsonl:5"]


def test_files_that_are_not_there(tmp_path: Path) -> None:
    assert "no such file" in str(refusal(tmp_path, "none.txt"))
    (tmp_path / "folder.txt").mkdir()
    assert "a folder, not a file" in str(refusal(tmp_path, "folder.txt"))
    assert "cannot be the path" in str(refusal(tmp_path, "a\0.txt"))
    assert "cannot be followed" in str(refusal(tmp_path, "~no-such-user-here/q.txt"))
    assert "there are no questions" in str(refusal(tmp_path, []))
    with pytest.raises(OutsideError):
        load_questions("x" * 300 + ".txt", base_folder=tmp_path, where=WHERE)
