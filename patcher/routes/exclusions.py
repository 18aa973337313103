"""What a quantised copy's config says of its modules: of those that moved, and of those that are not quantised.

Every format lists modules by names, by parts of names or by regular expressions. Other blocks than before must not
match, and so each entry is read as the stock loader reads it: against the names of all modules, before and after. One
that would mean other modules has the index in it moved; where that does not do, it gives way to the full names of what
it means. What is added are full names as well, since some loaders know nothing else.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from patcher.architectures.quantised import Quantisation
from patcher.checkpoint.safetensors_file import FLOATS, TensorInfo
from patcher.routes.plan import NotApplicable

_BOUNDARY = r"(?:(?<=\.)|(?=\.|$))"
_EXPERT = re.compile(r"\.experts\.\d+\..*$")
Matches = Callable[[str, str], bool]
"""(entry, name of a module) -> whether the loader takes the entry to mean the module."""


@dataclass(frozen=True)
class Modules:
    """The modules with weights of a base and of its copy, by their names in the class and on disk.

    Attributes:
        moved: module of the base -> the same one in the copy, or the ones that it is split into.
        quantised: those of the base whose weights are quantised.
        plain: those whose weights a loader would quantise, and which are stored in floating point.
        added: modules of the copy that the base lacks, to be kept in floating point.
        index: of a block of the base -> of the same block in the copy.
    """

    moved: Mapping[str, Sequence[str]]
    quantised: Collection[str]
    plain: Collection[str]
    added: Collection[str] = ()
    index: Callable[[int], int] = lambda block: block


def module_of(name: str) -> str:
    """The module of a tensor on disk; experts that are stored one by one are one module, as they are in the class."""
    return _EXPERT.sub(".experts", name.rpartition(".")[0])


def modules_of(
    model: nn.Module,
    quantisation: Quantisation,
    stored: Mapping[str, TensorInfo] | None,
    moved: Callable[[str], Sequence[str]],
    added: Collection[str] = (),
    index: Callable[[int], int] = lambda block: block,
) -> Modules:
    """The modules of a base, by the names of its class and by those on disk.

    Args:
        model: the base's class, on meta.
        stored: what the checkpoint stores; None: everything in blocks that can be quantised is.
        moved: module of the base -> in the copy.
        added, index: see :class:`Modules`.
    """
    linear = {name for name, module in model.named_modules() if _is_linear(module)}
    holders = [
        name for name, module in model.named_modules() if next(module.parameters(recurse=False), None) is not None
    ]
    if stored is None:
        quantised = {name for name in linear if re.search(r"\.\d+\.", name)}
        plain = linear - quantised
    else:
        quantised = {module_of(name) for name in quantisation.quantised_weights(stored)}
        # A head that is the embedding is stored under the other's name, or not at all.
        heads = {name for name in linear - quantised if not re.search(r"\.\d+\.", name)}
        here = {module_of(name) for name, info in stored.items() if len(info.shape) > 1 and info.dtype in FLOATS}
        classes = dict(model.named_modules())
        plain = heads | {name for name in here - quantised if name in linear or name not in classes}
    names = dict.fromkeys([*holders, *(module_of(name) for name in stored or ())])
    return Modules({name: moved(name) for name in names}, quantised, plain, added, index)


def _is_linear(module: nn.Module) -> bool:
    """Whether loaders put a quantised layer in its place: one that multiplies by a matrix, or experts in one tensor."""
    own = list(module.parameters(recurse=False))
    return type(module).__name__ in ("Linear", "Conv1D") or any(parameter.ndim == 3 for parameter in own)


def moved_config(quantisation: Quantisation, stated: Mapping[str, Any], modules: Modules) -> dict[str, Any]:
    """``quantization_config`` of the copy.

    Args:
        quantisation: the base's format.
        stated: the base's ``quantization_config``.
        modules: what is where.

    Raises:
        NotApplicable: the config has settings that cannot be moved.
    """
    result = copy.deepcopy(dict(stated))
    skip = quantisation.skip
    if quantisation.method == "gptq":
        result[skip] = [[new for name, moved in modules.moved.items() if name in modules.quantised for new in moved]]
        if stated.get("dynamic"):
            result["dynamic"] = {
                **{f"-:^{re.escape(name)}$": {} for name in modules.added},
                **_moved_keys(stated["dynamic"], modules),
            }
        return result
    if quantisation.method == "compressed-tensors":
        groups = result.get("config_groups")
        for group in groups.values() if isinstance(groups, dict) else ():
            group["targets"] = _moved_entries(_listed(group.get("targets")), modules, _by_name)
        matches: Matches = _by_name
    else:
        matches = _by_pattern
    before = _listed(stated.get(skip))
    entries = _moved_entries(before, modules, matches)
    if not before and quantisation.method != "compressed-tensors":
        # Without a list the loader takes one of its own, which holds for no list but that.
        entries += [new for name in modules.moved if name in modules.plain for new in modules.moved[name]]
    result[skip] = list(dict.fromkeys([*entries, *modules.added]))
    for key in ("ignored_layers",):
        # vLLM looks there first.
        if stated.get(key):
            result[key] = [*_moved_entries(_listed(stated[key]), modules, _by_pattern), *modules.added]
    return result


def _listed(value: Any) -> list[str]:
    if value is None:
        return []
    if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) for item in value):
        raise NotApplicable(f"quantization_config lists modules in a way that is not known here ({str(value)[:80]})")
    return list(value)


def _moved_entries(entries: Sequence[str], modules: Modules, matches: Matches) -> list[str]:
    return [new for entry in entries for new in _moved(entry, modules, matches)]


def _moved_keys(settings: Any, modules: Modules) -> dict[str, Any]:
    if not isinstance(settings, Mapping):
        raise NotApplicable("quantization_config.dynamic is no mapping")
    found = {}
    for key, value in settings.items():
        sign = key[:2] if key[:2] in ("-:", "+:") else ""
        for new in _moved(key.removeprefix(sign), modules, _by_start, lambda name: f"^{re.escape(name)}$"):
            found[sign + new] = value
    return found


def _moved(entry: str, modules: Modules, matches: Matches, exactly: Callable[[str], str] = str) -> list[str]:
    """What takes the place of an entry; ``exactly`` makes one of the full name of a module."""
    meant = {new for name, moved in modules.moved.items() if matches(entry, name) for new in moved}
    others = {new for moved in modules.moved.values() for new in moved}
    for candidate in dict.fromkeys((entry, _reindexed(entry, modules.index))):
        if {name for name in others if matches(candidate, name)} == meant:
            return [candidate]
    return [exactly(name) for name in sorted(meant)]


def _reindexed(entry: str, index: Callable[[int], int]) -> str:
    return re.sub(
        r"(?<=[A-Za-z]\.)(\d+)(?=\\?\.|$)|(?<=[A-Za-z]\\\.)(\d+)(?=\\?\.|$)", lambda m: str(index(int(m[0]))), entry
    )


def _by_pattern(entry: str, name: str) -> bool:
    """transformers: a regular expression from the start up to the end of a part of the name, or the end of it."""
    if name.endswith(entry):
        return True
    try:
        return re.match(rf"(?:{entry}){_BOUNDARY}", name) is not None
    except re.error:
        return False


def _by_name(entry: str, name: str) -> bool:
    """compressed-tensors: the whole name, or a regular expression from its start. (Names of classes match no name.)"""
    return _by_start(entry[3:], name) if entry.startswith("re:") else entry == name


def _by_start(entry: str, name: str) -> bool:
    try:
        return re.match(entry, name) is not None
    except re.error:
        return False
