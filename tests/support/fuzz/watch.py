"""Where a case is read, and what is seen of what its reader does besides."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from support.fuzz.mutations import OUTSIDE

Case = Mapping[str, bytes]
"""Relative file name -> content; the first is the one that is mostly damaged."""


class Sandbox:
    """A folder for the case, one for output, and around them files that nobody may touch."""

    def __init__(self, root: Path) -> None:
        self.root, self.outer = root, root / "outer"
        self.case, self.out, self.scratch = self.outer / "case", root / "out", root / "tmp"
        self.outer.mkdir(parents=True)
        self.scratch.mkdir()
        (self.outer / "secret.json").write_bytes(b'{"secret": 1}')
        header = b'{"secret":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
        (self.outer / "secret.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"s")

    def fill(self, case: Case) -> None:
        """The case's files, and no other."""
        shutil.rmtree(self.case, ignore_errors=True)
        shutil.rmtree(self.out, ignore_errors=True)
        self.case.mkdir()
        self.out.mkdir()
        outside = str(self.outer).encode()
        for name, content in case.items():
            path = self.case / name
            if "/" in name:
                path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.replace(OUTSIDE.encode(), outside))

    def touched(self, case: Case) -> str | None:
        """What changed outside of the output."""
        found = {item.relative_to(self.case).as_posix() for item in self.case.rglob("*") if not item.is_dir()}
        if found != set(case):
            return f"the case's folder holds {sorted(found ^ set(case))}"
        around = sorted(item.name for item in self.outer.iterdir())
        if around != ["case", "secret.json", "secret.safetensors"]:
            return f"around the case: {around}"
        beside = sorted(item.name for item in self.root.iterdir())
        return None if beside == ["out", "outer", "tmp"] else f"beside the output: {beside}"


_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod")
_IN_FOLDER = ("os.remove", "os.rmdir")
_STARTS = (
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "socket.connect",
    "pickle.find_class",
)


class _Watch:
    """The interpreter's own report of what is opened, changed and started. A hook cannot be removed, only ignored."""

    def __init__(self) -> None:
        self.allowed: tuple[str, ...] | None = None
        self.seen: list[str] = []
        self._hooked = False

    @contextmanager
    def over(self, *allowed: Path) -> Iterator[None]:
        if not self._hooked:
            sys.addaudithook(self._hook)
            self._hooked = True
        self.seen = []
        self.allowed = tuple(f"{path}{os.sep}" for path in allowed)
        try:
            yield
        finally:
            self.allowed = None

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.allowed is None or event in ("import", "exec", "compile", "object.__getattr__"):
            return
        if event == "open":
            path, _mode, flags = arguments
            if isinstance(path, int):
                return
            place = _absolute(Path(os.fsdecode(path)))
            if "/secret." in place or (flags & _WRITES and not self._inside(place)):
                self.seen.append(f"opened {place}")
        elif event in _CHANGES:
            paths = [path for path in arguments[:2] if isinstance(path, (str, bytes, os.PathLike))]
            folders = [number for number in arguments[1:] if isinstance(number, int) and number >= 0]
            beside = Path(f"/proc/self/fd/{folders[-1]}").readlink() if event in _IN_FOLDER and folders else Path()
            if not all(self._inside(_absolute(beside / os.fsdecode(path))) for path in paths):
                self.seen.append(f"{event} {arguments}")
        elif event in _STARTS:
            self.seen.append(f"{event} {arguments}")

    def _inside(self, place: str) -> bool:
        return place == os.devnull or f"{place}{os.sep}".startswith(self.allowed or ())


def _absolute(path: Path) -> str:
    # Not resolve(), which follows links: what is asked for counts.
    return os.path.abspath(path)  # noqa: PTH100


WATCH = _Watch()
