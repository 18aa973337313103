"""What was found out about a class of models, kept between runs under all that it depends on.

Proofs on tiny stand-ins say the same each time for one config, one transformers, one torch and one patch-model. So
they are looked up by all of these together with the sources of this package. A file that is not this user's own, that
is damaged, or that has another key is as good as none; a folder that cannot be written to costs the next run its time.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import json
import os
import platform
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from patcher.disk.cache_folder import cache_folder
from patcher.disk.whole_files import whole_file

T = TypeVar("T")

FOLDER = "findings"
FORMAT = "patch-model finding 1"
SIZE_VARIABLE = "PATCH_MODEL_CACHE_SIZE"
_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy")
_LARGEST = 64 << 20
_UNUSED_SECONDS = 30 * 24 * 3600.0


class Findings:
    """Values about one subject, each under a key of its own.

    Args:
        subject: all that they depend on besides the versions, as JSON (or with a ``repr`` that says what it is); None
            keeps nothing.
    """

    kept = True
    """False: nothing is looked up, and nothing is kept. Tests that replace parts of the proofs need that."""

    def __init__(self, subject: Any) -> None:
        self._subject = None if subject is None or not self._wanted() else _digest(subject)

    @classmethod
    def _wanted(cls) -> bool:
        return cls.kept and os.environ.get(SIZE_VARIABLE, "").strip() != "0"

    def once(self, key: Any, kind: Any, make: Callable[[], T]) -> T:
        """What ``make`` returns, or returned in an earlier run.

        Args:
            key: JSON, or with a ``repr`` that says what it is.
            kind: the type of the value, as pydantic takes it: plain data, dataclasses, mappings, unions.
        """
        if self._subject is None:
            return make()
        from pydantic import TypeAdapter, ValidationError

        adapter, digest = TypeAdapter(kind), _digest([self._subject, key])
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError, RecursionError, ValidationError):
            found: T = adapter.validate_python(_read(_place(digest), digest))
            return found
        made = make()
        with contextlib.suppress(OSError, ValueError, TypeError, RuntimeError):
            _write(_place(digest), digest, adapter.dump_python(made))
        return made


def findings_folder() -> Path:
    """Where they are kept; a folder for each set of versions."""
    return cache_folder().expanduser().absolute() / FOLDER


@functools.cache
def versions() -> str:
    """A hash of the versions and sources that proofs depend on; nothing is imported for it."""
    found: dict[str, Any] = {"python": platform.python_version(), "machine": platform.machine()}
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    own = hashlib.sha256()
    for path in _sources(Path(__file__).parents[1]):
        content = path.read_bytes()
        own.update(f"{path.as_posix()} {len(content)}\n".encode())
        own.update(content)
    found["own"] = own.hexdigest()
    found["transformers files"] = transformers_files("")
    return _digest(found)[:24]


def transformers_files(folder: str) -> list[list[Any]]:
    """The sources in a folder of the installed transformers by size and time: an editable install has one version."""
    spec = importlib.util.find_spec("transformers")
    places = [] if spec is None else list(spec.submodule_search_locations or ())
    found = []
    for place in places:
        with contextlib.suppress(OSError), os.scandir(Path(place) / folder) as entries:
            stats = [(entry.name, entry.stat()) for entry in entries if entry.name.endswith(".py")]
            found += [[name, there.st_size, there.st_mtime_ns] for name, there in stats]
    return sorted(found)


def _sources(package: Path) -> Iterator[Path]:
    for place, folders, names in os.walk(package):
        folders.sort()
        yield from (Path(place) / name for name in sorted(names) if name.endswith((".py", ".json")))


def _digest(content: Any) -> str:
    text = json.dumps(content, separators=(",", ":"), default=repr)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def _place(digest: str) -> Path:
    return findings_folder() / versions() / digest[:2] / f"{digest}.json"


def _read(path: Path, digest: str) -> Any:
    content = json.loads(own_bytes(path))
    if content.get("format") != FORMAT or content.get("key") != digest:
        raise ValueError("another key")
    if _digest(content["value"]) != content.get("checksum"):
        raise ValueError("damaged")
    return content["value"]


def _write(path: Path, digest: str, value: Any) -> None:
    if not path.parent.parent.is_dir():
        _forget_unused(path.parent.parent.parent)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Through JSON once, so that the checksum is of what is read.
    value = json.loads(json.dumps(value))
    content: Mapping[str, Any] = {"format": FORMAT, "key": digest, "checksum": _digest(value), "value": value}
    with whole_file(path, durable=False) as partial:
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            json.dump(content, file, separators=(",", ":"))
    os.utime(path.parent.parent)


def _forget_unused(folder: Path) -> None:
    """Remove what other versions found, where nothing was added to it for a month."""
    with contextlib.suppress(OSError):
        for place in folder.iterdir():
            if not place.is_symlink() and time.time() - place.stat().st_mtime > _UNUSED_SECONDS:
                shutil.rmtree(place, ignore_errors=True)


def own_bytes(path: Path, largest: int = _LARGEST) -> bytes:
    """The bytes of a plain file that nobody else can have written.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no plain file, another user's, one that others may write to, or larger than ``largest``.
    """
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    with os.fdopen(os.open(path, flags), "rb") as file:
        there = os.fstat(file.fileno())
        own = not hasattr(os, "geteuid") or (there.st_uid == os.geteuid() and not there.st_mode & 0o022)
        if not stat.S_ISREG(there.st_mode) or not own or there.st_size > largest:
            raise ValueError("not a file of this cache")
        return file.read()
