"""The weights of a checkpoint, read from the disk piece by piece, under the names that the stock class gives them."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from patcher.architectures.model_class import saved_names
from patcher.capture.streaming.stored_tensors import StoredTensors
from patcher.checkpoint.names import stored_name
from patcher.errors import InputError
from patcher.errors.causes import cause_of

_OF_EACH_EXPERT = ("MergeModulelist", "Concatenate", "Transpose")


@dataclass(frozen=True)
class _Source:
    """What a tensor of the class is made of: tensors on the disk, and transformers' converter (None: it is one)."""

    names: list[str]
    patterns: list[str]
    converter: Any


class DiskWeights:
    """Parameters and buffers of a stock class, made of what a checkpoint stores, in the dtypes of ``from_pretrained``.

    Names on the disk that the class has given up since, experts that are stored one by one and the like are converted
    by transformers' own rules.

    Args:
        stored: the checkpoint.
        model: the class on the meta device, in the dtype that is computed in.
        dtype: that dtype.
        device: where the tensors are put.
    """

    def __init__(self, stored: StoredTensors, model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
        self._stored, self._model, self._device = stored, model, device
        self._state: dict[str, torch.Tensor] = dict(model.state_dict())
        self._parameters = {name for name, _parameter in model.named_parameters(remove_duplicate=False)}
        plan: dict[str, torch.dtype] = getattr(model, "_get_dtype_plan", lambda _dtype: {})(dtype)
        self._plan = [(re.compile(pattern.replace("*", ".*")), wider) for pattern, wider in plan.items()]
        self._sources = self._find_sources()
        self._origin = self._find_origins()

    @property
    def names(self) -> Collection[str]:
        """Every parameter and persistent buffer of the class."""
        return self._state.keys()

    def under(self, path: str) -> list[str]:
        """Those of the module at ``path``."""
        return [name for name in self._state if name.startswith(path + ".")]

    def size(self, path: str) -> int:
        """Bytes that those take up when they are loaded."""
        shapes = (self._state[name] for name in self.under(path))
        return sum(tensor.numel() * tensor.element_size() for tensor in shapes)

    def has(self, name: str) -> bool:
        """Whether the checkpoint stores what this parameter or buffer is made of."""
        return name in self._origin

    def load(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Read these parameters and buffers; tied ones are one tensor.

        Raises:
            InputError: the checkpoint lacks one of them, or holds it in another shape.
        """
        wanted = list(names)
        if missing := [name for name in wanted if name not in self._origin]:
            raise InputError(
                f"the checkpoint lacks {missing[0]!r}" + (f" and {len(missing) - 1} more" if missing[1:] else ""),
                where=f"model_type `{self._model.config.model_type}`",  # type: ignore[union-attr]
                found="no tensor on the disk that it is made of",
                remedy="download the checkpoint again, or check that the config is this checkpoint's",
                code="checkpoint",
            )
        made: dict[str, torch.Tensor] = {}
        for target in dict.fromkeys(self._origin[name][0] for name in wanted):
            made.update(self._make(target))
        return {name: self._as_in_class(name, made[self._origin[name][1]]) for name in wanted}

    def _as_in_class(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        # Whether a weight requires a gradient decides which kernels multiply with it, even where none is taken.
        wants = tensor.is_floating_point()
        return nn.Parameter(tensor, requires_grad=wants) if name in self._parameters else tensor

    def rows(self, name: str, rows: torch.Tensor) -> torch.Tensor | None:
        """Rows of a table, on its device ([len(rows), ...]; see :meth:`StoredTensors.read_rows`).

        None where the table does not lie on the disk as it is.
        """
        source = self._sources[self._origin[name][0]] if name in self._origin else None
        if source is None or source.converter is not None:
            return None
        if self._stored.info(source.names[0]).shape != tuple(self._state[name].shape):
            return None
        return self._cast(self._stored.read_rows(source.names[0], rows), name)

    def _find_sources(self) -> dict[str, _Source]:
        """What each name in the class is made of; of a converter that makes several, the first stands for all."""
        try:
            from transformers.conversion_mapping import get_model_conversion_mapping
            from transformers.core_model_loading import (
                WeightConverter,
                WeightRenaming,
                dot_natural_key,
                rename_source_key,
            )

            rules = get_model_conversion_mapping(self._model)
        except (ImportError, TypeError):
            # They are no public functions. Without them, what lies on the disk under the class's names is found.
            return self._plain_sources()
        prefix = getattr(self._model, "base_model_prefix", "")
        renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
        found: dict[str, _Source] = {}
        for name in sorted(self._stored.names, key=dot_natural_key):
            target, pattern = rename_source_key(name, renamings, converters, prefix, self._state)
            if target not in self._state and name in self._state:
                target, pattern = rename_source_key(name, [], [], prefix, self._state)
            if target in self._state:
                source = found.setdefault(target, _Source([], [], by_pattern.get(pattern)))
                source.names.append(name)
                source.patterns.append(name if pattern is None else pattern)
        return found

    def _plain_sources(self) -> dict[str, _Source]:
        prefix, spelled = getattr(self._model, "base_model_prefix", ""), saved_names(self._model, self._state)
        names = {
            target: stored_name(target, self._stored.names, prefix)
            or stored_name(spelled[target], self._stored.names, prefix)
            for target in self._state
        }
        return {target: _Source([name], [name], None) for target, name in names.items() if name is not None}

    def _find_origins(self) -> dict[str, tuple[str, str]]:
        """Name in the class -> the source that makes it, and under which name it does."""
        found = {}
        for target, source in self._sources.items():
            found[target] = (target, target)
            patterns = source.converter.target_patterns if source.converter is not None else []
            for pattern in patterns[1:]:
                other = target.replace(patterns[0], pattern)
                if other in self._state and other not in self._sources:
                    found[other] = (target, other)
        alike: dict[int, list[str]] = {}
        for name, parameter in self._model.named_parameters(remove_duplicate=False):
            alike.setdefault(id(parameter), []).append(name)
        for names in alike.values():
            stored = next((name for name in names if name in found), None)
            if stored is not None:
                found.update({name: found[stored] for name in names if name not in found})
        return found

    def _make(self, target: str) -> dict[str, torch.Tensor]:
        source = self._sources[target]
        if source.converter is None:
            made = {target: self._cast(self._stored.read(source.names[0]), target)}
        else:
            made = self._by_expert(target, source) or self._convert(target, source, list(range(len(source.names))))
        for name, tensor in made.items():
            wanted = tuple(self._state[name].shape) if name in self._state else None
            if wanted is not None and tuple(tensor.shape) != wanted:
                raise InputError(
                    f"{name!r} has another shape than the config says",
                    where=", ".join(source.names[:2]),
                    found=f"{tuple(tensor.shape)} instead of {wanted}",
                    remedy="check that the config is this checkpoint's",
                    code="checkpoint",
                )
        return made

    def _convert(self, target: str, source: _Source, chosen: Iterable[int]) -> dict[str, torch.Tensor]:
        converter = copy.deepcopy(source.converter)
        for index in chosen:
            name, pattern = source.names[index], source.patterns[index]
            converter.add_tensor(target, name, pattern, functools.partial(self._read_for, target, name))
        try:
            made = converter.convert(target, model=self._model, config=self._model.config)
        except (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise InputError(
                f"transformers cannot make {target!r} of what the checkpoint stores",
                where=", ".join(source.names[:2]),
                found=cause_of(error),
                remedy="capture.mode: memory",
                code="stream",
            ) from None
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def _by_expert(self, target: str, source: _Source) -> dict[str, torch.Tensor] | None:
        """Experts that are stored one by one, put together one by one: all at once, they would need memory twice."""
        count = self._state[target].shape[0] if self._state[target].ndim else 0
        places: dict[str, list[int]] = {}
        for index, pattern in enumerate(source.patterns):
            places.setdefault(pattern, []).append(index)
        operations = [type(operation).__name__ for operation in source.converter.operations]
        apart = all(name in _OF_EACH_EXPERT for name in operations) and len(source.converter.target_patterns) == 1
        if count < 2 or not apart or any(len(found) != count for found in places.values()):
            return None
        whole: torch.Tensor | None = None
        for expert in range(count):
            (made,) = self._convert(target, source, [found[expert] for found in places.values()]).values()
            if made.shape != (1, *self._state[target].shape[1:]):
                return None
            if whole is None:
                whole = torch.empty((count, *made.shape[1:]), dtype=made.dtype, device=made.device)
            whole[expert] = made[0]
        return None if whole is None else {target: whole}

    def _read_for(self, target: str, name: str) -> torch.Tensor:
        return self._cast(self._stored.read(name), target)

    def _cast(self, tensor: torch.Tensor, name: str) -> torch.Tensor:
        wider = next((dtype for pattern, dtype in self._plan if pattern.search(name)), None)
        return tensor.to(device=self._device, dtype=wider or self._state[name].dtype)
