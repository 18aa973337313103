"""Recipes, and the rows, questions and passages that they name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from support.fuzz import seeds
from support.fuzz.registry import each, reader
from support.fuzz.stock import same_pairs, same_yaml
from support.fuzz.watch import Case

from patcher.evaluate.texts import read_passages
from patcher.pairs.formats import load_pairs
from patcher.pairs.questions import load_questions
from patcher.recipe.file import load_recipe
from patcher.routes.rank_one.calibration import load_calibration

_AS_JSON = json.dumps(yaml.safe_load(seeds.RECIPE)).encode()


@reader(
    "recipe",
    each("recipe.yaml", seeds.RECIPE.encode(), _AS_JSON),
    lambda folder, found: same_yaml(folder / "recipe.yaml", found),
)
def _recipe(folder: Path, _out: Path) -> Any:
    return load_recipe(folder / "recipe.yaml").recipe


@reader("recipe --set", each("set", b"vectors.0.coefficient=2", b"evaluate={limit: 3}", b"push.repo='a/b'"))
def _overrides(folder: Path, out: Path) -> Any:
    (out / "case.yaml").write_text(seeds.RECIPE, encoding="utf-8")
    override = (folder / "set").read_bytes().decode("utf-8", "surrogateescape")
    return load_recipe(out / "case.yaml", (override,)).recipe


def _rows(suffix: str) -> list[Case]:
    texts: list[str] = []
    for rows in (seeds.PAIRS, seeds.QUESTIONS):
        if suffix == "json":
            texts += [json.dumps(rows, indent=1), json.dumps({"pairs": rows})]
        elif suffix == "jsonl":
            texts.append("\n".join(map(json.dumps, rows)))
        else:
            keys = list(dict.fromkeys(key for row in rows for key in row))
            lines = [",".join(keys)]
            lines += [",".join('"' + row.get(key, "").replace('"', '""') + '"' for key in keys) for row in rows]
            texts.append("\r\n".join(lines))
    return [{f"pairs.{suffix}": text.encode()} for text in texts]


def _add_pairs(suffix: str) -> None:
    @reader(
        f"pairs .{suffix}", lambda: _rows(suffix), lambda folder, found: same_pairs(folder / f"pairs.{suffix}", found)
    )
    def read(folder: Path, _out: Path) -> Any:
        return load_pairs(f"pairs.{suffix}", base_folder=folder, where="recipe.yaml: vectors.0.pairs")


for _suffix in ("json", "jsonl", "csv"):
    _add_pairs(_suffix)


def _question_files() -> list[Case]:
    texts = ["What is it?", {"question": "Why?"}, {"prompt": "How?"}]
    return [
        {"questions.json": json.dumps({"questions": texts}).encode()},
        {"questions.json": json.dumps(texts).encode()},
        {"questions.jsonl": "\n".join(map(json.dumps, texts)).encode()},
        {"questions.txt": b"What?\n\nWhy?\n"},
        {"questions.csv": b"question\nWhat?\n"},
    ]


@reader("questions", _question_files)
def _questions(folder: Path, _out: Path) -> Any:
    name = next(item.name for item in folder.iterdir())
    return load_questions(name, base_folder=folder, where="recipe.yaml: vectors.0.questions")


@reader(
    "calibration", lambda: [{"t.jsonl": b'{"text": "One."}\n{"text": "Two."}\n'}, {"t.txt": b"One.\n\nAnother\none."}]
)
def _calibration(folder: Path, _out: Path) -> Any:
    return load_calibration(next(item.name for item in folder.iterdir()), folder)


@reader("passages", each("t.txt", b"One passage.\nAnother one.\n"))
def _passages(folder: Path, _out: Path) -> Any:
    return read_passages(folder / "t.txt", "evaluate.on_topic")
