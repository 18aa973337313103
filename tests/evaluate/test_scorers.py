"""Scorers by module and by entry point, and what is said of broken ones."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from patcher.errors import InputError
from patcher.evaluate.scorers import load_scorer

WHERE = "recipe.yaml: evaluate.scorers.0"
MODULE = """
import math

def lengths(texts, prompts):
    return [len(text) - len(prompt) for text, prompt in zip(texts, prompts)]

def as_tensor(texts, prompts):
    import torch
    return torch.arange(len(texts)) / 2

class Box:
    @staticmethod
    def ones(texts, prompts):
        return (1 for _ in texts)

def raises(texts, prompts):
    raise ZeroDivisionError("no words\\nsecond line")

def short(texts, prompts):
    return [1.0]

def infinite(texts, prompts):
    return [0.0, math.inf]

def wordy(texts, prompts):
    return [0.0, "good"]

def none(texts, prompts):
    return None

number = 3
"""


@pytest.fixture(autouse=True)
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("own_scorers", "broken_scorers"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    (tmp_path / "own_scorers.py").write_text(MODULE, encoding="utf-8")
    (tmp_path / "broken_scorers.py").write_text("import surely_not_there\n", encoding="utf-8")
    info = tmp_path / "own-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: own\nVersion: 1.0\n", encoding="utf-8")
    points = "[patch_model.scorers]\nlength = own_scorers:lengths\nlost = own_scorers:nowhere\n"
    (info / "entry_points.txt").write_text(points, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("length", [2.0, 4.0]),
        ("own_scorers:lengths", [2.0, 4.0]),
        ("own_scorers:as_tensor", [0.0, 0.5]),
        ("own_scorers:Box.ones", [1.0, 1.0]),
    ],
)
def test_scores(name: str, expected: list[float]) -> None:
    found = load_scorer(name, where=WHERE).score(["abc", "abcdef"], ["a", "ab"])
    assert found == expected and all(type(value) is float for value in found)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("lenght", "did you mean `length`"),
        ("nothing-like-it", "installed: length, lost"),
        (":lengths", "no such scorer"),
        ("lost", "cannot be imported"),
        ("own_scorers:nowhere", "has no attribute 'nowhere'"),
        ("not_a_module:f", "No module named 'not_a_module'"),
        ("broken_scorers:f", "surely_not_there"),
        ("own_scorers:number", "is not a function"),
    ],
)
def test_scorers_that_cannot_be_had(name: str, says: str) -> None:
    with pytest.raises(InputError) as caught:
        load_scorer(name, where=WHERE)
    assert says in str(caught.value) and WHERE in str(caught.value) and caught.value.code == "scorer"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("raises", "ZeroDivisionError: no words (own_scorers.py:17)"),
        ("short", "1 for 2 texts"),
        ("infinite", "inf for text 1"),
        ("wordy", "'good' for text 1"),
        ("none", "TypeError"),
    ],
)
def test_scorers_that_do_not_score(name: str, says: str, tmp_path: Path) -> None:
    scorer = load_scorer(f"own_scorers:{name}", where=WHERE)
    with pytest.raises(InputError) as caught:
        scorer.score(["one", "two"], ["", ""])
    assert WHERE in str(caught.value) and f"own_scorers:{name}" in str(caught.value)
    assert says in str(caught.value).replace(f"{tmp_path}/", "")


def test_no_texts() -> None:
    assert load_scorer("length", where=WHERE).score([], []) == []
