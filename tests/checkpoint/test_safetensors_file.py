"""The header reader against safetensors' own: what it accepts the stock reader accepts, and reads the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file
from support.checkpoints import same_bits

from patcher.checkpoint.safetensors_file import DTYPES, MAX_HEADER, TensorInfo, read_header, read_tensor, tensor_bytes
from patcher.errors import InputError

SHAPES = [(), (0,), (1,), (7,), (3, 0, 2), (2, 3), (4, 1, 5)]
quick = settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    count = 1
    for size in shape:
        count *= size
    generator = torch.Generator().manual_seed(count + len(shape))
    width = torch.empty(0, dtype=dtype).element_size()
    top = 2 if dtype == torch.bool else 256
    raw = torch.randint(0, top, (count * width,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).reshape(shape)


def stock(path: Path) -> dict[str, tuple[str, list[int], torch.Tensor]] | None:
    """What safetensors reads, or None where it refuses."""
    try:
        with safe_open(path, "pt") as file:
            found = {}
            for name in file.keys():  # noqa: SIM118 - not a mapping
                piece = file.get_slice(name)
                found[name] = (piece.get_dtype(), piece.get_shape(), file.get_tensor(name))
            return found
    except SafetensorError:
        return None


def ours(path: Path) -> dict[str, TensorInfo] | None:
    """What we read; None for an InputError; anything else is a failure of the test."""
    try:
        return read_header(path)
    except InputError as error:
        problem = error.problems[0]
        assert problem.where and problem.remedy
        return None


def assert_sound(path: Path) -> bool:
    """Accepted by us: accepted by safetensors, and the same."""
    read = ours(path)
    if read is None or any(info.dtype not in DTYPES for info in read.values()):
        return False
    expected = stock(path)
    assert expected is not None, "accepted what the stock reader refuses"
    assert set(read) == set(expected)
    for name, (dtype, shape, tensor) in expected.items():
        assert (read[name].dtype, list(read[name].shape)) == (dtype, shape)
        assert same_bits(read_tensor(read[name]), tensor)
    return True


def write(path: Path, header: object, data: bytes = b"", *, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: Any, shape: Any, start: Any, end: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize("name", sorted(DTYPES))
def test_every_dtype_is_read_as_safetensors_reads_it(name: str, tmp_path: Path) -> None:
    tensors = {f"shape {shape}": random_tensor(DTYPES[name], shape) for shape in SHAPES}
    save_file(tensors, tmp_path / "x.safetensors", {"format": "pt"})
    assert assert_sound(tmp_path / "x.safetensors")
    info = read_header(tmp_path / "x.safetensors")
    for key, tensor in tensors.items():
        assert info[key].dtype == name
        with (tmp_path / "x.safetensors").open("rb") as file:
            file.seek(info[key].start)
            assert file.read(info[key].end - info[key].start) == tensor_bytes(tensor)


def test_a_dtype_that_torch_lacks_travels_but_is_not_read(tmp_path: Path) -> None:
    info = read_header(write(tmp_path / "x.safetensors", {"a": entry("F6_E2M3", [4], 0, 3)}, b"123"))
    assert (info["a"].shape, info["a"].end - info["a"].start) == ((4,), 3)
    with pytest.raises(InputError, match="dtype"):
        read_tensor(info["a"])


def test_a_file_that_became_shorter_is_an_input_error(tmp_path: Path) -> None:
    save_file({"a": torch.ones(64)}, tmp_path / "x.safetensors")
    info = read_header(tmp_path / "x.safetensors")["a"]
    os.truncate(tmp_path / "x.safetensors", info.end - 1)
    with pytest.raises(InputError, match="truncated"):
        read_tensor(info)


GOOD = entry("F32", [1], 0, 4)
REFUSED = {
    "empty file": b"",
    "seven bytes": b"1234567",
    "no header": (0).to_bytes(8, "little"),
    "header length beyond the file": (50).to_bytes(8, "little") + b"{}",
    "header length of 2**64 - 1": b"\xff" * 8 + b"{}",
    "header longer than the limit": (MAX_HEADER + 1).to_bytes(8, "little") + b"{}",
    "a pickle": b"\x80\x02}q\x00." * 4,
    "text": b"version https://git-lfs.github.com/spec/v1\noid sha256:0000\nsize 12\n",
}


@pytest.mark.parametrize("content", REFUSED.values(), ids=REFUSED.keys())
def test_what_is_no_safetensors_file_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    assert ours(tmp_path / "x.safetensors") is None
    assert stock(tmp_path / "x.safetensors") is None


LIES: dict[str, tuple[Any, bytes]] = {
    "not JSON": (b"{]", b""),
    "not UTF-8": (b'{"\xff\xfe": {}}', b""),
    "half a surrogate pair": (b'{"\\ud800": {"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b"1234"),
    "NaN": (b'{"a": {"dtype":"F32","shape":[1],"data_offsets":[0,4],"x":NaN}}', b"1234"),
    "a list": ([GOOD], b"1234"),
    "a list of lists": ([[1], [2]], b"1234"),
    "a number": (b"7", b""),
    "null": (b"null", b""),
    "deeply nested": (b'{"a":' * 100_000, b""),
    "entry is text": ({"a": "dtype shape data_offsets"}, b""),
    "no dtype": ({"a": {"shape": [1], "data_offsets": [0, 4]}}, b"1234"),
    "dtype is a number": ({"a": entry(32, [1], 0, 4)}, b"1234"),
    "shape is text": ({"a": entry("F32", "1", 0, 4)}, b"1234"),
    "shape is a mapping": ({"a": entry("F32", {}, 0, 4)}, b"1234"),
    "shape holds true": ({"a": entry("F32", [True], 0, 4)}, b"1234"),
    "shape holds a float": ({"a": entry("F32", [1.0], 0, 4)}, b"1234"),
    "shape is negative": ({"a": entry("F32", [-1, -1], 0, 4)}, b"1234"),
    "shape overflows": ({"a": entry("F32", [2**63, 2, 0], 0, 0)}, b""),
    "shape is beyond 64 bits": ({"a": entry("F32", [2**64], 0, 4)}, b"1234"),
    "shape does not fit": ({"a": entry("F32", [2], 0, 4)}, b"1234"),
    "one offset": ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}, b"1234"),
    "three offsets": ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}, b"1234"),
    "offsets the wrong way": ({"a": entry("F32", [1], 4, 0)}, b"1234"),
    "offset beyond the file": ({"a": entry("F32", [1], 1000, 1004)}, b"1234"),
    "negative offset": ({"a": entry("F32", [1], -4, 0)}, b"1234"),
    "overlap": ({"a": GOOD, "b": GOOD}, b"1234"),
    "hole": ({"a": entry("F32", [1], 4, 8)}, b"12345678"),
    "bytes after the last tensor": ({"a": GOOD}, b"12345"),
    "bytes without a tensor": ({}, b"1"),
    "metadata is a list": ({"__metadata__": [], "a": GOOD}, b"1234"),
    "metadata holds a number": ({"__metadata__": {"format": 1}, "a": GOOD}, b"1234"),
}


@pytest.mark.parametrize(("header", "data"), LIES.values(), ids=LIES.keys())
def test_a_header_that_lies_is_refused(header: object, data: bytes, tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", header, data)
    assert stock(path) is None, "the example is wrong: the stock reader takes it"
    assert ours(path) is None


def test_a_rank_that_no_tensor_has_is_refused(tmp_path: Path) -> None:
    assert ours(write(tmp_path / "x.safetensors", {"a": entry("U8", [2**40] * 50_000, 0, 4)}, b"1234")) is None


@pytest.mark.parametrize("make", ["missing", "folder", "dangling", "loop", "fifo"])
def test_what_is_no_file_is_refused_without_waiting(make: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    if make == "folder":
        path.mkdir()
    elif make == "dangling":
        path.symlink_to(tmp_path / "nowhere")
    elif make == "loop":
        path.symlink_to(path)
    elif make == "fifo":
        os.mkfifo(path)
    with pytest.raises(InputError, match="missing"):
        read_header(path)


WHOLE = save(
    {"b": torch.arange(6, dtype=torch.float32).reshape(2, 3), "a.weight": torch.ones(4, dtype=torch.bfloat16),
     "empty": torch.zeros(0, 3), "flag": torch.tensor(True)},
    {"format": "pt"},
)  # fmt: skip


@quick
@given(st.data())
def test_random_damage_is_refused_or_harmless(tmp_path: Path, data: st.DataObject) -> None:
    damaged = bytearray(WHOLE)
    for _ in range(data.draw(st.integers(1, 4))):
        kind = data.draw(st.sampled_from(["flip", "cut", "insert", "drop", "digit"]))
        at = data.draw(st.integers(0, max(0, len(damaged) - 1)))
        if kind == "flip" and damaged:
            damaged[at] = data.draw(st.integers(0, 255))
        elif kind == "cut":
            del damaged[at:]
        elif kind == "insert":
            damaged[at:at] = data.draw(st.binary(min_size=1, max_size=9))
        elif kind == "drop":
            del damaged[at : at + data.draw(st.integers(1, 9))]
        else:
            digits = [place for place, byte in enumerate(damaged) if chr(byte).isdigit()]
            if digits:
                damaged[data.draw(st.sampled_from(digits))] = data.draw(st.sampled_from(b"0123456789-.e"))
    (tmp_path / "x.safetensors").write_bytes(bytes(damaged))
    assert_sound(tmp_path / "x.safetensors")


numbers = st.integers(-2, 12) | st.sampled_from([2**31, 2**32, 2**63 - 1, 2**63, 2**64, 2**70, 1.0, True, None, "1"])
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*DTYPES, "F4", "nonsense", "", None, 5]),
        "shape": st.lists(numbers, max_size=3) | numbers,
        "data_offsets": st.lists(numbers, min_size=1, max_size=3) | numbers,
    },
    optional={"more": st.none()},
)


@quick
@given(header=st.dictionaries(st.text(max_size=4) | st.just("__metadata__"), entries | numbers, max_size=3),
       data=st.binary(max_size=24), length=st.none() | st.integers(0, 2**64 - 1))  # fmt: skip
def test_random_headers_are_refused_or_read_alike(
    tmp_path: Path, header: dict[str, Any], data: bytes, length: int | None
) -> None:
    assert_sound(write(tmp_path / "x.safetensors", json.dumps(header).encode(), data, length=length))


@quick
@given(st.lists(st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 3), max_size=3)), max_size=4))
def test_every_whole_file_is_read(tmp_path: Path, plan: list[tuple[str, list[int]]]) -> None:
    tensors = {str(number): random_tensor(DTYPES[dtype], tuple(shape)) for number, (dtype, shape) in enumerate(plan)}
    save_file(tensors, tmp_path / "x.safetensors")
    assert assert_sound(tmp_path / "x.safetensors")


@pytest.mark.slow
def test_lengths_that_lie_cost_no_memory(tmp_path: Path) -> None:
    (tmp_path / "long.safetensors").write_bytes((MAX_HEADER - 1).to_bytes(8, "little") + b"{}")
    write(tmp_path / "wide.safetensors", {"a": entry("F32", [2**40], 0, 2**42)}, b"1234")
    script = """
import resource, sys
from pathlib import Path
from patcher.checkpoint.safetensors_file import read_header
from patcher.errors import InputError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name in sys.argv[1:]:
    try:
        read_header(Path(name))
    except InputError:
        print("refused")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    files = [str(tmp_path / "long.safetensors"), str(tmp_path / "wide.safetensors")]
    done = subprocess.run([sys.executable, "-c", script, *files], capture_output=True, text=True, check=True)
    *refused, grown = done.stdout.split()
    assert refused == ["refused", "refused"]
    assert int(grown) < 20_000, "KiB"
