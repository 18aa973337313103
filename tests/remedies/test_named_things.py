"""What a remedy names is there: commands and their options, keys of the recipe with their values, extras, files."""

from __future__ import annotations

import re
import types
from pathlib import Path
from typing import Any, Union, get_args, get_origin

import click
import pytest
import yaml
from pydantic import BaseModel, ValidationError
from remedies.collected import HOLE, ROOT, Text, remedies, texts

from patcher.cli import COMMANDS, cli
from patcher.recipe.schema import Recipe
from patcher.recipe.vector import VectorSpec

COMMAND = re.compile(r"(?<!that )(?<!with )patch-model ([a-z]+)\b([^;:,`]*)")
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
FOREIGN = re.compile(
    r"\b(?:pip|torchrun|hf|git|lm_eval|convert_\w+\.py)\b[^;,`]*|--(?:master-addr|master-port|rdzv-endpoint|control-vector)"
)
"""Commands of others, with their options."""
EXTRA = re.compile(r"patch-model\[([\w-]+)\]")
PAIR = re.compile(
    r"`([a-z_]+(?:\.[a-z_]+)*): ([^`]+)`"
    r"|(?<![\w.`])((?:capture|evaluate|verify|sweep|calibration)\.[a-z_]+|device|dtype|exact)"
    r": (?!dtype|set\b)([\w.\"-]+)"
)
DOTTED = re.compile(
    r"(?<![\w./:-])((?:capture|evaluate|verify|sweep|calibration|generate|vectors\.0)(?:\.[a-z_0-9]+)+)"
    r"(?![\w/]|\.(?!\s|$))"
)
NO_KEYS = re.compile(
    r"^(?:sweep\.(?:json|csv|html|png)|capture\.shared_prefixes|calibration\.txt"
    r"|evaluate\.(?:cast|effect|texts|controls|curve|completions)|verify\.(?:start|base|copy))$"
)
"""Files, modules and stages of a build that look like keys."""
PATH = re.compile(r"\b(?:patcher|docs|tests|tools|recipes)/[\w./-]+\w")
OF_CONFIGS = {"tie_word_embeddings", "pad_token_id", "vocab_size", "model_type", "task_type", "modules_to_save"}
"""Keys of config.json and adapter_config.json, which are no recipe's."""

every_remedy = pytest.mark.parametrize("remedy", remedies(), ids=lambda remedy: remedy.where)


def commands() -> dict[str, click.Command]:
    """Name -> command, those of a group as ``stacks install``."""
    found: dict[str, click.Command] = {}
    for name in COMMANDS:
        command = cli.get_command(click.Context(cli), name)
        assert command is not None
        found[name] = command
        if isinstance(command, click.Group):
            found |= {f"{name} {inner}": part for inner, part in command.commands.items()}
    return found


def options_of(command: click.Command) -> set[str]:
    return {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}


def wrong_options(text: str) -> list[str]:
    """Commands and options that are named and do not exist."""
    known, wrong = commands(), []
    own = FOREIGN.sub("", text)
    for name, rest in COMMAND.findall(own):
        inner = f"{name} {rest.split()[0]}" if rest.split() else name
        command = known.get(inner, known.get(name))
        if command is None:
            wrong.append(f"patch-model {name}")
        else:
            wrong += [f"{name} {option}" for option in OPTION.findall(rest) if option not in options_of(command)]
    anywhere = set().union(*map(options_of, known.values()), {"--help"})
    return wrong + [option for option in OPTION.findall(own) if option not in anywhere]


