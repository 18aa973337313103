"""What needs no torch to be seen as wrong is told without it: in these processes, importing it is an error."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from patcher.build import early_checks
from patcher.pairs import formats
from patcher.recipe.file import load_recipe

BLOCKER = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers"):
            raise SystemExit(f"{name} is imported")

sys.meta_path.insert(0, Blocked())
"""
CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 8, "intermediate_size": 16,
    "num_hidden_layers": 4, "num_attention_heads": 2, "vocab_size": 16,
}  # fmt: skip
PAIR = {"positive": "I love it", "negative": "I hate it"}
NO_WEIGHTS = b"\x02\x00\x00\x00\x00\x00\x00\x00{}"
Change = Callable[[Path, dict[str, Any]], None]


def vector(**keys: Any) -> Change:
    return lambda _place, recipe: recipe["vectors"][0].update(keys)


def without_pairs(**keys: Any) -> Change:
    def change(_place: Path, recipe: dict[str, Any]) -> None:
        del recipe["vectors"][0]["pairs"]
        recipe["vectors"][0].update(keys)

    return change


def top(**keys: Any) -> Change:
    return lambda _place, recipe: recipe.update(keys)


def put(name: str, content: str | bytes, change: Change = lambda _place, _recipe: None) -> Change:
    def changed(place: Path, recipe: dict[str, Any]) -> None:
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        change(place, recipe)

    return changed


def config(**keys: Any) -> Change:
    return put("model/config.json", json.dumps({**CONFIG, **keys}))


def removed(name: str) -> Change:
    return lambda place, _recipe: (place / name).unlink()


MISTAKES: dict[str, tuple[Change, str]] = {
    "an unknown key": (top(modle="x"), "unknown key `modle`"),
    "a negative layer": (vector(layer=-1), "layers are not counted from the end"),
    "no such folder": (top(model="./nowhere"), "./nowhere"),
    "no config.json": (removed("model/config.json"), "config.json"),
    "a config.json that is cut off": (put("model/config.json", '{"model_type": '), "config.json is not JSON"),
    "a classifier": (config(architectures=["LlamaForSequenceClassification"]), "LlamaForSequenceClassification"),
    "a model that cannot be": (config(num_hidden_layers=10**9), "num_hidden_layers"),
    "no weights": (removed("model/model.safetensors"), "weights"),
    "weights that are cut off": (put("model/model.safetensors", b"\x00\x01"), "truncated"),
    "a layer beyond the last": (vector(layer=4), "the model has 4 decoder blocks"),
    "a read layer beyond the last": (vector(read_layer=9), "the model has 4 decoder blocks"),
    "a layer that is named twice": (vector(layer=[1, "25%"]), "block 1 is named twice"),
    "no such pairs": (vector(pairs="nowhere.jsonl"), "there is no such file"),
    "a row without its other side": (put("p.jsonl", '{"positive": "a"}\n', vector(pairs="p.jsonl")), "p.jsonl"),
    "a row that is no JSON": (put("p.jsonl", "{positive: a}\n", vector(pairs="p.jsonl")), "p.jsonl"),
    "pairs of a spreadsheet": (put("p.xlsx", "x", vector(pairs="p.xlsx")), "Excel workbook"),
    "a column that is not there": (
        put("p.csv", "a,b\nx,y\n", vector(pairs="p.csv", columns={"positive": "a", "negative": "c"})),
        "`c`",
    ),
    "a list that is empty": (
        put("p.txt", "\n", without_pairs(positives="p.txt", negatives=["x", "y"])),
        "p.txt",
    ),
    "no such questions": (
        without_pairs(method="persona", personas={"positive": "be kind", "negative": "be rude"}, questions="q.txt"),
        "q.txt",
    ),
    "no such vector file": (without_pairs(method="file", file="v.safetensors"), "there is no such vector file"),
    "a vector file that is cut off": (
        put("v.safetensors", b"\x90\x01", without_pairs(method="file", file="v.safetensors")),
        "this cannot be read as a safetensors file",
    ),
    "a vector file of another kind": (
        put("v.npy", "text", without_pairs(method="file", file="v.npy")),
        "does not begin as a .npy file does",
    ),
    "a pointer in the place of a vector": (
        put(
            "v.safetensors",
            "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
            without_pairs(method="file", file="v.safetensors"),
        ),
        "Git LFS pointer",
    ),
    "an adapter that is a file": (put("adapter", "x", top(adapter="adapter")), "an adapter is a folder"),
    "an adapter of another tool": (
        put(
            "adapter/adapter_config.json",
            '{"rank": 4}',
            put("adapter/adapter_model.safetensors", NO_WEIGHTS, top(adapter="adapter")),
        ),
        "names no `peft_type`",
    ),
    "an output in the way": (put("steered/notes.txt", "mine"), "steered"),
    "an output in the base": (top(output="model/steered"), "model"),
    "a device that there is not": (top(device="gpu"), "there is no such device"),
    "no such pairs to measure": (top(evaluate={"pairs": "nowhere.jsonl"}), "evaluate.pairs"),
    "no such neutral text": (top(evaluate={"neutral": "nowhere.txt"}), "nowhere.txt"),
    "a repository that has two owners": (top(push={"repo": "me/my/steered"}), "push.repo"),
}


