"""The GGUF reader: what it reads, and that no header that lies gets through, costs memory, or hangs."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.gguf_files import read_values
from support.gguf_models import write_model

from patcher.checkpoint.gguf.file import read_floats, read_gguf
from patcher.checkpoint.gguf.format import TENSOR_TYPES, GgufFile
from patcher.errors import InputError

F32, U32, TEXT, ARRAY = 0, 4, 8, 9


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def entry(key: str | bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def info(name: str | bytes, shape: list[int], kind: int = F32, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


ARCHITECTURE = entry("general.architecture", TEXT, text("llama"))
TENSOR = info("a", [8])


def header(
    entries: list[bytes] | None = None,
    tensors: list[bytes] | None = None,
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    tensor_count: int | None = None,
    entry_count: int | None = None,
    data: int = 32,
    alignment: int = 32,
) -> bytes:
    """A file of these entries and tensor infos, and ``data`` bytes."""
    entries = [ARCHITECTURE] if entries is None else entries
    tensors = [TENSOR] if tensors is None else tensors
    counts = (
        len(tensors) if tensor_count is None else tensor_count,
        len(entries) if entry_count is None else entry_count,
    )
    raw = magic + struct.pack("<IQQ", version, *counts) + b"".join(entries) + b"".join(tensors)
    return raw + bytes(-len(raw) % alignment) + bytes(data)


def parsed(tmp_path: Path, raw: bytes) -> GgufFile:
    path = tmp_path / "model.gguf"
    path.write_bytes(raw)
    return read_gguf(path)


@pytest.mark.parametrize("quantisation", ["F32", "BF16", "Q8_0", "Q4_K_M"])
def test_it_reads_what_another_library_wrote(tmp_path: Path, quantisation: str) -> None:
    path = tmp_path / "model.gguf"
    write_model(path, "llama", quantisation)
    file, theirs = read_gguf(path), gguf.GGUFReader(path)
    assert file.version == 3
    assert file.data_start == theirs.data_offset
    assert list(file.entries) == [key for key in theirs.fields if not key.startswith("GGUF.")]
    assert file.scalar("llama.block_count") == 3
    assert file.scalar("llama.rope.freq_base") == 10000.0
    assert read_values(file, "tokenizer.ggml.token_type") == [1] * 288
    for found, expected in zip(file.tensors.values(), theirs.tensors, strict=True):
        assert (found.name, found.start, found.size) == (expected.name, expected.data_offset, expected.n_bytes)
        assert list(found.shape) == [int(number) for number in expected.shape]
        assert found.type == int(expected.tensor_type)
    norm = read_floats(file.tensors["output_norm.weight"])
    assert (norm.numpy() == next(t.data for t in theirs.tensors if t.name == "output_norm.weight")).all()


def test_the_sizes_of_all_types_are_those_of_the_other_library() -> None:
    for kind, (elements, size) in gguf.GGML_QUANT_SIZES.items():
        assert TENSOR_TYPES[int(kind)] == (kind.name, elements, size)


def test_version_2_and_another_alignment_are_read(tmp_path: Path) -> None:
    entries = [ARCHITECTURE, entry("general.alignment", U32, struct.pack("<I", 256))]
    tensors = [info("a", [8]), info("b", [8], offset=256)]
    file = parsed(tmp_path, header(entries, tensors, version=2, data=256 + 32, alignment=256))
    assert file.alignment == 256
    assert [tensor.start for tensor in file.tensors.values()] == [file.data_start, file.data_start + 256]


def test_a_file_of_metadata_only_is_read(tmp_path: Path) -> None:
    raw = header(tensors=[], data=0, alignment=1)
    assert not parsed(tmp_path, raw).tensors


LIES: dict[str, tuple[dict[str, Any], str]] = {
    "no magic": ({"magic": b"ggjt"}, "not a GGUF file"),
    "version 1": ({"version": 1}, "version"),
    "version 0": ({"version": 0}, "version"),
    "version 4": ({"version": 4}, "version"),
    "big endian": ({"version": 3 << 24}, "big endian"),
    "more tensors": ({"tensor_count": 2}, "has no name"),
    "huge number of tensors": ({"tensor_count": 2**63}, "counts more tensors"),
    "tensors beyond the file": ({"tensor_count": 200_000}, "counts more tensors"),
    "huge number of entries": ({"entry_count": 2**64 - 1}, "counts more metadata"),
    "fewer tensors": ({"tensor_count": 0}, "longer than its tensors"),
    "truncated data": ({"data": 31}, "truncated"),
    "more data": ({"data": 64}, "longer than its tensors"),
    "no data": ({"data": 0}, "truncated"),
    "same key twice": ({"entries": [ARCHITECTURE] * 2}, "key is there twice"),
    "same tensor twice": ({"tensors": [TENSOR, info("a", [8], offset=32)], "data": 64}, "tensor is there twice"),
    "empty key": ({"entries": [entry("", U32, bytes(4))]}, "key is empty"),
    "key not UTF-8": ({"entries": [entry(b"\xff\xfe", U32, bytes(4))]}, "not UTF-8"),
    "text not UTF-8": ({"entries": [entry("a", TEXT, text(b"\xc3\x28"))]}, "not UTF-8"),
    "name not UTF-8": ({"tensors": [info(b"\xff", [8])]}, "not UTF-8"),
    "long key": ({"entries": [entry("k" * 70_000, U32, bytes(4))]}, "too long"),
    "name of 64 bytes": ({"tensors": [info("n" * 64, [8])]}, "too long"),
    "text longer than the file": ({"entries": [entry("a", TEXT, struct.pack("<Q", 2**62))]}, "truncated"),
    "unknown value": ({"entries": [entry("a", 13, bytes(8))]}, "unknown type"),
    "array in an array": ({"entries": [entry("a", ARRAY, struct.pack("<IQ", ARRAY, 1))]}, "unknown type"),
    "array longer than the file": ({"entries": [entry("a", ARRAY, struct.pack("<IQ", U32, 2**61))]}, "truncated"),
    "texts longer than the file": ({"entries": [entry("a", ARRAY, struct.pack("<IQ", TEXT, 2**40))]}, "longer than"),
    "a text in an array too long": (
        {"entries": [entry("a", ARRAY, struct.pack("<IQQ", TEXT, 1, 2**63))]},
        "truncated",
    ),
    "truth value of 2": ({"entries": [entry("a", 7, b"\x02")]}, "neither 0 nor 1"),
    "alignment 0": ({"entries": [entry("general.alignment", U32, struct.pack("<I", 0))]}, "power of two"),
    "alignment 48": ({"entries": [entry("general.alignment", U32, struct.pack("<I", 48))]}, "power of two"),
    "huge alignment": ({"entries": [entry("general.alignment", U32, struct.pack("<I", 2**31))]}, "power of two"),
    "alignment as text": ({"entries": [entry("general.alignment", TEXT, text("32"))]}, "power of two"),
    "five dimensions": ({"tensors": [info("a", [8, 1, 1, 1, 1])]}, "dimensions"),
    "huge rank": ({"tensors": [text("a") + struct.pack("<I", 2**32 - 1) + bytes(64)]}, "dimensions"),
    "huge shape": ({"tensors": [info("a", [2**40, 2**40])]}, "too large"),
    "negative shape": ({"tensors": [info("a", [2**64 - 1])]}, "too large"),
    "unknown tensor type": ({"tensors": [info("a", [8], kind=200)]}, "type that is not known"),
    "removed tensor type": ({"tensors": [info("a", [32], kind=4)]}, "type that is not known"),
    "row of half a block": ({"tensors": [info("a", [16], kind=8)]}, "do not fill blocks"),
    "offset beyond the file": ({"tensors": [info("a", [8], offset=2**40)]}, "leaves a hole"),
    "offset not aligned": ({"tensors": [info("a", [8]), info("b", [8], offset=40)], "data": 96}, "not aligned"),
    "hole": ({"tensors": [info("a", [8]), info("b", [8], offset=64)], "data": 96}, "leaves a hole"),
    "overlap": ({"tensors": [info("a", [8]), info("b", [8], offset=0)], "data": 32}, "overlaps"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_refused(tmp_path: Path, lie: str) -> None:
    words, message = LIES[lie]
    with pytest.raises(InputError, match=message) as raised:
        parsed(tmp_path, header(**words))
    assert str(tmp_path) in str(raised.value)
    assert raised.value.problems[0].remedy


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere.gguf"):
        with pytest.raises(InputError, match="no such GGUF file"):
            read_gguf(path)
    (tmp_path / "empty.gguf").touch()
    with pytest.raises(InputError, match="not a GGUF file"):
        read_gguf(tmp_path / "empty.gguf")


def test_a_lie_over_a_large_file_costs_no_memory(tmp_path: Path) -> None:
    """A sparse file is as long as the header says, and holds zeros."""
    import tracemalloc

    for entries in (
        [entry("a", ARRAY, struct.pack("<IQ", TEXT, 2**32))],
        [entry("a", TEXT, struct.pack("<Q", 2**33))],
        [entry("a", ARRAY, struct.pack("<IQ", U32, 2**31))],
    ):
        path = tmp_path / "sparse.gguf"
        path.write_bytes(header(entries, []))
        with path.open("r+b") as file:
            file.truncate(2**36)
        tracemalloc.start()
        with pytest.raises(InputError):
            read_gguf(path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2**21


RICH = header(
    [
        ARCHITECTURE,
        entry("general.alignment", U32, struct.pack("<I", 32)),
        entry("tokens", ARRAY, struct.pack("<IQ", TEXT, 3) + text("a") + text("bc") + text("")),
        entry("scores", ARRAY, struct.pack("<IQ3f", 6, 3, 1, 2, 3)),
        entry("yes", 7, b"\x01"),
        entry("large", 10, struct.pack("<Q", 2**40)),
    ],
    [info("a", [8, 2]), info("b", [64], kind=8, offset=64), info("c", [4], offset=160)],
    data=160 + 16,
)


def test_the_file_that_is_fuzzed_is_sound(tmp_path: Path) -> None:
    assert list(parsed(tmp_path, RICH).tensors) == ["a", "b", "c"]


@settings(max_examples=400, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=st.lists(st.tuples(st.integers(0, len(RICH) - 1), st.integers(0, 255)), max_size=6),
    numbers=st.lists(
        st.tuples(st.integers(0, len(RICH) - 8), st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1])),
        max_size=2,
    ),
    cut=st.none() | st.integers(0, len(RICH)),
    more=st.binary(max_size=40),
)
def test_a_damaged_file_is_read_or_refused(
    tmp_path: Path, changes: list[tuple[int, int]], numbers: list[tuple[int, int]], cut: int | None, more: bytes
) -> None:
    raw = bytearray(RICH)
    for place, value in changes:
        raw[place] = value
    for place, number in numbers:
        raw[place : place + 8] = struct.pack("<Q", number)
    raw = raw[:cut] + more
    try:
        file = parsed(tmp_path, bytes(raw))
    except InputError:
        return
    for tensor in file.tensors.values():
        assert file.data_start <= tensor.start <= tensor.start + tensor.size <= len(raw)
        assert (tensor.start - file.data_start) % file.alignment == 0


@settings(max_examples=150, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(raw=st.binary(max_size=300))
def test_noise_is_refused(tmp_path: Path, raw: bytes) -> None:
    with pytest.raises(InputError):
        parsed(tmp_path, b"GGUF\x03\x00\x00\x00" + b"\x01" + bytes(7) + raw + b"\x01")
