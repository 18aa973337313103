"""Whether a base is complete: the names and shapes on disk against the class that stock software loads.

Stock loaders fill what is missing with new numbers at every load, and say it in a warning at most. A vector that is
computed on such a model, or a copy of it, is worth nothing.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from patcher.architectures.config_keys import stated
from patcher.architectures.loading import Loading, Stored, expected_names, stock_loading, tied_names
from patcher.checkpoint.bin_files import load_bin
from patcher.checkpoint.copying import read_range
from patcher.checkpoint.folder import BIN_INDEX, BIN_SINGLE, INDEX, SINGLE, CheckpointFolder
from patcher.checkpoint.incomplete import listed, mismatched, missing
from patcher.checkpoint.prepare import read_config
from patcher.checkpoint.safetensors_file import DTYPES, TensorInfo
from patcher.checkpoint.source import Source
from patcher.checkpoint.stored_names import candidates, renamed, without
from patcher.errors import InputError

_SAMPLE = 1 << 18
"""Bytes that are compared at one place."""
_MASKS = re.compile(r"(attn|attention)\.(bias|masked_bias)$|inv_freq$|position_ids$|rotary_emb\.")
"""Constants that checkpoints of earlier releases store."""
_SCALES = re.compile(r"\.(weight_scale|weight_scale_inv|scale_inv|scale_weight|scales?|SCB)$")
_PLAIN = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Reading:
    """How a base is read.

    Attributes:
        stripped: what is left out of the names on disk, see :mod:`patcher.checkpoint.stored_names`.
        notes: what the user should know.
    """

    stripped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def stored_in(checkpoint: CheckpointFolder) -> tuple[Stored, tuple[str, ...]]:
    """The names, dtypes and shapes that are stored, and the keys under which pickles of training frameworks have them.

    Headers are read. Of a partial checkpoint, the shapes of what is not here are not known.
    """
    if checkpoint.partial and checkpoint.layout in ("sharded", "bin-sharded"):
        files = set(checkpoint.weight_map.values())
        there = {name for name in files if (checkpoint.path / name).is_file()}
        if len(there) < len(files):
            here = _headers(checkpoint) if there and not checkpoint.is_bin else {}
            return {**dict.fromkeys(checkpoint.weight_map, (None, None)), **here}, ()
    if not checkpoint.is_bin:
        return _headers(checkpoint), ()
    stored: dict[str, tuple[torch.dtype | None, tuple[int, ...] | None]] = {}
    nests: dict[str, None] = {}
    for name in checkpoint.weight_files:
        weights = load_bin(checkpoint.path / name)
        stored |= {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in weights.items()}
        nests |= {f"{weights.nest}.": None} if weights.nest else {}
    return stored, tuple(nests)


def _headers(checkpoint: CheckpointFolder) -> Stored:
    return {name: (DTYPES.get(info.dtype), info.shape) for name, info in checkpoint.tensors.items()}


def reading_of(source: Source, *, trust_remote_code: bool = False) -> Reading:
    """How a base is read; of a Hub model, by what is here: all weights, an index of their names, or nothing.

    Raises:
        InputError: see :func:`require_complete`.
    """
    weights = (SINGLE, INDEX, BIN_SINGLE, BIN_INDEX)
    if source.hub and not any((source.folder / name).is_file() for name in weights):
        return Reading()
    where = source.name if source.hub else str(source.folder)
    checkpoint = CheckpointFolder(source.folder, partial=source.hub)
    return require_complete(checkpoint, where, trust_remote_code=trust_remote_code)


def require_complete(checkpoint: CheckpointFolder, where: str, *, trust_remote_code: bool = False) -> Reading:
    """Refuse a base that stock loaders would not fill.

    Args:
        checkpoint: the base; names, dtypes and shapes are looked at.
        where: the folder, or the name on the Hub.

    Returns:
        How it is read.

    Raises:
        InputError: tensors are missing, have another shape than the config says, or have names of something else.
    """
    stored, nests = stored_in(checkpoint)
    config = checkpoint.config
    parsed = read_config(checkpoint.path, trust_remote_code=trust_remote_code)
    load = functools.partial(stock_loading, parsed, trust_remote_code=trust_remote_code)
    found = load(stored)
    if found is None:
        return Reading()
    stripped: tuple[str, ...] = ()
    if found.missing:
        expected = expected_names(parsed, trust_remote_code=trust_remote_code)
        stripped, found = _best_way(load, expected, stored, found, where)
    elif 2 * sum(_doubled(name) for name in stored) > len(stored):
        # Stock transformers forgives its own prefix twice; other stacks do not.
        expected = expected_names(parsed, trust_remote_code=trust_remote_code)
        stripped = next((way for way in candidates(stored, expected) if _becomes(stored, way, expected)), ())
    if stated(parsed, "quantization_config") is None and (packed := _packed(stored, found)):
        raise InputError(
            f"the base stores {listed(packed)} quantised, and its config.json does not say how",
            where=where,
            found="no quantization_config in config.json",
            remedy="put the config.json that was saved with these weights beside them",
            code="incomplete",
        )
    if found.missing:
        raise missing(stored, found, config, stripped, where)
    if found.mismatched:
        raise mismatched(stored, found, config, stripped, where)
    stripped = (*nests, *stripped)
    notes = [
        *_notes(found, stripped),
        *_untied(checkpoint, stripped, tied_names(parsed, trust_remote_code=trust_remote_code)),
    ]
    method = (config.get("quantization_config") or {}).get("quant_method")
    if method in ("gptq", "awq", "fp8", "mxfp4") and not any(dtype not in _PLAIN for dtype, _shape in stored.values()):
        notes.append(
            f"config.json says that the weights are quantised ({method}), and none is stored so: take "
            "`quantization_config` out of it, else some stock software fails or makes up scales"
        )
    return Reading(stripped, tuple(notes))


def _untied(checkpoint: CheckpointFolder, stripped: Sequence[str], ties: Mapping[str, str]) -> Iterator[str]:
    """What is said of a head that the config ties to the embedding, and that the checkpoint stores as another one."""
    if checkpoint.is_bin or checkpoint.partial or not ties:
        return
    stored = {without(name, stripped): info for name, info in checkpoint.tensors.items()}
    for tied, to in ties.items():
        one, other = stored.get(tied), stored.get(to)
        if one is None or other is None or one.size != other.size:
            continue
        # Rows of tokens that no training saw can be alike, so several places are looked at.
        part = min(_SAMPLE, one.size)
        starts = {(one.size - part) * place // 3 for place in range(4)}
        if any(_part(one, at, part) != _part(other, at, part) for at in starts):
            yield (
                f"config.json says `tie_word_embeddings: true`, and the stored `{tied}` is not `{to}`: stock "
                "transformers uses it, other stacks use the embedding; with `tie_word_embeddings: false` all use what "
                "is stored"
            )


def _part(info: TensorInfo, start: int, size: int) -> bytearray:
    return read_range(info.file, info.start + start, size)


def _doubled(name: str) -> bool:
    first, _, rest = name.partition(".")
    return rest.startswith(f"{first}.")


def _becomes(stored: Collection[str], way: Sequence[str], expected: Collection[str]) -> bool:
    names = renamed(stored, way)
    return names is not None and set(names.values()) <= set(expected)


def _best_way(
    load: Callable[[Stored], Loading | None], expected: Collection[str], stored: Stored, plain: Loading, where: str
) -> tuple[tuple[str, ...], Loading]:
    """What is left out of the names, and what the stock loader then says: nothing, unless that mends something."""
    tried: dict[tuple[str, ...], Loading] = {(): plain}
    for way in candidates(stored, expected):
        names = renamed(stored, way)
        found = None if names is None else load({names[name]: stored[name] for name in names})
        if found is not None:
            tried[way] = found
    whole = [way for way, found in tried.items() if found.complete]
    if len(whole) > 1:
        raise InputError(
            "the checkpoint holds several models, each under names of its own",
            where=where,
            found="names that begin with " + ", ".join(f"`{''.join(way)}`" for way in whole),
            remedy="keep one of them, without what its names begin with",
            code="incomplete",
        )
    best = min(tried, key=lambda way: (len(tried[way].missing), len(tried[way].mismatched), len(way)))
    return best, tried[best]


def _packed(stored: Stored, found: Loading) -> list[str]:
    """Weights that are whole numbers, or of eight bits with scales that the class does not read."""
    scaled = any(_SCALES.search(name) for name in found.unread)
    weights = ((name, dtype) for name, (dtype, _shape) in stored.items() if dtype and name.endswith("weight"))
    return [name for name, dtype in weights if not dtype.is_floating_point or (scaled and dtype.itemsize == 1)]


def _notes(found: Loading, stripped: Sequence[str]) -> list[str]:
    notes = []
    if stripped:
        shown = ", ".join(f"`{text}`" for text in stripped)
        notes.append(
            f"the base's tensor names contain {shown}, with which not all stock software knows them; they are read, "
            "and the copy's are written, without"
        )
    if found.buffers:
        notes.append(f"the base does not store {listed(found.buffers)}: stock loaders take the class's own constants")
    if unread := [name for name in found.unread if not _MASKS.search(name)]:
        notes.append(f"stock loaders do not read what the base stores as {listed(unread)}")
    return notes
