"""Nothing imports in a circle, and no folder of the package imports one above it.

Imports inside of functions count too: that a module is needed late does not make it lower.
"""

from __future__ import annotations

import ast
import functools
import graphlib
from collections.abc import Mapping
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "patcher"

ORDER = (
    {"cli"},
    {"chat", "sweep"},
    {"build"},
    {"demo", "export", "gguf", "card", "publish", "report"},
    {"evaluate", "verify"},
    {"patched", "routes", "vectors"},
    {"pairs"},
    {"capture"},
    {"checkpoint"},
    {"architectures", "recipe"},
    {"stacks"},
    {"disk", "progress"},
    {"errors"},
)
"""The folders from the top to the bottom: each may import those of the lines below, and of its own without a circle."""


def modules(package: Path) -> dict[str, Path]:
    """The package's modules by dotted name; a folder's ``__init__`` has the folder's."""
    return {
        ".".join(path.relative_to(package.parent).with_suffix("").parts).removesuffix(".__init__"): path
        for path in package.rglob("*.py")
    }


@functools.cache
def imports(package: Path) -> dict[str, set[str]]:
    """Module -> the modules of the package that it imports, wherever in its code."""
    known = modules(package)
    found: dict[str, set[str]] = {}
    for name, path in known.items():
        wanted: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module is not None:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                wanted.update(full if full in known else node.module for full in names)
            elif isinstance(node, ast.Import):
                wanted.update(alias.name for alias in node.names)
        found[name] = {other for other in wanted if other in known and other != package.name}
    return found


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """One circle of a graph, its first name again at the end; empty if there is none."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        found: list[str] = error.args[1]
        return found
    return []


def between_folders(graph: Mapping[str, set[str]]) -> dict[tuple[str, str], list[str]]:
    """Two folders -> the imports of the second one in the first; modules at the root belong to no folder."""
    found: dict[tuple[str, str], list[str]] = {}
    for name, others in graph.items():
        for other in others:
            folder, imported = (full.split(".")[1] if "." in full else "" for full in (name, other))
            if folder and imported and folder != imported and not folder.startswith("__"):
                found.setdefault((folder, imported), []).append(f"{name} imports {other}")
    return found


def upwards(found: Mapping[tuple[str, str], list[str]]) -> list[str]:
    """The imports of a folder that stands above."""
    rank = {folder: line for line, folders in enumerate(ORDER) for folder in folders}
    return sorted(text for (folder, other), texts in found.items() if rank[folder] > rank[other] for text in texts)


def test_no_module_imports_in_a_circle() -> None:
    assert circle(imports(PACKAGE)) == []


def test_no_folder_imports_one_above_it() -> None:
    found = between_folders(imports(PACKAGE))
    assert {folder for pair in found for folder in pair} == set().union(*ORDER)
    assert upwards(found) == []


def test_no_folders_import_in_a_circle() -> None:
    graph: dict[str, set[str]] = {}
    for folder, other in between_folders(imports(PACKAGE)):
        graph.setdefault(folder, set()).add(other)
    assert circle(graph) == []


@pytest.mark.parametrize("late", [False, True])
def test_a_circle_and_an_upward_import_are_found(tmp_path: Path, late: bool) -> None:
    def write(name: str, imported: str) -> None:
        path = tmp_path / "patcher" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"def later():\n    {imported}\n" if late else f"{imported}\n")

    write("__init__.py", "pass")
    write("pairs/sources.py", "from patcher.pairs import hub")
    write("pairs/hub.py", "from patcher.pairs.sources import Row")
    write("disk/links.py", "import patcher.cli.main")
    write("cli/main.py", "from patcher import disk")
    found = imports(tmp_path / "patcher")
    assert set(circle(found)) == {"patcher.pairs.sources", "patcher.pairs.hub"}
    assert upwards(between_folders(found)) == ["patcher.disk.links imports patcher.cli.main"]
