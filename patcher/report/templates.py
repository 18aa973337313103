"""How templates are read: those of the sweep's page and of the model card."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


def environment(package: str, *, autoescape: bool, finalize: Callable[[Any], Any]) -> Environment:
    """The templates beside a package's modules, by file name; a name that a template was not given is an error.

    Args:
        package: its dotted name.
        autoescape: whether values are escaped for HTML.
        finalize: everything that a template shows passes through it.
    """
    return Environment(
        loader=PackageLoader(package, ""),
        autoescape=autoescape,
        undefined=StrictUndefined,
        finalize=finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def counted(count: int, noun: str) -> str:
    """``1 tensor``, ``2 tensors``."""
    return f"{count} {noun}{'' if count == 1 else 's'}"
