"""The map in CONTRIBUTING.md is the package: every folder is in it, in the order that tests/test_imports.py holds."""

from __future__ import annotations

import re
from pathlib import Path

from test_imports import ORDER

ROOT = Path(__file__).parents[2]
MAP = re.findall(r"^\| `patcher/(\w+)/` \|", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.MULTILINE)


def test_the_map_has_every_folder_from_the_top_down() -> None:
    assert sorted(MAP) == sorted(path.parent.name for path in (ROOT / "patcher").glob("*/__init__.py"))
    places = {folder: place for place, line in enumerate(ORDER) for folder in line}
    assert sorted(MAP, key=places.__getitem__) == MAP


def test_no_module_lies_at_the_root() -> None:
    assert {path.name for path in (ROOT / "patcher").glob("*.py")} == {"__init__.py", "__main__.py"}
