"""The route that the page on routes adds is one: planned, chosen, written, and equal to the hook."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from support.tiny_models import parsed_config, released_config

from patcher.architectures.analysis import Architecture
from patcher.routes import planner
from patcher.routes.plan import NotApplicable
from patcher.routes.route import Route

PAGE = Path(__file__).parents[2] / "docs" / "contributing" / "add-a-route.md"
ROUTE_FILE, TEST_FILE = re.findall(
    r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
)


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> Route:
    """The page's file as a module of the package, and its line in the registry."""
    module = ModuleType("patcher.routes.last_norm")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(ROUTE_FILE, str(PAGE), "exec"), module.__dict__)
    route: Route = module.ROUTE
    monkeypatch.setattr(planner, "ROUTES", {**planner.ROUTES, route.name: route})
    return route


def test_the_copy_equals_the_hook(added: Route, tmp_path: Path) -> None:
    names: dict[str, Callable[[Path], None]] = {}
    exec(compile(TEST_FILE, str(PAGE), "exec"), names)
    names["test_the_copy_equals_the_hook"](tmp_path)


def test_it_says_where_it_does_not_fit(added: Route, tmp_path: Path) -> None:
    architecture = Architecture(parsed_config(released_config("facebook--opt-125m"), tmp_path))
    with pytest.raises(NotApplicable, match="layer 3: the block does not end in a norm"):
        added.plan(architecture, [3], None)
    (verdict,) = planner.survey(architecture, [3], names=["last_norm"])
    assert verdict.as_json() == {
        "name": "last_norm",
        "exact": True,
        "cost": "none",
        "stacks": {"transformers": "no", "vllm": "no", "llama.cpp": "no"},
        "why_not": "layer 3: the block does not end in a norm",
    }
