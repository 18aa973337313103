"""What streaming is made of: activations that come and go, calls that are replayed, tensors that stand for others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from patcher.capture.streaming.activation_store import ActivationStore
from patcher.capture.streaming.block_calls import BatchOnItsWay, Recording, Returned
from patcher.capture.streaming.disk_weights import DiskWeights
from patcher.capture.streaming.stand_ins import NotStreamable, OnDisk, Pending, PendingObject
from patcher.capture.streaming.stored_tensors import StoredTensors
from patcher.checkpoint.folder import CheckpointFolder
from patcher.checkpoint.safetensors_writer import write_tensors

CPU = torch.device("cpu")


def test_the_store_gives_back_shared_memory_and_reuses_its_file(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    given = {"whole": base, "turned": base.t(), "row": base[2], "half": base.bfloat16()[1:], "none": None}
    with ActivationStore(0, tmp_path) as store:
        held = store.put(given)
        assert store.held == 0 and store.spilled == 24 * 4 + 24 * 2
        back = store.get(held)
        for name, tensor in given.items():
            assert tensor is back[name] if tensor is None else torch.equal(back[name], tensor)
        back["whole"][2] += 1
        assert torch.equal(back["row"], base[2] + 1) and back["turned"].stride() == base.t().stride()
        store.put_back(held["row"], back["row"])
        assert torch.equal(store.get(held)["whole"], back["whole"])
        for name in ("whole", "turned", "row"):
            store.drop(held[name])
        store.put({"next": torch.zeros(24)})
        assert store.spilled == 24 * 4 + 24 * 2
    with ActivationStore(100, tmp_path) as store:
        held = store.put({"a": torch.ones(20), "b": torch.ones(20)})
        assert store.held == 80 and store.spilled == 80
        store.drop(held["a"])
        assert store.held == 0
    assert list(tmp_path.iterdir()) == []


def test_what_lies_on_an_accelerator_is_held_in_main_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ActivationStore, "_is_main_memory", staticmethod(lambda _device: False))
    base = torch.arange(24.0).reshape(4, 6)
    with ActivationStore(100, tmp_path) as store:
        held = store.put({"a": base.clone(), "b": torch.ones(1)})
        assert store.held == 100 and store.spilled == 0
        back = store.get(held)
        assert torch.equal(back["a"], base) and float(back["b"]) == 1
        store.put_back(held["a"], back["a"] * 2)
        assert torch.equal(store.get(held)["a"], 2 * base)
        store.drop(held["a"])
        assert store.held == 4
        store.drop(held["b"])
        assert store.held == 0


def test_buffers_of_the_model_are_not_copied(tmp_path: Path) -> None:
    buffer = torch.ones(50)
    with ActivationStore(0, tmp_path, {buffer.untyped_storage().data_ptr()}) as store:
        held = store.put({"part": buffer[3:9]})
        assert store.spilled == 0 and store.get(held)["part"].data_ptr() == buffer[3:].data_ptr()
        store.drop(held["part"])
        assert store.held == 0


def on_its_way(
    store: ActivationStore, calls: list[tuple[tuple[Any, ...], dict[str, Any]]], **kept: Any
) -> BatchOnItsWay:
    recording = Recording()
    for layer, (args, kwargs) in enumerate(calls):
        recording.add(layer, args, kwargs)
    return BatchOnItsWay(recording, store, **kept)


def through(way: BatchOnItsWay, blocks: list[Any], returns: Returned) -> list[torch.Tensor]:
    seen: list[torch.Tensor] = []

    def after(_layer: int, hidden: torch.Tensor) -> torch.Tensor:
        seen.append(hidden.clone())
        return hidden

    for number, block in enumerate(blocks):
        way.step(number, block, returns, after)
    return seen


@pytest.mark.parametrize("budget", [1 << 20, 0])
def test_a_block_that_changes_what_it_is_given_changes_it_for_the_next(tmp_path: Path, budget: int) -> None:
    hidden, mask = torch.zeros(1, 3, 4), torch.zeros(3, 4)
    form = Returned(None, ("tensor",))

    def block(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        mask += 1
        return hidden + mask

    with ActivationStore(budget, tmp_path) as store:
        calls = [((hidden,), {"mask": mask}), ((form.pending(0, hidden),), {"mask": mask})]
        seen = through(on_its_way(store, calls), [block, block], form)
    assert [float(tensor.mean()) for tensor in seen] == [1.0, 3.0]


@pytest.mark.parametrize("budget", [1 << 20, 0])
def test_other_outputs_are_handed_on_and_shared_objects_stay_the_same(tmp_path: Path, budget: int) -> None:
    hidden, notes = torch.zeros(1, 3, 4), {}
    form = Returned(tuple, ("tensor", "tensor", "none", "object"))

    def first(hidden: torch.Tensor, notes: dict[str, int]) -> tuple[Any, ...]:
        notes["said"] = 5
        return hidden + 1, torch.full((7,), 2.0), None, "state"

    def second(hidden: torch.Tensor, pair: tuple[Any, ...], state: str, notes: dict[str, int]) -> tuple[Any, ...]:
        assert state == "state"
        return hidden * 3 + pair[0].mean() + pair[1] + notes["said"], torch.zeros(1), None, ""

    after_first = form.pending(0, hidden)
    assert isinstance(after_first[0], Pending) and isinstance(after_first[1], PendingObject) and after_first[2] is None
    calls = [((hidden, notes), {}), ((after_first[0], (after_first[1], 4), after_first[3]), {"notes": notes})]
    with ActivationStore(budget, tmp_path) as store:
        way = on_its_way(store, calls, kept=[(1, 0)])
        seen = through(way, [first, second], form)
        assert torch.equal(way.take((1, 0)), seen[1])
        assert store.held == 0
    assert float(seen[1].mean()) == 3 + 2 + 4 + 5


def test_a_block_that_returns_something_else_is_refused(tmp_path: Path) -> None:
    hidden, form = torch.zeros(1, 3, 4), Returned(None, ("tensor",))
    with ActivationStore(0, tmp_path) as store, pytest.raises(NotStreamable, match="something else than block 0"):
        through(on_its_way(store, [((hidden,), {})]), [lambda hidden: (hidden, None)], form)
    for output in ({"hidden": hidden}, (None, hidden), ()):
        with pytest.raises(NotStreamable, match="return"):
            Returned.by(output)


def test_residual_streams_that_cannot_be_followed_are_refused() -> None:
    hidden = torch.zeros(1, 3, 4)
    pending = Pending.of(hidden, (0, 0))
    with pytest.raises(NotStreamable, match="collects"):
        Recording().add(1, (pending,), {"before": [hidden, pending]})
    with pytest.raises(NotStreamable, match="collects"):
        Recording().add(1, (pending,), {"before": {0: pending}})
    recording = Recording()
    recording.add(0, (hidden,), {})
    recording.check()
    hidden += 1
    with pytest.raises(NotStreamable, match="after they were called"):
        recording.check()


def test_what_is_pending_knows_its_form_and_nothing_else() -> None:
    pending = Pending.of(torch.zeros(2, 3, 4, dtype=torch.bfloat16), (0, 0))
    assert pending.shape == (2, 3, 4) and pending.dtype == torch.bfloat16 and pending.device == CPU
    assert pending.size(1) == 3 and pending.dim() == 3 and pending.is_floating_point() and not pending.is_cuda
    with pytest.raises(NotStreamable, match=r"\(add\)"):
        pending + 1
    with pytest.raises(NotStreamable, match=r"\(getitem\)"):
        pending[0]
    with pytest.raises(NotStreamable):
        torch.stack([pending, pending])


class Table(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(100, 3, device="meta")


@pytest.fixture
def table(tmp_path: Path) -> tuple[OnDisk, StoredTensors, torch.Tensor]:
    values = torch.arange(300.0).reshape(100, 3)
    write_tensors(tmp_path / "model.safetensors", {"table.weight": values})
    (tmp_path / "config.json").write_text("{}")
    stored = StoredTensors(CheckpointFolder(tmp_path))
    model = Table()
    weights = DiskWeights(stored, model, torch.float32, CPU)
    return OnDisk.of(model.table.weight, "table.weight", weights, CPU), stored, values


def test_of_a_table_only_the_rows_that_are_used_are_read(table: tuple[OnDisk, StoredTensors, torch.Tensor]) -> None:
    weight, stored, values = table
    assert weight.shape == (100, 3) and weight.device == CPU and stored.bytes_read == 0
    for ids, rows in (([[7, 8], [50, 7]], 3), ([[8]], 3), ([[99, 8, 0]], 5)):
        assert torch.equal(F.embedding(torch.tensor(ids), weight, 0), F.embedding(torch.tensor(ids), values))
        assert stored.bytes_read == rows * 12
    assert F.embedding(torch.empty(2, 0, dtype=torch.long), weight).shape == (2, 0, 3)
    with pytest.raises(IndexError):
        F.embedding(torch.tensor([100]), weight)
    weight.forget()
    weight.ahead = torch.tensor([3, 4, 5, 6, 70, 2000])
    F.embedding(torch.tensor([4]), weight)
    assert stored.bytes_read == 10 * 12
    F.embedding(torch.tensor([70]), weight)
    assert stored.bytes_read == 10 * 12
    F.embedding(torch.tensor([71]), weight)
    assert stored.bytes_read == 11 * 12


def test_what_is_computed_with_is_read_whole_and_once(table: tuple[OnDisk, StoredTensors, torch.Tensor]) -> None:
    weight, stored, values = table
    assert torch.equal(F.linear(torch.ones(1, 3), weight), F.linear(torch.ones(1, 3), values))
    assert torch.equal(torch.cat([weight, weight]), torch.cat([values, values]))
    assert torch.equal(F.embedding(torch.tensor([5]), weight), values[5:6])
    assert stored.bytes_read == 1200
    weight.forget()
    assert torch.equal(weight * 2, values * 2) and stored.bytes_read == 2400
