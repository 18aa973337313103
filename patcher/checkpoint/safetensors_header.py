"""The header of a safetensors file: names, dtypes, shapes and byte ranges. Neither a tensor nor torch is loaded."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from patcher.disk.lfs import refuse_pointer
from patcher.errors import InputError

BYTES: Mapping[str, int] = {
    **dict.fromkeys(("F64", "C64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 1),
}
"""How many an element of each dtype takes."""
FLOATS = ("F64", "F32", "F16", "BF16")
MAX_HEADER = 100_000_000
PREFIX = 8
"""Bytes before the header, which say how long it is."""
METADATA = "__metadata__"
_MAX_RANK = 64
_MAX_NUMBER = 2**63


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: ``start`` and ``end`` are absolute byte offsets in ``file``."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def size(self) -> int:
        return self.end - self.start


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file, held to the rules by which the stock reader would refuse it.

    A dtype that is not in :data:`BYTES` is let through: its bytes can be copied all the same.

    Raises:
        InputError: the file is missing or truncated, or its header lies about lengths, offsets or shapes.
    """
    if not path.is_file():
        raise InputError("a weight file is missing", where=str(path), remedy="download the checkpoint again")
    try:
        with path.open("rb") as file:
            return _parse(path, file)
    except OSError as error:
        raise InputError(
            "a weight file cannot be read", where=str(path), found=error.strerror, remedy="check its permissions"
        ) from None


def raw_header(path: Path) -> bytes:
    """A safetensors file's header, length prefix included, byte for byte."""
    with path.open("rb") as file:
        prefix = file.read(PREFIX)
        return prefix + file.read(int.from_bytes(prefix, "little"))


def metadata_of(header: bytes) -> dict[str, str] | None:
    """The metadata of a raw header."""
    found: dict[str, str] | None = json.loads(header[PREFIX:]).get(METADATA)
    return found


def in_file_order(tensors: Iterable[TensorInfo]) -> list[TensorInfo]:
    """Tensors of one file as they lie in it."""
    return sorted(tensors, key=lambda info: (info.start, info.end))


def _parse(path: Path, file: BinaryIO) -> dict[str, TensorInfo]:
    size = os.fstat(file.fileno()).st_size
    prefix = file.read(PREFIX)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < PREFIX or length > min(MAX_HEADER, size - PREFIX):
        refuse_pointer(path)
        raise broken_file(path, "the file is truncated, or is not a safetensors file")
    try:
        text = file.read(length).decode("utf-8")
        header = json.loads(text, parse_constant=_refused, parse_int=_natural, object_pairs_hook=_without_duplicates)
        if "\\u" in text:
            # It can spell half a surrogate pair, which no stock reader takes.
            json.dumps(header, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        raise broken_file(path, "its header is not JSON") from None
    if not isinstance(header, dict):
        raise broken_file(path, "its header is not a mapping")
    metadata = header.pop(METADATA, None)
    if metadata is not None and not _texts(metadata):
        raise broken_file(path, "the metadata in its header is not a mapping of texts")
    data = PREFIX + length
    tensors = {name: _entry(path, name, entry, data, size) for name, entry in header.items()}
    end = data
    for info in in_file_order(tensors.values()):
        if info.start != end:
            raise broken_file(path, f"the byte range of {info.name!r} leaves a hole or overlaps another")
        end = info.end
    if end != size:
        raise broken_file(path, "the file is longer than its tensors")
    return tensors


def _entry(path: Path, name: str, entry: Any, data: int, size: int) -> TensorInfo:
    try:
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (TypeError, KeyError):
        raise broken_file(path, f"the header entry of {name!r} is incomplete") from None
    if len(entry) != 3:
        raise broken_file(path, f"the header entry of {name!r} holds more than a dtype, a shape and a byte range")
    if not (isinstance(dtype, str) and _numbers(shape) and _numbers(offsets) and len(offsets) == 2):
        raise broken_file(path, f"the header entry of {name!r} is not a dtype, a shape and a byte range")
    start, end = offsets
    if end < start or data + end > size:
        raise broken_file(path, f"the byte range of {name!r} is outside of the file")
    if math.prod(number for number in shape if number) >= _MAX_NUMBER:
        raise broken_file(path, f"the shape of {name!r} is too large")
    if dtype in BYTES and math.prod(shape) * BYTES[dtype] != end - start:
        raise broken_file(path, f"the shape of {name!r} does not fit its byte range")
    return TensorInfo(name, path, dtype, tuple(shape), data + start, data + end)


def _numbers(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= _MAX_RANK
        and all(type(number) is int and 0 <= number < _MAX_NUMBER for number in value)
    )


def _texts(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


def _refused(name: str) -> NoReturn:
    raise ValueError(name)


def _natural(text: str) -> int:
    """Also `-0`, which Python takes for 0, is refused by the stock reader."""
    return _refused(text) if text.startswith("-") else int(text)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Of two entries with one name some readers take the first, some the last, and some refuse the file."""
    found = dict(pairs)
    return found if len(found) == len(pairs) else _refused("a key is given twice")


def broken_file(path: Path, what: str) -> InputError:
    """The refusal of a file that is no whole checkpoint's."""
    return InputError(what, where=str(path), remedy="download the checkpoint again", code="checkpoint")
