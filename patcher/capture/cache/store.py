"""Captured activations, kept for the next run of the same model, prompts and settings.

The cache never changes a result: a file counts only if it is this user's own, has the key that is asked for, and holds
exactly what was put into it. Whatever else is found is as good as nothing, and whatever goes wrong leaves the run as
it would be without a cache.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import stat
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from patcher.capture.batches import Readable
from patcher.capture.cache.key import CaptureKey, capture_key, model_identity
from patcher.capture.residuals import Residuals
from patcher.checkpoint.safetensors_file import tensor_bytes
from patcher.disk.cache_folder import cache_folder
from patcher.disk.findings import own_bytes
from patcher.disk.whole_files import is_partial, whole_file
from patcher.errors import InputError
from patcher.errors.causes import cause_of

__all__ = ["CaptureCache", "CaptureKey", "cache_limit", "capture_cache", "capture_key", "model_identity"]

FORMAT = "patch-model capture 1"
DEFAULT_LIMIT = 2 << 30
SIZE_VARIABLE = "PATCH_MODEL_CACHE_SIZE"
_FOLDER = "captures"
_FILE = re.compile(r"[0-9a-f]{64}\.safetensors")
_ABANDONED_SECONDS = 3600.0
_SIZE = re.compile(r"(\d{1,18})(?:\.(\d{1,6}))?\s*([KMGT]?)(i?)B?", re.IGNORECASE)
_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
_DAMAGE = (
    OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, ArithmeticError, MemoryError,
    SafetensorError,
)  # fmt: skip
"""What reading a file of any content can raise."""


class CaptureCache:
    """A folder of captures, one file a key; the least recently used are removed beyond ``limit``.

    Args:
        folder: where they lie, made when it is needed; None for no cache.
        limit: the most bytes of all files together.
    """

    def __init__(self, folder: Path | None, limit: int = DEFAULT_LIMIT) -> None:
        self.folder = folder
        self.limit = limit

    def get(self, key: CaptureKey) -> Mapping[int, Residuals] | None:
        """What was captured under this key, bit for bit; None where there is nothing that can be relied on."""
        if self.folder is None:
            return None
        try:
            found = self._read(self._place(self.folder, key), key)
        except _DAMAGE:
            return None
        with contextlib.suppress(OSError):
            os.utime(self._place(self.folder, key))
        return found

    def put(self, key: CaptureKey, residuals: Mapping[int, Residuals]) -> str | None:
        """Keep what was captured under this key.

        Returns:
            Why it could not be kept, for ``-v``; None if it is kept, or there is no cache.
        """
        if self.folder is None:
            return None
        try:
            tensors = _tensors(key, residuals)
            size = sum(tensor.nbytes for tensor in tensors.values())
            if size > self.limit:
                return f"the activations are not kept: {size:,} bytes, and the cache may hold {self.limit:,}"
            marks = {"format": FORMAT, "key": key.digest, "checksum": _checksum(tensors)}
            self._write(self._place(self.folder, key), save(tensors, marks))
            with contextlib.suppress(OSError):
                self._prune(self._place(self.folder, key))
        except OSError as error:
            return f"the activations are not kept: {self.folder}: {error.strerror or error}"
        except (ValueError, TypeError, LookupError, RuntimeError, MemoryError, SafetensorError) as error:
            return f"the activations are not kept: {cause_of(error)}"
        return None

    @staticmethod
    def _place(folder: Path, key: CaptureKey) -> Path:
        return folder / f"{key.digest}.safetensors"

    def _read(self, path: Path, key: CaptureKey) -> Mapping[int, Residuals]:
        content = own_bytes(path, self.limit + (1 << 20))
        marks = _marks(content)
        if marks.get("format") != FORMAT or marks.get("key") != key.digest:
            raise ValueError("another key")
        tensors = load(content)
        if _checksum(tensors) != marks.get("checksum"):
            raise ValueError("damaged")
        return _residuals(key, tensors)

    @staticmethod
    def _write(path: Path, content: bytes) -> None:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with whole_file(path, durable=False) as partial:
            # Whatever the umask: what others may write is not read.
            descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)

    def _prune(self, kept: Path) -> None:
        """Remove the least recently used files beyond the limit, and what a run that was killed has left."""
        used = sorted(self._files(kept.parent), key=lambda entry: entry[1].st_mtime_ns)
        total = sum(there.st_size for _, there in used)
        for path, there in used:
            if total <= self.limit:
                return
            if path.name != kept.name:
                with contextlib.suppress(OSError):
                    path.unlink()
                    total -= there.st_size

    @staticmethod
    def _files(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
        for path in folder.iterdir():
            with contextlib.suppress(FileNotFoundError):
                there = path.lstat()
                if not stat.S_ISREG(there.st_mode):
                    continue
                if _FILE.fullmatch(path.name):
                    yield path, there
                elif is_partial(path) and time.time() - there.st_mtime > _ABANDONED_SECONDS:
                    path.unlink()


@dataclass(frozen=True)
class Remembering:
    """The cache as one model sees it.

    Attributes:
        cache: where captures are kept.
        key: :func:`patcher.capture.cache.key.capture_key` with all of its arguments but ``prompts`` and ``layers``.
        note: called with what ``-v`` shows.
    """

    cache: CaptureCache
    key: Callable[..., CaptureKey]
    note: Callable[[str], None]

    def get(self, prompts: Sequence[Readable], layers: Sequence[int]) -> Mapping[int, Residuals] | None:
        """What was captured for these prompts and layers, if it is there."""
        found = self.cache.get(self.key(prompts=prompts, layers=layers))
        if found is not None:
            self.note(f"activations of {len(prompts)} prompts are taken from the cache (--no-cache reads them anew)")
        return found

    def put(self, prompts: Sequence[Readable], layers: Sequence[int], residuals: Mapping[int, Residuals]) -> None:
        """Keep a capture; that it cannot be kept is no failure."""
        reason = self.cache.put(self.key(prompts=prompts, layers=layers), residuals)
        if reason is not None:
            self.note(f"activations are not cached: {reason}")


def capture_cache(*, enabled: bool = True) -> CaptureCache:
    """The user's cache, see :func:`patcher.disk.cache_folder.cache_folder`.

    Raises:
        InputError: ``PATCH_MODEL_CACHE_SIZE`` is no size.
    """
    limit = cache_limit(os.environ.get(SIZE_VARIABLE))
    if not enabled or limit == 0:
        return CaptureCache(None)
    try:
        return CaptureCache(cache_folder().expanduser().absolute() / _FOLDER, limit)
    except (OSError, RuntimeError):
        return CaptureCache(None)  # a user without a home


def cache_limit(text: str | None) -> int:
    """Bytes that ``PATCH_MODEL_CACHE_SIZE`` allows: ``500MB``, ``2GiB``, ``1000000``; 0 for no cache.

    Raises:
        InputError: it is no size.
    """
    if text is None or not text.strip():
        return DEFAULT_LIMIT
    found = _SIZE.fullmatch(text.strip()) if text.isascii() else None
    if found is None:
        raise InputError(
            "this is not a size",
            where=SIZE_VARIABLE,
            found=text[:60],
            remedy="give a number of bytes, or one with KB, MB, GB, KiB, MiB or GiB; 0 for no cache",
        )
    whole, part, letter, binary = found.groups()
    unit: int = (1024 if binary else 1000) ** _POWERS[letter.upper()]
    return int(whole) * unit + (int(part) * unit // 10 ** len(part) if part else 0)


def _tensors(key: CaptureKey, residuals: Mapping[int, Residuals]) -> dict[str, torch.Tensor]:
    tensors = {}
    for layer in key.layers:
        for field in fields(Residuals):
            value = getattr(residuals[layer], field.name)
            if not isinstance(value, torch.Tensor) or len(value) != key.prompts:
                raise TypeError(f"`{field.name}` is no tensor with a row for each prompt")
            tensors[f"{field.name}.{layer}"] = value.detach().cpu().contiguous()
    return tensors


def _residuals(key: CaptureKey, tensors: Mapping[str, torch.Tensor]) -> dict[int, Residuals]:
    names = [field.name for field in fields(Residuals)]
    if set(tensors) != {f"{name}.{layer}" for name in names for layer in key.layers}:
        raise ValueError("other tensors")
    if any(tensor.ndim == 0 or len(tensor) != key.prompts for tensor in tensors.values()):
        raise ValueError("other prompts")
    return {layer: Residuals(**{name: tensors[f"{name}.{layer}"] for name in names}) for layer in key.layers}


def _checksum(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode("ascii"))
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def _marks(content: bytes) -> dict[str, str]:
    length = int.from_bytes(content[:8], "little")
    if not 0 < length <= len(content) - 8:
        raise ValueError("truncated")
    marks = json.loads(content[8 : 8 + length])["__metadata__"]
    if not isinstance(marks, dict):
        raise ValueError("no marks")
    return marks
