"""More decoder blocks in a config: one after a layer, or as many as its pattern of block types is long.

A config may state a block's type in a list with an entry a layer, in a list of indices, or as the number of blocks at
the start. These three are rewritten here. A class may also compute the type from the block's index. That cannot be
rewritten, and is found by :mod:`patcher.routes.carrier.guard`. Where the types repeat themselves, as many blocks as
their pattern is long keep the type of every later one.
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
_LONGEST_PATTERN = 8
_AS_TEXT = ("hybrid_override_pattern",)
_DENSE = {"mlp_only_layers": "add", "moe_layers": "drop", "mlp_layer_types": "dense"}


@dataclass(frozen=True)
class Insertion:
    """A config with one more block, or several, after each of ``layers``.

    Attributes:
        layers: the blocks after which some are inserted, in the base's numbering, ascending.
        types: layer -> for each block that is inserted after it, the base's block whose type it has.
        carriers: layer -> which of them is to hold the vector; the others do nothing.
        dense: whether the inserted blocks have the dense MLP that other blocks of a mixture of experts may have.
        config: the config of the extended class.
        changes: the keys of config.json that differ, with everything that would be derived from an index written out.
        count: number of blocks in the base.
    """

    layers: tuple[int, ...]
    types: Mapping[int, tuple[int, ...]]
    carriers: Mapping[int, int]
    dense: bool
    config: Any
    changes: Mapping[str, Any]
    count: int

    @property
    def inserted(self) -> dict[int, tuple[int, ...]]:
        """Layer -> indices of the blocks inserted after it."""
        return {
            layer: tuple(range(self.moved(layer) + 1, self.moved(layer) + 1 + len(self.types[layer])))
            for layer in self.layers
        }

    @property
    def templates(self) -> dict[int, int]:
        """Layer -> the base's block whose type the inserted one has that is to hold the vector."""
        return {layer: types[self.carriers[layer]] for layer, types in self.types.items()}

    @property
    def copy_layers(self) -> dict[int, int]:
        """Layer -> index of the block inserted after it that is to hold the vector."""
        return {layer: places[self.carriers[layer]] for layer, places in self.inserted.items()}

    @property
    def total(self) -> int:
        """Number of blocks in the copy."""
        return self.moved(self.count)

    def moved(self, block: int) -> int:
        """Where block ``block`` of the base is in the copy."""
        return block + sum(len(self.types[layer]) for layer in self.layers if layer < block)

    def moved_name(self, name: str, prefix: str) -> str:
        """What a tensor of the base is called in the copy; ``prefix`` is what comes before the index of a block."""
        index, _, rest = name.removeprefix(prefix).partition(".")
        in_block = name.startswith(prefix) and index.isdigit()
        return f"{prefix}{self.moved(int(index))}.{rest}" if in_block else name


class CannotInsert(NotApplicable):
    """A block cannot be inserted without changing another one; the text says which and how."""


class MovesOthers(CannotInsert):
    """A block that comes later would be of another type: the class computes that from its index."""


def insert_blocks(
    config: Any,
    layers: Sequence[int],
    templates: Mapping[int, int | Sequence[int]],
    *,
    dense: bool = False,
    carriers: Mapping[int, int] | None = None,
) -> Insertion:
    """Extend ``config`` by blocks after each of ``layers``.

    Args:
        config: a transformers config of a causal LM.
        layers: 0-based blocks, in the base's numbering.
        templates: layer -> the base's block whose type the inserted one takes; several for several blocks.
        dense: give the inserted blocks a dense MLP, where the config can say so block by block.
        carriers: layer -> which of the blocks after it is to hold the vector; by default the first.

    Raises:
        CannotInsert: the config has no place for such a block, or does not survive its own config.json.
    """
    count = block_count(config)
    ordered = tuple(sorted(set(layers)))
    each = {layer: _each(templates[layer]) for layer in ordered}
    sources = sources_of(count, each)
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
    if dense and not _make_dense({**values, **changes}, changes, _places(each)):
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
    return Insertion(
        ordered, each, {layer: (carriers or {}).get(layer, 0) for layer in ordered}, dense, extended, changes, count
    )


def _places(types: Mapping[int, Sequence[int]]) -> set[int]:
    """Indices of the inserted blocks."""
    new, places = 0, set()
    for layer in sorted(types):
        places |= set(range(layer + 1 + new, layer + 1 + new + len(types[layer])))
        new += len(types[layer])
    return places


def _each(templates: int | Sequence[int]) -> tuple[int, ...]:
    return (templates,) if isinstance(templates, int) else tuple(templates)


def as_stated(insertion: Insertion, config: Any, stated: Mapping[str, Any]) -> dict[str, Any]:
    """The changes as the base's config.json says such things: stacks know its words, not those of the class.

    Args:
        insertion: from :func:`insert_blocks`.
        config: of the base.
        stated: the base's config.json.
    """
    sources, count, known = sources_of(insertion.count, insertion.types), insertion.count, config.to_dict()
    changes = dict(insertion.changes)
    for name, value in stated.items():
        if name in _AS_TEXT and isinstance(value, str) and len(value) == count:
            changes = {key: new for key, new in changes.items() if not isinstance(new, list) or key in stated}
            changes[name] = "".join(value[source] for source in sources)
        elif name in BLOCK_COUNTS and value == count:
            changes[name] = insertion.total
        elif isinstance(value, list) and name not in known:
            new = _extended(name, value, sources, count)
            changes |= {name: new} if new != value else {}
    return changes


def sources_of(count: int, templates: Mapping[int, Sequence[int]]) -> list[int]:
    """For each block of the copy, the base's block whose type it has."""
    return [source for block in range(count) for source in (block, *templates.get(block, ()))]


def continued(layer: int, number: int, count: int) -> tuple[int, ...]:
    """The base's blocks whose types ``number`` blocks after ``layer`` have in a pattern of that length."""
    return tuple(block if block < count else block - number for block in range(layer + 1, layer + 1 + number))


def pattern_length(kinds: Sequence[Any]) -> int | None:
    """After how many blocks their kinds repeat themselves, or None; a few blocks at the start may differ."""
    for length in range(1, min(_LONGEST_PATTERN, len(kinds) // 2) + 1):
        same = [kind == kinds[block + length] for block, kind in enumerate(kinds[:-length])]
        start = len(same) - next((back for back, one in enumerate(reversed(same)) if not one), len(same))
        if start <= len(kinds) // 4:
            return length
    return None


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
