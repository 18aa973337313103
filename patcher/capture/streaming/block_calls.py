"""What the blocks of a model are called with, written down in one forward pass and called again block by block."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from patcher.capture.streaming.activation_store import ActivationStore, Held
from patcher.capture.streaming.stand_ins import NotStreamable, OnDisk, Pending, PendingObject

After = Callable[[int, torch.Tensor], torch.Tensor]
"""Takes a layer and the residual stream after it; gives back what goes on from there."""


@dataclass(frozen=True)
class Returned:
    """What a block returns: one tensor, or several things of these kinds of which the first is the residual stream."""

    several: type | None
    kinds: tuple[str, ...]

    @staticmethod
    def by(output: Any) -> tuple[Returned, tuple[Any, ...]]:
        """The form of a block's return value, and its parts."""
        several = None if isinstance(output, torch.Tensor) else type(output)
        if several not in (None, tuple, list):
            raise NotStreamable(f"its blocks return a {type(output).__name__}")
        parts = (output,) if several is None else tuple(output)
        kinds = tuple(
            "tensor" if isinstance(part, torch.Tensor) else "none" if part is None else "object" for part in parts
        )
        if kinds[:1] != ("tensor",):
            raise NotStreamable("its blocks do not return the residual stream first")
        return Returned(several, kinds), parts

    def of(self, number: int, hidden: torch.Tensor) -> Any:
        """A return value with this residual stream and, for the rest, what call ``number`` will put out."""
        parts: list[Any] = [hidden]
        for place, kind in enumerate(self.kinds[1:], start=1):
            parts.append(None if kind == "none" else PendingObject((number, place)))
        return hidden if self.several is None else self.several(parts)

    def pending(self, number: int, like: torch.Tensor) -> Any:
        """The same with a residual stream that is not there yet, of the shape of ``like``."""
        return self.of(number, Pending.of(like, (number, 0)))


@dataclass(frozen=True)
class _Given:
    """In a recorded argument: the tensor that goes here."""

    key: Hashable


@dataclass(frozen=True)
class Call:
    """A call of block ``layer``, with keys in place of tensors."""

    layer: int
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    uses: frozenset[Hashable]


@dataclass
class Recording:
    """The calls of one forward pass.

    Attributes:
        calls: in their order.
        known: key -> tensor, of what was there before any block was run. What the block of call ``n`` puts out goes by
            the keys (n, place in the output).
    """

    calls: list[Call] = field(default_factory=list)
    known: dict[Hashable, Any] = field(default_factory=dict)
    _keys: dict[int, Hashable] = field(default_factory=dict)
    _versions: dict[Hashable, int] = field(default_factory=dict)

    def add(self, layer: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Write a call down.

        Raises:
            NotStreamable: residual streams are handed over in a way that cannot be followed.
        """
        uses: set[Hashable] = set()
        named = {name: self._look(value, uses) for name, value in kwargs.items()}
        self.calls.append(Call(layer, self._look(args, uses), named, frozenset(uses)))

    def check(self) -> None:
        """Raise NotStreamable if a tensor was changed after a block was called with it."""
        if any(self.known[key]._version != version for key, version in self._versions.items()):
            raise NotStreamable("it changes what its blocks are given after they were called")

    def _look(self, value: Any, uses: set[Hashable]) -> Any:
        key: Hashable
        if isinstance(value, OnDisk):
            return value
        if isinstance(value, (Pending, PendingObject)):
            key = value.key
        elif isinstance(value, torch.Tensor):
            key = self._keys.setdefault(id(value), ("given", len(self._keys)))
            # The reference keeps the id from being used again.
            self.known[key] = value
            self._versions.setdefault(key, value._version)
        elif type(value) is tuple:
            return tuple(self._look(item, uses) for item in value)
        else:
            # Blocks may hand something on in a list or a dict, so these have to stay the ones they are.
            inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
            if any(isinstance(item, (Pending, PendingObject)) for item in inside):
                raise NotStreamable("it collects the residual streams between its blocks")
            return value
        uses.add(key)
        return _Given(key)


def _filled(value: Any, given: Mapping[Hashable, Any]) -> Any:
    if isinstance(value, _Given):
        return given[value.key]
    return tuple(_filled(item, given) for item in value) if type(value) is tuple else value


class BatchOnItsWay:
    """One batch between the blocks: its calls, and its tensors in the store.

    Args:
        kept: keys of outputs that are asked for at the end.
    """

    def __init__(self, recording: Recording, store: ActivationStore, kept: Collection[Hashable] = ()) -> None:
        self.calls, self._store = recording.calls, store
        self._last_use: dict[Hashable, float] = {
            key: number for number, call in enumerate(self.calls) for key in call.uses
        }
        self._last_use.update(dict.fromkeys(kept, math.inf))
        self._held: dict[Hashable, Held] = store.put(recording.known)

    @property
    def layers(self) -> list[int]:
        """Which blocks are called, in order."""
        return [call.layer for call in self.calls]

    def step(self, number: int, block: nn.Module, returns: Returned, after: After) -> None:
        """Do call ``number``."""
        call = self.calls[number]
        given = self._store.get({key: self._held[key] for key in call.uses})
        args, kwargs = _filled(call.args, given), {name: _filled(value, given) for name, value in call.kwargs.items()}
        for key in [key for key in call.uses if self._last_use[key] <= number]:
            self._store.drop(self._held.pop(key))
            del given[key]
        versions = {key: value._version for key, value in given.items() if isinstance(value, torch.Tensor)}
        output = block(*args, **kwargs)
        del args, kwargs
        for key, version in versions.items():
            if given[key]._version != version:
                self._store.put_back(self._held[key], given[key])
        given.clear()
        found, parts = Returned.by(output)
        del output
        if found != returns:
            raise NotStreamable(f"block {call.layer} returns something else than block 0")
        values = {(number, place): part for place, part in enumerate((after(call.layer, parts[0]), *parts[1:]))}
        del parts
        self._held.update(self._store.put({key: value for key, value in values.items() if key in self._last_use}))

    def take(self, key: Hashable) -> Any:
        """An output that was kept; it is given up."""
        held = self._held.pop(key)
        value = self._store.get({key: held})[key]
        self._store.drop(held)
        return value
