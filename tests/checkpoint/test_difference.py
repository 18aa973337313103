"""What differs: every tensor and key that does, no other, by how much, and in little memory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.write_checkpoint import MIB, make_checkpoint
from safetensors.torch import load_file, save_file
from support.checkpoints import stored

from patcher.checkpoint import difference
from patcher.checkpoint.difference import Difference, compare, compare_files
from patcher.checkpoint.folder import CheckpointFolder
from patcher.checkpoint.writer import write_copy

Checkpoint = Callable[..., Path]


def folder(path: Path, tensors: dict[str, torch.Tensor], **config: Any) -> CheckpointFolder:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return CheckpointFolder(path)


def of(tmp_path: Path, before: dict[str, torch.Tensor], after: dict[str, torch.Tensor], **keys: Any) -> Difference:
    return compare(folder(tmp_path / "before", before), folder(tmp_path / "after", after), **keys)


def test_the_same_bytes_in_other_files_are_no_difference(checkpoint: Checkpoint, tmp_path: Path) -> None:
    base = CheckpointFolder(checkpoint("llama", sharded=True))
    single = folder(tmp_path / "single", stored(base.path), **base.config)
    found = compare(base, single)
    assert found.nothing
    assert found.same == len(base.tensors)
    assert found.bytes_compared == 2 * sum(info.end - info.start for info in base.tensors.values())


def test_one_file_under_two_names_is_not_read(checkpoint: Checkpoint, tmp_path: Path) -> None:
    base = CheckpointFolder(checkpoint("llama", sharded=True))
    (tmp_path / "copy").mkdir()
    write_copy(base, tmp_path / "copy", created={"extra": torch.ones(3)}, replaced={}, config_changes={}, link=True)
    found = compare(base, CheckpointFolder(tmp_path / "copy"))
    assert found.bytes_compared == 0
    assert found.same == len(base.tensors)
    assert [change.name for change in found.added] == ["extra"]


def test_added_removed_changed(tmp_path: Path) -> None:
    wide = torch.zeros(10, dtype=torch.bfloat16)
    found = of(
        tmp_path,
        {"same": torch.ones(2), "gone": torch.ones(3), "changed": torch.tensor([1.0, 2.0, 3.0]), "wide": wide,
         "shape": torch.ones(2, 3), "type": torch.ones(2)},
        {"same": torch.ones(2), "new": torch.ones(1, 4).half(), "changed": torch.tensor([1.0, 2.25, -3.0]),
         "wide": torch.full((10,), 0.5), "shape": torch.ones(3, 2), "type": torch.ones(2).half()},
    )  # fmt: skip
    assert [(change.name, change.dtype, change.shape) for change in found.added] == [
        ("new", (None, "F16"), (None, [1, 4]))
    ]
    assert [(change.name, change.dtype, change.shape) for change in found.removed] == [
        ("gone", ("F32", None), ([3], None))
    ]
    changed = {change.name: change for change in found.changed}
    assert changed.keys() == {"changed", "wide", "shape", "type"}
    assert (changed["changed"].elements, changed["changed"].max_abs_difference) == (2, 6.0)
    assert (changed["wide"].elements, changed["wide"].max_abs_difference) == (10, 0.5)
    assert changed["wide"].dtype == ("BF16", "F32")
    assert (changed["shape"].elements, changed["shape"].max_abs_difference) == (None, None)
    assert (changed["type"].elements, changed["type"].max_abs_difference) == (0, 0.0)
    assert found.same == 1
    assert json.loads(json.dumps(found.as_json()))["tensors"]["changed"][0]["dtype"] == ["F32", "F32"]


SPECIAL: dict[str, tuple[list[float], list[float], int, float | None]] = {
    "zeros of two signs": ([0.0], [-0.0], 0, 0.0),
    "not a number, twice": ([float("nan"), 1.0], [float("nan"), 2.0], 1, 1.0),
    "not a number, once": ([float("nan"), 1.0], [0.0, 1.0], 1, None),
    "infinite": ([float("inf"), 1.0], [1.0, 1.0], 1, None),
}


@pytest.mark.parametrize("name", SPECIAL)
def test_numbers_that_are_none(tmp_path: Path, name: str) -> None:
    left, right, elements, largest = SPECIAL[name]
    found = of(tmp_path, {"x": torch.tensor(left)}, {"x": torch.tensor(right)})
    assert [(change.elements, change.max_abs_difference) for change in found.changed] == [(elements, largest)]
    json.loads(json.dumps(found.as_json(), allow_nan=False))


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool,
     torch.float8_e4m3fn, torch.complex64],
    ids=str,
)  # fmt: skip
def test_every_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    before = torch.tensor([0, 1, 1, 0]).to(dtype)
    after = torch.tensor([0, 1, 0, 0]).to(dtype)
    found = of(tmp_path, {"x": before, "y": before.clone()}, {"x": after, "y": before.clone()})
    assert [(change.elements, change.max_abs_difference) for change in found.changed] == [(1, 1.0)]
    assert found.same == 1


def test_a_dtype_that_torch_does_not_have(tmp_path: Path) -> None:
    for name, last in (("before", b"\x01"), ("after", b"\x02")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        entry = {"dtype": "F4", "shape": [4]}
        header = json.dumps({"x": {**entry, "data_offsets": [0, 2]}, "y": {**entry, "data_offsets": [2, 4]}}).encode()
        raw = len(header).to_bytes(8, "little") + header + b"\x00\x01\x00" + last
        (tmp_path / name / "model.safetensors").write_bytes(raw)
    found = compare(CheckpointFolder(tmp_path / "before"), CheckpointFolder(tmp_path / "after"))
    assert [(change.name, change.elements) for change in found.changed] == [("y", None)]
    assert found.same == 1


def test_pieces_join_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(difference, "PIECE", 64)
    before = torch.randn(1003)
    for place in (0, 15, 16, 17, 511, 1002):
        after = before.clone()
        after[place] += 3
        scratch = tmp_path / str(place)
        scratch.mkdir()
        found = of(scratch, {"x": before}, {"x": after})
        assert [change.elements for change in found.changed] == [1]
        assert found.changed[0].max_abs_difference == pytest.approx(3, abs=1e-6)


def test_other_names(tmp_path: Path) -> None:
    """A shift of blocks: by name nearly all would differ."""
    before = {f"layers.{number}.w": torch.full((2,), float(number)) for number in range(4)}
    renamed = {"layers.2.w": "layers.3.w", "layers.3.w": "layers.4.w"}
    after = {renamed.get(name, name): value for name, value in before.items()}
    after["layers.2.w"] = torch.zeros(2)
    after["layers.4.w"] = after["layers.4.w"] + 1
    found = of(tmp_path, before, after, renamed={**renamed, "no": "such", "layers.0.w": "nowhere"})
    assert found.renamed == {"layers.2.w": "layers.3.w"}
    assert [(change.was, change.name, change.max_abs_difference) for change in found.changed] == [
        ("layers.3.w", "layers.4.w", 1.0)
    ]
    assert [change.name for change in found.added] == ["layers.2.w"]
    assert found.removed == []
    assert found.same == 2


def test_pickles_are_compared_too(tmp_path: Path) -> None:
    values = {"x": torch.randn(1000), "y": torch.randn(3, 4).T}
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "config.json").write_text("{}")
    torch.save(values, tmp_path / "bin" / "pytorch_model.bin")
    after = folder(tmp_path / "after", {"x": values["x"] + 1, "y": values["y"].contiguous()})
    found = compare(CheckpointFolder(tmp_path / "bin"), after)
    assert [(change.name, change.elements) for change in found.changed] == [("x", 1000)]
    assert found.same == 1


def test_config_keys(tmp_path: Path) -> None:
    before = folder(tmp_path / "before", {}, a=1, rope={"theta": 1.0, "type": "x"}, gone=[1], flag=False, null=None)
    after = folder(tmp_path / "after", {}, a=1, rope={"theta": 2.0, "type": "x", "new": 3}, flag=0, null=None, b={})
    found = compare(before, after)
    assert found.config_added == {"rope.new": 3, "b": {}}
    assert found.config_removed == {"gone": [1]}
    assert found.config_changed == {"rope.theta": [1.0, 2.0], "flag": [False, 0]}
    assert not found.nothing


def test_two_files(tmp_path: Path) -> None:
    before, after = {"x": torch.ones(3), "y": torch.ones(2)}, {"x": torch.ones(3) * 1.5, "y": torch.ones(2)}
    for name, tensors in (("a", before), ("b", after), ("c", {"x": torch.ones(3)})):
        save_file(tensors, tmp_path / name)
    a, b, c = (tmp_path / name for name in "abc")
    assert compare_files(a, a).nothing
    assert compare_files(a, a).largest == 0.0
    assert compare_files(a, b).largest == 0.5
    assert not compare_files(a, b).nothing
    assert compare_files(a, c).largest is None
    assert [change.name for change in compare_files(a, c).removed] == ["y"]


SCRIPT = """
import sys
from pathlib import Path
import torch
from patcher.checkpoint.difference import compare
from patcher.checkpoint.folder import CheckpointFolder

def peak():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) // 1024

torch.ones(3).double()
imported = peak()
found = compare(CheckpointFolder(Path(sys.argv[1])), CheckpointFolder(Path(sys.argv[2])))
print(imported, peak(), len(found.changed), found.same)
"""


@pytest.fixture
def two(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    base = make_checkpoint(tmp_path / "base", 80 * MIB)
    other = Path(shutil.copytree(base, tmp_path / "other"))
    for file in other.glob("*.safetensors"):
        changed = {name: tensor + 1 for name, tensor in load_file(file).items()}
        save_file(changed, file, {"format": "pt"})
    yield base, other
    for file in (*base.glob("*.safetensors"), *other.glob("*.safetensors")):
        file.unlink()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
def test_comparing_needs_no_memory_for_the_weights(two: tuple[Path, Path]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *map(str, two)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    imported, peak, changed, same = map(int, done.stdout.split())
    assert changed > 10
    assert same == 0
    assert peak - imported < 60, f"{peak - imported} MiB for two checkpoints of 80 MiB"