ALL = """
import contextlib, io, json, os, sys
from patcher.cli import main

found = []
for place, arguments in json.load(sys.stdin):
    os.chdir(place)
    out, err, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(arguments)
        except SystemExit as done:
            status = done.code
    found.append([status, out.getvalue(), err.getvalue()])
json.dump(found, sys.stdout)
"""
Told = tuple[int, str, str]
"""The exit status, stdout and stderr."""
COMMANDS = [
    ("verify", "nowhere"), ("push", "nowhere", "me/steered"), ("unpatch", "nowhere", "out"),
    ("reproduce", "nowhere"), ("export", "nowhere", "--format", "safetensors"), ("chat", "nowhere", "-p", "x"),
    ("sweep", "nowhere.yaml"), ("chat", "recipe.yaml", "--prompt", "x"), ("sweep", "recipe.yaml", "--no-pictures"),
]  # fmt: skip


def blocked(folder: Path, *arguments: str, say: str | None = None) -> subprocess.CompletedProcess[str]:
    """Python with these arguments, in which importing torch is an error."""
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(BLOCKER, encoding="utf-8")
    path = os.pathsep.join([str(folder / "site"), str(Path(__file__).parents[2])])
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
        input=say,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Told]:
    """What is told of each mistake, and by each of the other commands: all in one process."""
    folder = tmp_path_factory.mktemp("told")
    cases: dict[str, tuple[Change, list[str]]] = {
        **{mistake: (change, ["recipe.yaml", "--json"]) for mistake, (change, _told) in MISTAKES.items()},
        **{" ".join(command): (vector(layer=9), list(command)) for command in COMMANDS},
    }
    asked = []
    for number, (change, arguments) in enumerate(cases.values()):
        (folder / str(number)).mkdir()
        write(folder / str(number), change)
        asked.append([str(folder / str(number)), arguments])
    done = blocked(folder, "-c", ALL, say=json.dumps(asked))
    assert done.returncode == 0, done.stderr
    return dict(zip(cases, json.loads(done.stdout), strict=True))


def write(place: Path, change: Change) -> None:
    (place / "model").mkdir()
    (place / "model" / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    (place / "model" / "model.safetensors").write_bytes(NO_WEIGHTS)
    recipe: dict[str, Any] = {
        "model": "./model",
        "vectors": [{"name": "kind", "pairs": [PAIR], "layer": 1}],
        "output": "steered",
    }
    change(place, recipe)
    (place / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_without_torch(mistake: str, told: dict[str, Told]) -> None:
    status, out, err = told[mistake]
    assert status == 2, err
    assert MISTAKES[mistake][1] in err and "Traceback" not in err
    assert json.loads(out)["error"]["code"]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_other_commands_tell_it_without_torch_too(command: tuple[str, ...], told: dict[str, Told]) -> None:
    status, _out, err = told[" ".join(command)]
    assert status == 2, err
    assert "error: " in err and "Traceback" not in err


def test_a_mistake_is_told_by_the_program_itself(tmp_path: Path) -> None:
    write(tmp_path, vector(layer=4))
    done = blocked(tmp_path, "-m", "patcher", "recipe.yaml")
    assert done.returncode == 2 and "the model has 4 decoder blocks" in done.stderr


def test_a_recipe_without_a_mistake_gets_as_far_as_torch(tmp_path: Path) -> None:
    write(tmp_path, lambda _place, _recipe: None)
    done = blocked(tmp_path, "-m", "patcher", "recipe.yaml")
    assert done.returncode == 1 and "torch is imported" in done.stderr


def test_pairs_are_read_once_until_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [json.dumps({"positive": f"good {index}", "negative": f"bad {index}"}) for index in range(3)]
    write(tmp_path, put("p.jsonl", "\n".join(rows), vector(pairs="p.jsonl")))
    read: list[str] = []
    read_rows = formats.read_rows
    monkeypatch.setattr(formats, "read_rows", lambda source, **named: read.append(source) or read_rows(source, **named))
    loaded = load_recipe(tmp_path / "recipe.yaml")
    early_checks.check_early(loaded, None)
    notes: list[str] = []
    where = loaded.place("vectors.0.pairs")
    first = formats.load_pairs("p.jsonl", base_folder=tmp_path, where=where, notes=notes)
    first.pop()
    assert len(formats.load_pairs("p.jsonl", base_folder=tmp_path, where=where)) == 3
    assert read == ["p.jsonl"]
    (tmp_path / "p.jsonl").write_text("\n".join([*rows, rows[0].replace("0", "9")]), encoding="utf-8")
    assert len(formats.load_pairs("p.jsonl", base_folder=tmp_path, where=where)) == 4
