"""A tensor that is made of the slices of another one, in memory and on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from patcher.checkpoint import pieces
from patcher.checkpoint.safetensors_file import read_header
from patcher.checkpoint.slices import SliceOrder
from patcher.checkpoint.writer import copy_tensors
from patcher.errors import OutsideError

ORDER = (0, 1, None, 2)


def copied(tmp_path: Path, tensor: torch.Tensor, order: SliceOrder) -> torch.Tensor:
    """The tensor after it was copied slice by slice beside another one."""
    source, target = tmp_path / "source.safetensors", tmp_path / "target.safetensors"
    save_file({"a": tensor, "b": torch.arange(5)}, source)
    target.unlink(missing_ok=True)
    copy_tensors(source, target, {"a": "c", "b": "b"}, {"a": order})
    assert torch.equal(load_file(target)["b"], torch.arange(5))
    return load_file(target)["c"]


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("at_once", [1 << 23, 100, 3])
def test_slices_are_copied_and_zeros_stand_among_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, axis: int, dtype: torch.dtype, at_once: int
) -> None:
    monkeypatch.setattr(pieces, "_AT_ONCE", at_once)
    tensor = torch.randn(6, 9, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    order = SliceOrder(axis, 3, ORDER)
    first, second, third = tensor.chunk(3, axis)
    wanted = torch.cat([first, second, torch.zeros_like(first), third], axis)
    assert torch.equal(order.of(tensor), wanted)
    found = copied(tmp_path, tensor, order)
    assert torch.equal(found, wanted) and found.dtype == dtype
    assert torch.equal(copied(tmp_path, found, order.back), tensor)


def test_the_order_is_kept_as_json() -> None:
    order = SliceOrder(1, 3, ORDER)
    assert order.as_json() == {"axis": 1, "stored": 3, "order": [0, 1, None, 2]}
    assert SliceOrder.from_json(order.as_json()) == order


def test_what_cannot_be_cut_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not 3 slices along axis 1"):
        SliceOrder(1, 3, ORDER).shape((6, 8))


def test_a_file_that_became_shorter_is_found_out(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.randn(4, 6)}, path)
    made = SliceOrder(1, 3, ORDER).on_disk(read_header(path)["a"], "a")
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(OutsideError):
        pieces.read_pieces([made.content])
