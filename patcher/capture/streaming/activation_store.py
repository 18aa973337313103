"""Activations of many batches: in memory as far as a budget allows, beyond that in a file."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Collection, Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from patcher.errors import OutsideError


class ActivationStore:
    """Holds tensors, and gives back the same bytes; tensors that share memory still do when they come back together.

    The file has no name and is gone with the process, however that ends. What lies on an accelerator is held in main
    memory meanwhile.

    Args:
        budget: bytes of main memory.
        folder: where the file is made, if one is needed.
        elsewhere: addresses of memory that is held anyway (the model's buffers); it is not copied and counts nothing.

    Attributes:
        held: bytes in main memory.
        spilled: bytes of the file.
    """

    def __init__(self, budget: int, folder: Path, elsewhere: Collection[int] = ()) -> None:
        self._budget, self._folder, self._elsewhere = budget, folder, frozenset(elsewhere)
        self._file: Any = None
        self._free: dict[int, list[int]] = {}
        self.held = 0
        self.spilled = 0

    def __enter__(self) -> ActivationStore:
        return self

    def __exit__(self, *_error: object) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None

    def put(self, values: Mapping[Hashable, Any]) -> dict[Hashable, Held]:
        """Take tensors in; anything else is held as it is.

        Raises:
            OutsideError: the disk is full.
        """
        storages: dict[int, _Storage] = {}
        taken: dict[Hashable, Held] = {}
        for key, value in values.items():
            if not isinstance(value, torch.Tensor) or value.untyped_storage().data_ptr() in self._elsewhere:
                taken[key] = Held(value, None)
                continue
            memory = value.untyped_storage()
            storage = storages.setdefault(memory.data_ptr(), _Storage(memory.nbytes()))
            if storage.users == 0:
                self._place(storage, value)
            storage.users += 1
            like = value.detach()
            if not storage.live:
                like = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
            taken[key] = Held(like, storage, int(value.storage_offset()), value.device)
        return taken

    def get(self, held: Mapping[Hashable, Held]) -> dict[Hashable, Any]:
        """The tensors again."""
        back: dict[int, torch.UntypedStorage] = {}
        found: dict[Hashable, Any] = {}
        for key, value in held.items():
            storage = value.storage
            if storage is None or storage.live:
                found[key] = value.like
                continue
            if id(storage) not in back:
                raw = storage.copy if storage.copy is not None else self._read(storage)
                back[id(storage)] = raw.to(value.device).untyped_storage()
            empty = torch.empty(0, dtype=value.like.dtype, device=value.device)
            found[key] = empty.set_(back[id(storage)], value.offset, value.like.shape, value.like.stride())
        return found

    def put_back(self, held: Held, tensor: torch.Tensor) -> None:
        """A tensor that :meth:`get` gave was changed in place."""
        storage = held.storage
        if storage is None or storage.live:
            return
        raw = _bytes_of(tensor)
        if storage.offset is None:
            storage.copy = raw
        else:
            self._write(storage, raw)

    def drop(self, held: Held) -> None:
        """Give up what is not needed any more."""
        storage = held.storage
        if storage is None:
            return
        storage.users -= 1
        if storage.users == 0:
            if storage.offset is None:
                self.held -= storage.size
            else:
                self._free.setdefault(storage.size, []).append(storage.offset)

    def _place(self, storage: _Storage, value: torch.Tensor) -> None:
        fits = self.held + storage.size <= self._budget
        if fits:
            self.held += storage.size
        if fits and self._is_main_memory(value.device):
            storage.live = True
            return
        raw = _bytes_of(value)
        if fits:
            storage.copy = raw
        else:
            free = self._free.get(storage.size)
            storage.offset = free.pop() if free else self.spilled
            self._write(storage, raw)

    @staticmethod
    def _is_main_memory(device: torch.device) -> bool:
        return device.type == "cpu"

    def _write(self, storage: _Storage, raw: torch.Tensor) -> None:
        assert storage.offset is not None
        try:
            if self._file is None:
                self._folder.mkdir(parents=True, exist_ok=True)
                self._file = tempfile.TemporaryFile(dir=self._folder, buffering=0)  # noqa: SIM115
            view, done = raw.numpy().data, 0
            while done < storage.size:
                done += os.pwrite(self._file.fileno(), view[done:], storage.offset + done)
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            raise OutsideError(
                "the activations of the batches do not fit on the disk" if full else "activations cannot be written",
                where=str(self._folder),
                found=error.strerror,
                remedy="free space there, or use fewer or shorter contrast pairs",
                code="disk",
            ) from None
        self.spilled = max(self.spilled, storage.offset + storage.size)

    def _read(self, storage: _Storage) -> torch.Tensor:
        raw = torch.empty(storage.size, dtype=torch.uint8)
        view, done = raw.numpy().data, 0
        while done < storage.size:
            got = os.preadv(self._file.fileno(), [view[done:]], (storage.offset or 0) + done)
            if not got:
                raise OutsideError("activations cannot be read back", where=str(self._folder), code="disk")
            done += got
        return raw


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """All memory that a tensor is a view of, [bytes], on the CPU."""
    empty = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return empty.set_(tensor.untyped_storage()).cpu()


@dataclass(eq=False)
class _Storage:
    """Memory that several tensors may have in common: alive, as a copy in main memory, or in the file."""

    size: int
    users: int = 0
    live: bool = False
    copy: torch.Tensor | None = None
    offset: int | None = None


@dataclass(eq=False)
class Held:
    """A tensor in the store: itself, or its shape on the meta device and where its memory is."""

    like: Any
    storage: _Storage | None
    offset: int = 0
    device: torch.device | None = None
