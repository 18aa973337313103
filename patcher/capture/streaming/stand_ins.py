"""Tensors that stand for others: for one that is still on the disk, and for one that is computed later.

Both know their shape, dtype and device. The first reads itself when something is computed with it; of the second,
nothing can be computed: whoever tries has found out that streaming is not exact here.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch
from torch.nn import functional as F

from patcher.capture.streaming.disk_weights import DiskWeights

_GETTERS = ("shape", "dtype", "ndim", "layout", "requires_grad", "is_sparse", "is_nested", "is_quantized", "itemsize")
_METHODS = (
    "size", "dim", "ndimension", "numel", "nelement", "element_size", "is_floating_point", "is_complex", "__len__",
)  # fmt: skip
_FACTS = {getattr(torch.Tensor, name).__get__ for name in _GETTERS} | {getattr(torch.Tensor, n) for n in _METHODS}
_FACTS |= {torch.is_floating_point, torch.is_complex, torch.numel}
_PLACES: dict[Any, Callable[[torch.device], Any]] = {
    getattr(torch.Tensor, name).__get__: fact
    for name, fact in {
        "device": lambda device: device,
        "is_cuda": lambda device: device.type == "cuda",
        "is_cpu": lambda device: device.type == "cpu",
        "is_meta": lambda _device: False,
    }.items()
}


class NotStreamable(Exception):  # noqa: N818 - a property of the architecture, not a fault
    """Why this model's blocks cannot be run one after the other over all batches."""


class _StandIn(torch.Tensor):
    """Answers what is known without the tensor's values; what else is asked of it, a subclass says."""

    place: torch.device

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _PLACES:
            return _PLACES[func](args[0].place)
        if func in _FACTS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        return cls.computed(func, args, kwargs)

    @classmethod
    def computed(cls, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What ``func`` makes of the tensor."""
        raise NotImplementedError


class OnDisk(_StandIn):
    """A parameter or buffer that is read from the disk when it is computed with; of a table, the rows that are used.

    What was read is kept until :meth:`forget`.

    Attributes:
        parameter: its name in the class.
        ahead: the ids of all batches, ascending; a table that is asked for one of them reads the rows of all.
    """

    parameter: str
    ahead: torch.Tensor | None
    weights: DiskWeights
    _whole: torch.Tensor | None
    _table: torch.Tensor | None
    _place_of: torch.Tensor | None

    @staticmethod
    def of(tensor: torch.Tensor, name: str, weights: DiskWeights, place: torch.device) -> OnDisk:
        """One of the shape and dtype of ``tensor``, that computes on the device ``place``."""
        empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        made: OnDisk = torch.Tensor._make_subclass(OnDisk, empty, tensor.requires_grad)
        made.parameter, made.weights, made.place, made.ahead = name, weights, place, None
        made.forget()
        return made

    def forget(self) -> None:
        """Give up what was read."""
        self._whole = self._table = self._place_of = None

    @classmethod
    def computed(cls, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func is F.embedding and isinstance(args[1], OnDisk) and kwargs.get("max_norm") is None:
            return args[1]._look_up(args[0])
        return func(*_read(args), **_read(kwargs))

    def _look_up(self, ids: torch.Tensor) -> torch.Tensor:
        if self._whole is not None:
            return F.embedding(ids, self._whole)
        wanted = torch.unique(ids).cpu()
        if self._place_of is None:
            self._place_of = torch.full((self.shape[0],), -1, dtype=torch.long)
        if len(wanted) and not 0 <= int(wanted[0]) <= int(wanted[-1]) < self.shape[0]:
            raise IndexError(f"index out of range in {self.parameter}: {int(wanted[0])} to {int(wanted[-1])}")
        new = wanted[self._place_of[wanted] < 0]
        if self._table is None and self.ahead is not None and bool(torch.isin(new, self.ahead).all()):
            new = self.ahead[self.ahead < self.shape[0]]
        if len(new):
            rows = self.weights.rows(self.parameter, new)
            if rows is None:
                return F.embedding(ids, self.whole())
            before = 0 if self._table is None else self._table.shape[0]
            self._place_of[new] = torch.arange(before, before + len(new))
            self._table = rows if self._table is None else torch.cat([self._table, rows])
        if self._table is None:
            return torch.empty((*ids.shape, *self.shape[1:]), dtype=self.dtype, device=ids.device)
        return F.embedding(self._place_of.to(ids.device)[ids], self._table)

    def whole(self) -> torch.Tensor:
        """All of it."""
        if self._whole is None:
            self._whole = self.weights.load([self.parameter])[self.parameter]
            self._table = self._place_of = None
        return self._whole


def _read(value: Any) -> Any:
    if isinstance(value, OnDisk):
        return value.whole()
    if type(value) in (tuple, list):
        return type(value)(_read(item) for item in value)
    if type(value) is dict:
        return {key: _read(item) for key, item in value.items()}
    return value


class Pending(_StandIn):
    """What a block will put out. Passed on it is followed; computed with, it raises :class:`NotStreamable`."""

    key: Hashable

    @staticmethod
    def of(like: torch.Tensor, key: Hashable) -> Pending:
        """One that will have the shape, dtype and device of ``like``."""
        empty = torch.empty(like.shape, dtype=like.dtype, device="meta")
        made: Pending = torch.Tensor._make_subclass(Pending, empty)
        made.key, made.place = key, like.device
        return made

    @classmethod
    def computed(cls, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = getattr(func, "__name__", str(func)).strip("_")
        raise NotStreamable(f"it computes with the residual stream between its blocks ({name})")


class PendingObject:
    """The same for what is no tensor."""

    def __init__(self, key: Hashable) -> None:
        self.key = key
