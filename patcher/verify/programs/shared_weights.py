"""The weights of spread models on the disk: held where passes are, under the names that accelerate asks for."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from safetensors import safe_open

Change = Callable[[torch.Tensor], None]
Stored = tuple[str, str]
"""A weight file, and a name in it."""


class OnDisk:
    """The tensors of weight files, as they are stored.

    Attributes:
        reads: how often a tensor was read from the disk.
        keep: those that several modules have (tied ones), which are held once they are read; True for a copy in memory,
            False for the file's pages, which go when memory gets short.
    """

    def __init__(self) -> None:
        self.reads: Counter[Stored] = Counter()
        self.keep: dict[Stored, bool] = {}
        self._kept: dict[Stored, torch.Tensor] = {}
        self._files: dict[str, Any] = {}
        self._spare: dict[tuple[torch.Size, torch.dtype], list[torch.Tensor]] = {}
        self._lock = threading.Lock()

    def read(self, file: str, name: str) -> torch.Tensor:
        """One tensor; its memory is the file's."""
        with self._lock:
            if (file, name) in self._kept:
                return self._kept[file, name]
            if file not in self._files:
                self._files[file] = safe_open(file, framework="pt")
            self.reads[file, name] += 1
            tensor: torch.Tensor = self._files[file].get_tensor(name)
            if (file, name) in self.keep:
                tensor = self._kept[file, name] = tensor.clone() if self.keep[file, name] else tensor
            return tensor

    def widened(self, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """A tensor in another dtype, in memory of its own; a block takes that of a block before, if that is free."""
        if tensor.dtype == dtype:
            return tensor
        with self._lock:
            spare = self._spare.get((tensor.shape, dtype))
            memory = spare.pop() if spare else None
        return tensor.to(dtype) if memory is None else memory.copy_(tensor)

    def give_back(self, tensors: Iterable[torch.Tensor]) -> None:
        """Memory that the next block may take, as far as nothing else refers to it."""
        with self._lock:
            for tensor in tensors:
                if _is_free(tensor):
                    self._spare.setdefault((tensor.shape, tensor.dtype), []).append(tensor)

    def close(self, spare: bool) -> None:
        """Unmap what has been read, so that it does not count as memory; ``spare``: give up spare memory, too."""
        with self._lock:
            self._files.clear()
            if spare:
                self._spare.clear()


def _uses(tensor: torch.Tensor) -> int:
    return int(torch._C._storage_Use_Count(tensor.untyped_storage()._cdata))


def _is_free(tensor: torch.Tensor) -> bool:
    """Whether this is the only tensor with its memory; unknown, in other releases of torch, is no."""
    try:
        return _uses(tensor) == _uses(torch.empty(1))
    except (AttributeError, TypeError):
        return False


class Stop:
    """A module, the same in all models, before which passes wait for each other.

    Attributes:
        path: of the module.
        block: its number among the decoder blocks, None for a module outside of them.
    """

    def __init__(self, path: str, block: int | None, on_disk: OnDisk) -> None:
        self.path, self.block, self._on_disk = path, block, on_disk
        self._stored: dict[Stored, torch.Tensor] = {}
        self._held: dict[tuple[int, str], torch.Tensor] = {}

    def fetch(self, weights: Weights, name: str) -> torch.Tensor:
        """A weight in the dtype of the class; it is held while passes are here."""
        key = (id(weights), name)
        if key not in self._held:
            stored, dtype = weights.stored(name), weights.index[name].get("dtype")
            if stored not in self._stored:
                self._stored[stored] = self._on_disk.read(*stored)
            value = self._stored[stored]
            self._held[key] = value if dtype is None else self._on_disk.widened(value, getattr(torch, dtype))
        return self._held[key]

    def fetch_all(self, models: Sequence[Weights]) -> None:
        """All weights under this module."""
        for weights in models:
            for name in weights.under(self.path):
                self.fetch(weights, name)

    def leave(self) -> None:
        """Give the weights up."""
        held, stored = list(self._held.values()), {one.data_ptr() for one in self._stored.values()}
        self._held.clear()
        self._stored.clear()
        if self.block is not None:
            self._on_disk.give_back(one for one in held if one.data_ptr() not in stored)
        self._on_disk.close(spare=self.block is None)


class Weights(Mapping[str, Any]):
    """The weights of one model on the disk, in place of accelerate's own map of them.

    Attributes:
        index: accelerate's: name -> file, name in it, dtype of the class.
        sizes: name -> bytes in the dtype of the class.
        stop: where passes are, while one computes there.
        changes: name -> what the pass that computes does to it.
    """

    def __init__(self, stock: Any, sizes: Mapping[str, int], on_disk: OnDisk) -> None:
        self._stock, self.sizes, self.index = stock, sizes, stock.index
        self._nowhere = Stop("", None, on_disk)
        self.stop: Stop | None = None
        self.changes: Mapping[str, Change] = {}

    def under(self, path: str) -> list[str]:
        """Weights of the module at ``path`` (empty: of all) that lie in weight files."""
        start = f"{path}." if path else ""
        return [name for name, found in self.index.items() if name.startswith(start) and "safetensors_file" in found]

    def stored(self, name: str) -> Stored:
        """Where a weight lies."""
        found = self.index[name]
        return found["safetensors_file"], found.get("weight_name", name)

    def __getitem__(self, name: str) -> Any:
        if "safetensors_file" not in self.index.get(name, {}):
            return self._stock[name]
        value = (self.stop or self._nowhere).fetch(self, name)
        if self.stop is None:
            self._nowhere.leave()
        if name in self.changes:
            value = value.detach().clone()
            self.changes[name](value)
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._stock)

    def __len__(self) -> int:
        return len(self._stock)
