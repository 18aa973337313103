"""One more decoder block in a config.

A config may state a block's type in a list with an entry a layer, in a list of indices, or as the number of blocks at
the start. These three are rewritten here. A class may also compute the type from the block's index. That cannot be
rewritten, and is found by :mod:`patcher.routes.carrier.guard`.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from patcher.architectures.config_keys import BLOCK_COUNTS, block_count
from patcher.architectures.model_class import quiet_transformers
from patcher.errors.causes import cause_of
from patcher.routes.plan import NotApplicable

DRAFT_COUNT = "num_nextn_predict_layers"
QUANTISED = "quantization_config"
_PREFIX = re.compile(
    r"first_k|dense_layers|num_dense|first_dense|max_window_layers|moe_layer_start|begin_swa|dense_replace"
)
_SUFFIX = re.compile(r"shared_layers$")
_INDEX_LIST = re.compile(r"layer|_ids$|_idx|indices|hybrid")
_DENSE = {"mlp_only_layers": "add", "moe_layers": "drop", "mlp_layer_types": "dense"}


@dataclass(frozen=True)
class Insertion:
    """A config with one more block after each of ``layers``.

    Attributes:
        layers: the blocks after which one is inserted, in the base's numbering, ascending.
        templates: layer -> the base's block whose type the inserted one has.
        dense: whether the inserted blocks have the dense MLP that other blocks of a mixture of experts may have.
        config: the config of the extended class.
        changes: the keys of config.json that differ, with everything that would be derived from an index written out.
        count: number of blocks in the base.
    """

    layers: tuple[int, ...]
    templates: Mapping[int, int]
    dense: bool
    config: Any
    changes: Mapping[str, Any]
    count: int

    @property
    def copy_layers(self) -> dict[int, int]:
        """Layer -> index of the block inserted after it."""
        return {layer: layer + 1 + number for number, layer in enumerate(self.layers)}

    def moved(self, block: int) -> int:
        """Where block ``block`` of the base is in the copy."""
        return block + sum(layer < block for layer in self.layers)

    def moved_name(self, name: str, prefix: str) -> str:
        """What a tensor of the base is called in the copy; ``prefix`` is what comes before the index of a block."""
        index, _, rest = name.removeprefix(prefix).partition(".")
        in_block = name.startswith(prefix) and index.isdigit()
        return f"{prefix}{self.moved(int(index))}.{rest}" if in_block else name


class CannotInsert(NotApplicable):
    """A block cannot be inserted without changing another one; the text says which and how."""


def insert_blocks(
    config: Any, layers: Sequence[int], templates: Mapping[int, int], *, dense: bool = False
) -> Insertion:
    """Extend ``config`` by one block after each of ``layers``.

    Args:
        config: a transformers config of a causal LM.
        layers: 0-based blocks, in the base's numbering.
        templates: layer -> the base's block whose type the inserted one takes.
        dense: give the inserted blocks a dense MLP, where the config can say so block by block.

    Raises:
        CannotInsert: the config has no place for such a block, or does not survive its own config.json.
    """
    count = block_count(config)
    ordered = tuple(sorted(set(layers)))
    sources = sources_of(count, ordered, templates)
    inserted = {layer + 1 + number for number, layer in enumerate(ordered)}
    before = config.to_dict()
    # What is quantised is told by names, see :mod:`patcher.routes.exclusions`.
    values = {name: value for name, value in before.items() if not name.startswith("_") and name != QUANTISED}
    changes = {}
    for name, value in values.items():
        new = _extended(name, value, sources, count)
        if name in BLOCK_COUNTS and value == count and isinstance(value, int):
            new = len(sources)
        if new != value or (isinstance(value, list) and len(new) == len(sources) and name not in ("architectures",)):
            changes[name] = new
    if dense and not _make_dense({**values, **changes}, changes, inserted):
        raise CannotInsert("the config cannot make a single block of it dense")
    if isinstance(values.get(DRAFT_COUNT), int) and values[DRAFT_COUNT] > 0:
        # Blocks that predict further tokens follow the last one on disk; no causal LM class reads them.
        changes[DRAFT_COUNT] = 0
    try:
        with quiet_transformers():
            extended = type(config).from_dict({**copy.deepcopy(before), **copy.deepcopy(changes)})
    except Exception as error:
        # Classes check their configs in their own ways, with errors of any type.
        raise CannotInsert(
            f"transformers does not load a config with {len(sources)} such blocks: {cause_of(error)}"
        ) from None
    for name, value in vars(config).items():
        if name.startswith("_attn_implementation") or name == "_attn_implementation_internal":
            setattr(extended, name, value)
    return Insertion(ordered, {layer: templates[layer] for layer in ordered}, dense, extended, changes, count)


def sources_of(count: int, layers: tuple[int, ...], templates: Mapping[int, int]) -> list[int]:
    """For each block of the copy, the base's block whose type it has."""
    return list(itertools.chain.from_iterable(
        (block, templates[block]) if block in layers else (block,) for block in range(count)
    ))  # fmt: skip


