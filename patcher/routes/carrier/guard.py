"""An inserted block must change no other one: every block of the two classes is compared, module by module.

What a class computes from a block's index shows here as an attribute that moved with the index instead of the block.
Such are a sliding window in every sixth block, keys and values that are shared, and a factor that depends on the depth.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from patcher.architectures.model_class import on_meta, submodule
from patcher.architectures.towers import towers_of
from patcher.errors import InputError
from patcher.routes.carrier.grown import grown_axis
from patcher.routes.carrier.insertion import CannotInsert, Insertion, MovesOthers, sources_of

_INDEX = re.compile(r"(^|_)(idx|index|layer_id|block_id|layer_number|layer_num|block_number)$")
_READ_BY = {"store_full_length_kv": "is_kv_shared_layer"}
"""Attribute of a block that keeps something for later ones -> that of a block that reads it."""
_PARTS = 4
"""A block may have several parts with caches of their own, numbered through."""


def require_neutral(
    base: nn.Module, insertion: Insertion, blocks: str, *, trust_remote_code: bool = False
) -> nn.Module:
    """Hold every block and every other module of the extended class to the base's, and return the class on meta.

    Args:
        base: the base's class, on meta.
        insertion: from :func:`insert_blocks`.
        blocks: path of the list of decoder blocks.

    Raises:
        CannotInsert: a module or an attribute differs; the text names it.
    """
    try:
        extended = on_meta(insertion.config, trust_remote_code=trust_remote_code)
    except InputError as error:
        raise CannotInsert(f"the class does not build one more block: {error.problems[0].found}") from None
    old, new = submodule(base, blocks), submodule(extended, blocks)
    total = insertion.total
    if not isinstance(new, nn.ModuleList) or len(new) != total or len(old) != insertion.count:
        raise CannotInsert(f"the class does not build {total} blocks under the extended config")
    pairs = [(block, insertion.moved(block), f"block {block}") for block in range(insertion.count)]
    if not insertion.dense:
        pairs += [
            (template, place, "the inserted block")
            for layer, places in insertion.inserted.items()
            for template, place in zip(insertion.types[layer], places, strict=True)
        ]
    fixed = _fixed(old) | _without_readers(old, new)
    for block, place, name in pairs:
        harmless = fixed if name != "the inserted block" else fixed | _unlike_template(old[block], new[place])
        difference = _difference(old[block], new[place], insertion, block, place, fixed=harmless)
        if difference is not None:
            raise MovesOthers(f"inserting a block changes {name}: {difference}")
    # A tower's blocks have indices of their own, and may be as many as the decoder's.
    difference = _difference(base, extended, insertion, None, None, skip=(blocks, *towers_of(base)))
    if difference is not None:
        raise CannotInsert(f"inserting a block changes the rest of the model: {difference}")
    return extended


def block_kinds(model: nn.Module, blocks: str) -> list[Any]:
    """For each block something hashable that is equal for blocks of one type (the index itself is left out)."""
    found = []
    for block in submodule(model, blocks):
        found.append(tuple(
            (path, type(module).__qualname__, name, repr(value))
            for path, module in block.named_modules()
            for name, value in _facts(module).items()
            if not _INDEX.search(name)
        ))  # fmt: skip
    return found


def _difference(
    old: nn.Module,
    new: nn.Module,
    insertion: Insertion,
    block: int | None,
    place: int | None,
    *,
    skip: tuple[str, ...] = (),
    fixed: frozenset[str] = frozenset(),
) -> str | None:
    skipped = tuple(f"{path}." for path in skip)
    before, after = (
        {path: module for path, module in model.named_modules() if not path.startswith(skipped)} for model in (old, new)
    )
    lost = sorted(before.keys() ^ after.keys())
    if lost:
        return str(lost[0])
    for path, module in before.items():
        other = after[path]
        if type(module) is not type(other):
            return f"{path or 'its class'} is a {type(other).__name__}"
        one, two = _facts(module), _facts(other)
        sizes = _grown_sizes(one, two, insertion) if block is None else []
        for name in sorted(one.keys() | two.keys()):
            full = f"{path}.{name}".strip(".")
            if name in one and name in two and full in fixed and (one[name] == two[name] or name in _READ_BY):
                continue
            if name in one and name in two and (one[name], two[name]) in sizes:
                continue
            if name not in one or name not in two or not _same(name, one[name], two[name], insertion, block, place):
                return full
    return None


def _without_readers(*models: nn.ModuleList) -> frozenset[str]:
    """Attributes that say what is kept for later blocks, in models without a block that reads it."""
    found = set()
    for kept, read in _READ_BY.items():
        parts = [(path, module) for blocks in models for block in blocks for path, module in block.named_modules()]
        if not any(vars(module).get(read) for _, module in parts):
            found |= {f"{path}.{kept}".strip(".") for path, module in parts if kept in vars(module)}
    return frozenset(found)


def _unlike_template(template: nn.Module, inserted: nn.Module) -> frozenset[str]:
    """Attributes by which the template keeps something for later blocks, and the inserted block does not."""
    modules = dict(inserted.named_modules())
    return frozenset(
        f"{path}.{name}".strip(".")
        for path, module in template.named_modules()
        for name in _READ_BY
        if path in modules and vars(module).get(name) is True and vars(modules[path]).get(name) is False
    )


def _grown_sizes(old: Mapping[str, Any], new: Mapping[str, Any], insertion: Insertion) -> list[tuple[Any, Any]]:
    """Shapes, and sizes in them, that have grown by a part for each inserted block."""
    found: list[tuple[Any, Any]] = []
    for name, shape in old.items():
        other = new.get(name)
        if not isinstance(shape, tuple) or not isinstance(other, tuple) or shape[:1] == ("buffer",):
            continue
        axis = grown_axis(shape, other, insertion)
        if axis is not None:
            found += [(shape, other), (shape[axis], other[axis])]
    return found


def _fixed(blocks: nn.ModuleList) -> frozenset[str]:
    """Attributes that are called an index but are the same in every block: no index of a block."""
    seen: dict[str, list[int]] = {}
    for block in blocks:
        for path, module in block.named_modules():
            for name, value in _facts(module).items():
                if isinstance(value, int) and _INDEX.search(name):
                    seen.setdefault(f"{path}.{name}".strip("."), []).append(value)
    return frozenset(name for name, values in seen.items() if len(set(values)) == 1 and len(values) == len(blocks) > 1)


def _same(name: str, old: Any, new: Any, insertion: Insertion, block: int | None, place: int | None) -> bool:
    if _INDEX.search(name) and isinstance(old, int) and not isinstance(old, bool) and isinstance(new, int):
        if block is None or place is None:
            total = insertion.total
            if "layer" not in name:
                return old == new
            if not 0 <= old < insertion.count:
                return new == old - insertion.count + total
            # Where a kind of block begins, what is inserted right before it may be the first of it.
            return (insertion.moved(old - 1) + 1 if old else 0) <= new <= insertion.moved(old)
        if old >= block:
            # Its own index, counted from 0 or 1, or that of the first of several parts that have indices of their own.
            return any(
                0 <= old - parts * block <= parts and new - parts * place == old - parts * block
                for parts in range(1, _PARTS + 1)
            )
        # An index of another block, such as the one whose keys and values are shared.
        return 0 <= old < insertion.count and new == insertion.moved(old)
    if type(old) is type(new) and old == new:
        return True
    if block is None and isinstance(old, int) and isinstance(new, int):
        return "layer" in name and (old, new) == (insertion.count, insertion.total)
    if block is None and isinstance(old, list) and isinstance(new, list) and len(old) == insertion.count:
        return new == [old[source] for source in sources_of(insertion.count, insertion.types)]
    return False


def _facts(module: nn.Module) -> dict[str, Any]:
    """What a module itself holds: shapes of tensors, functions by their names, and plain values."""
    facts: dict[str, Any] = {
        name: tuple(parameter.shape)
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
    }
    for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
        facts[name] = ("buffer", *buffer.shape)
    for name, value in vars(module).items():
        if name.startswith("_") or name == "training":
            continue
        if callable(value) and hasattr(value, "__qualname__"):
            facts[name] = value.__qualname__
        elif _is_simple(value):
            facts[name] = value
    return facts


def _is_simple(value: Any) -> bool:
    if value is None or isinstance(value, (bool, int, float, str)):
        return True
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(_is_simple(item) for item in value)
    return isinstance(value, dict) and all(_is_simple(item) for item in (*value.keys(), *value.values()))