def accepted(key: str, value: str) -> bool:
    """Whether a recipe may say so, of itself or of one of its vectors."""
    given: Any = yaml.safe_load(value) if HOLE not in value else None
    if HOLE in value or value.strip(" .") == "":
        return is_key(key)
    vector = {"name": "v", "pairs": "p.jsonl", "layer": 1}
    nested: Any = given
    for part in reversed(key.split(".")):
        nested = {part: nested}
    tried: list[tuple[type[BaseModel], dict[str, Any]]] = [
        (Recipe, {"model": "m", "vectors": [vector], **nested}),
        (VectorSpec, {**vector, **nested}),
        (VectorSpec, {**{k: v for k, v in vector.items() if k != "layer"}, **nested}),
        (VectorSpec, {"name": "v", "layer": 1, "method": "file", "file": "v.pt", "feature": 7, **nested}),
        (VectorSpec, {"name": "v", "layer": 1, "method": "file", "file": "v.pt", **nested}),
        (VectorSpec, {"name": "v", "layer": 1, "positives": "a.txt", "negatives": "b.txt", **nested}),
        (VectorSpec, {"name": "v", "layer": 1, "method": "persona", "questions": "q.txt",
                      "personas": {"positive": "a", "negative": "b"}, **nested}),
    ]  # fmt: skip
    for model, content in tried:
        try:
            model.model_validate(content)
        except ValidationError:
            continue
        return True
    return False


def is_key(dotted: str) -> bool:
    """Whether a recipe, or a vector in it, has this key."""
    return _leads(Recipe, dotted.split(".")) or _leads(VectorSpec, dotted.split("."))


def _leads(kind: Any, parts: list[str]) -> bool:
    if not parts:
        return True
    if get_origin(kind) in (Union, types.UnionType) or hasattr(kind, "__metadata__"):
        return any(_leads(branch, parts) for branch in get_args(kind))
    if get_origin(kind) is list:
        return _leads(get_args(kind)[0], parts[1:] if parts[0].isdigit() else parts)
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        field = kind.model_fields.get(parts[0])
        return field is not None and _leads(field.annotation, parts[1:])
    return False


@every_remedy
def test_commands_and_options_exist(remedy: Text) -> None:
    assert wrong_options(remedy.text) == []


@every_remedy
def test_keys_take_the_values_that_are_named(remedy: Text) -> None:
    for quoted, its, bare, other in PAIR.findall(remedy.text):
        key, value = quoted or bare, its or other.rstrip(".")
        if key not in OF_CONFIGS and not is_key(f"columns.{key}"):
            assert accepted(key, value), f"{key}: {value}"


def test_keys_that_are_named_exist() -> None:
    named = {(key, text.where) for text in texts() for key in DOTTED.findall(text.text) if not NO_KEYS.match(key)}
    assert len(named) > 30
    assert [f"{where}: {key}" for key, where in sorted(named) if not is_key(key)] == []


def test_extras_that_are_named_exist() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("[project.optional-dependencies]")[2]
    known = set(re.findall(r"^([\w-]+) = \[", project.partition("\n[")[0], re.MULTILINE))
    named = {extra for text in texts() for extra in EXTRA.findall(text.text)}
    assert named and named <= known


def test_files_that_are_named_exist() -> None:
    for text in texts():
        for name in PATH.findall(text.text):
            assert (ROOT / name).exists() or Path(name).suffix == "", f"{text.where}: {name}"


def test_the_checks_see_what_is_wrong() -> None:
    assert len(remedies()) > 300
    assert (
        wrong_options("run patch-model verify DIR --stack vllm, or patch-model stacks install vllm --into PATH") == []
    )
    assert wrong_options("patch-model varify DIR") == ["patch-model varify"]
    assert wrong_options("patch-model verify DIR --into X") == ["verify --into"]
    assert wrong_options("say where it is: --bases PATH") == ["--bases"]
    assert wrong_options('pip install --upgrade "patch-model[gguf]"') == []
    assert accepted("dtype", "float32") and not accepted("dtype", "float8")
    assert accepted("capture.mode", "stream") and not accepted("capture.modes", "stream")
    assert accepted("position", "last") and not accepted("position", "first")
    assert is_key("evaluate.lm_eval") and is_key("generate.samples") and not is_key("evaluate.batch")
