"""What the pages name is there: links, headings, paths, commands with their options, recipes, and the index itself."""

from __future__ import annotations

import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import click
import pytest

from patcher.cli import COMMANDS, cli
from patcher.recipe.file import load_recipe

ROOT = Path(__file__).parents[2]
BESIDE = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "recipes/README.md")]
PAGES = [*BESIDE, *sorted((ROOT / "docs").rglob("*.md"))]

FENCE = re.compile(r"^ *```(?P<language>\w*)\n(?P<text>.*?)^ *```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\[[^\]]*\]\((?P<target>[^)\s]+)\)")
HEADING = re.compile(r"^#+ (?P<title>.+)$", re.MULTILINE)
NAMED_PATH = re.compile(r"(?<![\w/.-])(?:patcher|docs|tests|tools|recipes|\.ci)/[\w./*-]*[\w*/]")
COMMAND = re.compile(r"(?:\bpatch-model|-m patcher) (?P<arguments>.+)")

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def prose(text: str) -> str:
    return FENCE.sub("", text)


def headings(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    titles = HEADING.findall(prose(page.read_text(encoding="utf-8")))
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def commands(text: str) -> Iterator[list[str]]:
    """The arguments of each ``patch-model`` that fenced blocks and code spans show."""
    fenced = [line for block in FENCE.finditer(text) for line in block["text"].replace("\\\n", " ").splitlines()]
    shown = [line for line in fenced if not line.lstrip().startswith("#")]
    for line in shown + [span for span in SPAN.findall(prose(text)) if span.startswith(("patch-model ", "torchrun "))]:
        found = COMMAND.search(line)
        if found is not None:
            shown_alone = re.split(r" (?:\||&&|>) ", found["arguments"])[0]
            if shown_alone.count("'") % 2:  # the end of a longer command in quotes
                shown_alone = shown_alone.rstrip("'")
            arguments = shlex.split(shown_alone, comments=True)
            builds = arguments[0].endswith(".yaml") or re.match(r"[A-Z]+$|--(?!help|version)", arguments[0])
            yield ["build", *arguments] if builds else arguments


def options(arguments: list[str]) -> tuple[set[str], list[str]]:
    """All options of the command that ``arguments`` call, and those that they name."""
    command: click.Command = cli
    context = click.Context(cli)
    rest = list(arguments)
    while rest and isinstance(command, click.Group):
        inner = command.get_command(context, rest[0])
        if inner is None:
            break
        command, context = inner, click.Context(inner, parent=context)
        rest.pop(0)
    known = {name for parameter in command.get_params(context) for name in (*parameter.opts, *parameter.secondary_opts)}
    known |= {"-h", "--help"}
    return known, [argument.partition("=")[0] for argument in rest if re.match(r"--?[a-z]", argument)]


@every_page
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in LINK.findall(prose(page.read_text(encoding="utf-8"))):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = unquote(target).partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{target}: no such file"
        assert file.is_relative_to(ROOT), f"{target}: outside of the repository"
        if anchor:
            assert anchor in headings(file), f"{target}: no such heading"


@every_page
def test_every_path_that_is_named_is_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for name in NAMED_PATH.findall(re.sub(r"\]\([^)]*\)|https?://\S+", "", text)):
        if "NAME" not in name:
            assert any(ROOT.glob(name.rstrip("/"))), f"{name}: not in the repository"


@every_page
def test_every_command_and_option_that_is_shown_exists(page: Path) -> None:
    for arguments in commands(page.read_text(encoding="utf-8")):
        assert arguments[0] in (*COMMANDS, "--help", "--version"), f"patch-model {arguments[0]}: no such command"
        known, named = options(arguments)
        unknown = [name for name in named if name not in known]
        assert not unknown, f"patch-model {' '.join(arguments)}: no option {unknown[0]}"


@every_page
def test_every_recipe_that_is_shown_is_one(page: Path, tmp_path: Path) -> None:
    for number, block in enumerate(FENCE.finditer(page.read_text(encoding="utf-8"))):
        if block["language"] == "yaml" and block["text"].startswith("model:"):
            recipe = tmp_path / f"{number}.yaml"
            recipe.write_text(block["text"], encoding="utf-8")
            load_recipe(recipe)


def test_the_check_of_commands_sees_what_is_wrong() -> None:
    fenced = "```\n$ echo x | patch-model chat DIR --no-such 1\n```\n"
    shown = "`patch-model stacks install vllm --into V --gpu`, `patch-model r.yaml --set a=1`, `patch-model no`"
    chat, stacks, build, wrong = commands(fenced + shown)
    known, named = options(chat)
    assert named == ["--no-such"] and not set(named) & known
    known, named = options(stacks)
    assert named == ["--into", "--gpu"] and set(named) <= known
    assert build == ["build", "r.yaml", "--set", "a=1"]
    assert wrong[0] not in COMMANDS


def test_the_page_of_commands_has_all_of_them() -> None:
    rows = "\n".join(
        re.findall(r"^\| (`patch-model [^|]+) \|", (ROOT / "docs" / "commands.md").read_text(), re.MULTILINE)
    )
    shown = {arguments[0] for arguments in commands(rows)}
    assert shown == set(COMMANDS)
    assert all(importlib.util.find_spec(f"patcher.cli.{module}") for module, _ in COMMANDS.values())


def test_the_index_lists_every_page() -> None:
    index = ROOT / "docs" / "README.md"
    linked = {(index.parent / target).resolve() for target in LINK.findall(index.read_text(encoding="utf-8"))}
    pages = {page for page in (ROOT / "docs").rglob("*.md") if page != index}
    assert pages <= linked, f"not in the index: {sorted(page.name for page in pages - linked)}"
