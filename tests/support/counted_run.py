"""The program that verifies, with every tensor counted that is read from a safetensors file.

``counted_run.py JOB``: as ``stock_run.py JOB``; one line a read, ``FILE<tab>NAME``, is added to the file that
``READS`` of the environment names.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch

HONEST = safetensors.safe_open


class Counted:
    """An open safetensors file, or a part of a tensor in it."""

    def __init__(self, inner: Any, file: str, name: str = "") -> None:
        self.inner, self.file, self.name = inner, file, name

    def note(self, name: str) -> None:
        with Path(os.environ["READS"]).open("a", encoding="utf-8") as file:
            file.write(f"{self.file}\t{name}\n")

    def get_tensor(self, name: str) -> Any:
        self.note(name)
        return self.inner.get_tensor(name)

    def get_slice(self, name: str) -> Counted:
        return Counted(self.inner.get_slice(name), self.file, name)

    def __getitem__(self, part: Any) -> Any:
        self.note(self.name)
        return self.inner[part]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __enter__(self) -> Counted:
        self.inner.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.inner.__exit__(*error)


def counted(file: Any, *given: Any, **named: Any) -> Counted:
    return Counted(HONEST(file, *given, **named), str(file))


if __name__ == "__main__":
    safetensors.safe_open = safetensors.torch.safe_open = counted  # type: ignore[attr-defined, misc]
    program = Path(os.environ["STOCK_RUN"])
    sys.argv[0] = str(program)
    runpy.run_path(str(program), run_name="__main__")
