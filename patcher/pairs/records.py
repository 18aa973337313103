"""What a source of pairs or questions gives, before it is known what it means."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from patcher.errors import Problem


@dataclass(frozen=True)
class Record:
    """One record: its values by key, and where it stands, for errors."""

    values: dict[str, Any]
    origin: str


Records = tuple[list[Record], list[Problem]]
"""Those that could be read, and a problem for each one that could not."""
