"""What every format's module has."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from patcher.export.edits import Edits


class Format(Protocol):
    """A module of this package."""

    SUFFIX: str
    """Of the default output's name; empty for a folder."""

    def is_ours(self, path: Path) -> bool:
        """Whether what is there is an export of this format, which may be replaced."""

    def write(self, edits: Edits, target: Path) -> list[str]:
        """Write a file or a folder at ``target``, which is not there yet; notes for the user.

        Raises:
            InputError: the format cannot hold these edits.
            MissingExtraError: it needs a package that is not installed.
        """

    def use(self, edits: Edits, output: Path) -> list[str]:
        """Lines that use the export."""