def _extended(name: str, value: Any, sources: Sequence[int], count: int) -> Any:
    if _is_per_block(value, count):
        # transformers pads the index with zeros
        return {
            f"{place:0{len(str(key))}d}": copy.deepcopy(item)
            for key, item in value.items()
            for place, source in enumerate(sources)
            if source == int(key)
        }
    if isinstance(value, dict):
        first = 1 if any(_is_index_list(item, count, 1) and count in item for item in value.values()) else 0
        return {
            key: _extended_list(str(key), item, sources, count, first)
            if isinstance(item, (list, tuple))
            else _extended(str(key), item, sources, count) if isinstance(item, dict) else item
            for key, item in value.items()
        }  # fmt: skip
    if isinstance(value, (list, tuple)):
        return _extended_list(name, value, sources, count, 0)
    if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= count and name not in BLOCK_COUNTS:
        if _PREFIX.search(name):
            # Where the first blocks of the copy are no longer all of these, another key must say so.
            return next((place for place, source in enumerate(sources) if source >= value), len(sources))
        if _SUFFIX.search(name):
            return sum(source >= count - value for source in sources)
    return value


def _extended_list(name: str, value: Any, sources: Sequence[int], count: int, first: int) -> Any:
    if "token" in name or not value:
        return value
    if names_blocks(name, value, count, first):
        wanted = set(value)
        return [index + first for index, source in enumerate(sources) if source + first in wanted]
    return [value[source] for source in sources] if len(value) == count else value


def names_blocks(name: str, value: Any, count: int, first: int = 0) -> bool:
    """Whether a config key lists blocks of ``count`` by their indices, and is not a list with an entry a block."""
    if not _INDEX_LIST.search(name) or not _is_index_list(value, count, first):
        return False
    return len(value) < count or list(value) == list(range(first, count + first))


def _is_per_block(value: Any, count: int) -> bool:
    """Whether it holds the settings of single blocks, by index."""
    if not isinstance(value, dict) or not value:
        return False
    return all(str(key).isdigit() and int(key) < count and isinstance(item, dict) for key, item in value.items())


def _is_index_list(value: Any, count: int, first: int) -> bool:
    """Whether it is a list of indices of blocks, in ascending order, the first block's being ``first``."""
    if not isinstance(value, (list, tuple)) or not value or not all(type(item) is int for item in value):
        return False
    ascends = all(a < b for a, b in itertools.pairwise(value))
    return ascends and bool(first <= value[0] and value[-1] < count + first)


def _make_dense(values: Mapping[str, Any], changes: dict[str, Any], inserted: set[int]) -> bool:
    for name, how in _DENSE.items():
        value = values.get(name)
        if not isinstance(value, list):
            continue
        if how == "add":
            changes[name] = sorted({*value, *inserted})
        elif how == "drop" and value:
            changes[name] = [index for index in value if index not in inserted]
        elif how == "dense" and len(value) > max(inserted) and "sparse" in value:
            changes[name] = ["dense" if index in inserted else item for index, item in enumerate(value)]
        else:
            continue
        return True
    return False
