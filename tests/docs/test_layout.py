"""The map in CONTRIBUTING.md is the package: every folder is in it, and a folder imports only what stands below it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "patcher"
MAP = re.findall(r"^\| `patcher/(\w+)/` \|", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.MULTILINE)
FOLDERS = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))


def imports(folder: str) -> Iterator[tuple[str, str]]:
    """(folder that is imported, file that does), also where an import stands inside of a function."""
    for path in sorted((PACKAGE / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                root, _, inner = name.partition(".")
                if root == "patcher" and inner:
                    yield inner.partition(".")[0], path.relative_to(ROOT).as_posix()


def test_the_map_has_every_folder_once() -> None:
    assert sorted(MAP) == FOLDERS


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_imports_only_what_stands_below_it(folder: str) -> None:
    below = {folder, *MAP[MAP.index(folder) + 1 :]}
    upwards = [f"{file} imports patcher.{found}" for found, file in imports(folder) if found not in below]
    assert not upwards, "\n".join(upwards)


def test_few_modules_lie_at_the_root() -> None:
    assert {path.name for path in PACKAGE.glob("*.py")} == {"__init__.py", "__main__.py"}
