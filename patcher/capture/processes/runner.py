"""Capture over several processes: process 0 sends batches, all compute, the rows that are read come back in fp64.

``fsdp``: every process keeps a part of each block and gathers the whole block only while it computes it. The processes
run different batches, so N of them read N batches in little more than the time of one. ``tp``: every process computes
its part of each block of the same batch, and no block is ever whole anywhere. ``replicate``: every process keeps the
whole model and runs batches of its own.
"""

from __future__ import annotations

import gc
import itertools
import signal
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from patcher.architectures.decoder import decoder_config
from patcher.capture.batches import Batch, Place
from patcher.capture.forward import read_blocks
from patcher.capture.processes.messages import Order, Processes
from patcher.capture.processes.model import Sharding, load_sharded, out_of_memory, own_device
from patcher.capture.processes.proof import Proof, StandIn, make_stand_in, prove
from patcher.capture.residuals import Collector, Progress


class Distributed:
    """The model of process 0 and those of all others, as a :class:`patcher.capture.residuals.Runner`."""

    def __init__(self, sharding: Sharding, processes: Processes) -> None:
        """Tell the others what to load, and load this process's part.

        Raises:
            InputError, OutsideError: see :func:`patcher.capture.processes.model.load_sharded`.
        """
        self.sharding, self.processes = sharding, processes
        _order_all(processes, "load", sharding)
        self.model: nn.Module | None = load_sharded(sharding, processes)
        self.hidden = int(decoder_config(self.model.config).hidden_size)
        self.dtype: torch.dtype = getattr(torch, sharding.dtype)

    def run(self, batches: Sequence[Batch], layers: Sequence[int], collect: Collector, progress: Progress) -> None:
        """Run every batch somewhere; ``progress`` is called with the number of batches done.

        Raises:
            OutsideError: a batch does not fit in a device's memory, or another process is gone.
        """
        size = 1 if self.sharding.mode == "tp" else self.processes.world.size
        jobs = _enough(list(enumerate(batches)), size)
        for start in range(0, len(jobs), size):
            self._round([batch for _number, batch in jobs[start : start + size]], layers, collect)
            if progress is not None:
                following = jobs[start + size][0] if start + size < len(jobs) else len(batches)
                progress(following)

    def end(self) -> None:
        """Let the other processes go, and free the memory."""
        self.model = None
        dismiss(self.processes)

    def _round(self, batches: Sequence[Batch], layers: Sequence[int], collect: Collector) -> None:
        assert self.model is not None
        together = self.sharding.mode == "tp"
        for rank in range(1, self.processes.world.size):
            if rank < len(batches):
                self.processes.order(rank, "run", _as_tensors(batches[rank], layers))
            elif self.sharding.mode != "replicate":
                # All gather the blocks together, so a process without a batch runs one for nothing.
                own = batches[0] if together else batches[-1]
                self.processes.order(rank, "keep_up", _as_tensors(own, layers))
        _keep(batches[0], layers, _read(self.model, self.sharding, batches[0], layers), collect)
        for rank in range(1, len(batches)):
            places = len(batches[rank].places)
            results = torch.empty(len(layers), places, self.hidden + 1, dtype=torch.float64)
            _keep(batches[rank], layers, self.processes.take(rank, results), collect)


def try_together(sharding: Sharding, processes: Processes) -> Proof:
    """Have all processes try ``sharding`` on a stand-in (:func:`patcher.capture.processes.proof.prove`)."""
    stand_in = make_stand_in(sharding)
    if stand_in is None:
        # The real model will say whether it can be loaded.
        return Proof(True, None)
    _order_all(processes, "prove", sharding, stand_in.as_tensors())
    return prove(sharding, stand_in, processes)


def dismiss(processes: Processes) -> None:
    """Let the other processes go."""
    for rank in range(1, processes.world.size):
        processes.order(rank, "end")
    _free()
    processes.part()


def assist(processes: Processes) -> None:
    """What every process but the first does: load a part of the model, and run what process 0 sends.

    Raises:
        InputError, OutsideError: see :func:`patcher.capture.processes.model.load_sharded`.
    """
    # Nothing here needs to be cleaned up, and a collective would not let go for a signal's handler.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    kind = processes.hear("device")
    if not kind:
        return
    processes.connect(own_device(kind, processes.world))
    sharding: Sharding | None = None
    model: nn.Module | None = None
    while True:
        order, tensors = processes.obey()
        if order == "end":
            break
        if order in ("prove", "load"):
            model = None
            _free()
            sharding = Sharding.from_text(tensors["sharding"].numpy().tobytes())
            if order == "load":
                model = load_sharded(sharding, processes)
            else:
                prove(sharding, StandIn.from_tensors(tensors), processes)
            continue
        assert model is not None and sharding is not None
        results = _read(model, sharding, *_from_tensors(tensors))
        if order == "run":
            processes.give(results)
    model = None
    _free()
    processes.part()


def _order_all(
    processes: Processes, what: Order, sharding: Sharding, tensors: Mapping[str, Tensor] | None = None
) -> None:
    processes.say("device", sharding.device)
    processes.connect(own_device(sharding.device, processes.world))
    text = torch.frombuffer(bytearray(sharding.as_text()), dtype=torch.uint8)
    for rank in range(1, processes.world.size):
        processes.order(rank, what, {**(tensors or {}), "sharding": text})


def _enough(jobs: list[tuple[int, Batch]], size: int) -> list[tuple[int, Batch]]:
    """Batches halved until there is one for every process, as far as they have rows; numbers stay."""
    while len(jobs) < size:
        rows, at = max((batch.shape[0], -index) for index, (_number, batch) in enumerate(jobs))
        if rows < 2:
            break
        number, batch = jobs[-at]
        jobs[-at : 1 - at] = [(number, half) for half in batch.halves()]
    return jobs


def _read(model: nn.Module, sharding: Sharding, batch: Batch, layers: Sequence[int]) -> Tensor:
    """[layers, places, hidden + 1], fp64, on the CPU: of every place the row that is read and its sum of norms."""
    own = Batch(batch.inputs, tuple(Place(i, p.row, p.columns, p.counted) for i, p in enumerate(batch.places)))
    collector = Collector([own], len(own.places), int(decoder_config(model.config).hidden_size), layers)

    def use(layer: int, states: Tensor) -> None:
        collector(layer, 0, _whole(states))

    try:
        read_blocks(model, sharding.blocks, layers, own.inputs_in(getattr(torch, sharding.dtype)), use)
    except torch.OutOfMemoryError as error:
        # Halving the batch, as one process does, would leave the others waiting in a block.
        rows, width = own.shape
        raise out_of_memory(error, f"a batch of {rows} x {width} tokens", sharding.mode) from None
    return torch.stack([torch.cat([collector.rows[at], collector.norms[at][:, None]], dim=1) for at in layers])


def _whole(states: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor

    return states.full_tensor() if isinstance(states, DTensor) else states


def _keep(batch: Batch, layers: Sequence[int], results: Tensor, collect: Collector) -> None:
    prompts = [place.prompt for place in batch.places]
    for layer, result in zip(layers, results, strict=True):
        collect.put(layer, prompts, result[:, :-1], result[:, -1])


def _as_tensors(batch: Batch, layers: Sequence[int]) -> dict[str, Tensor]:
    places = batch.places
    return {
        **{f"inputs.{name}": value for name, value in batch.inputs.items()},
        "layers": torch.tensor(list(layers)),
        "rows": torch.tensor([place.row for place in places]),
        "read": torch.tensor([len(place.columns) for place in places]),
        "counted": torch.tensor([len(place.counted) for place in places]),
        "columns": torch.tensor([column for place in places for column in (*place.columns, *place.counted)]),
    }


def _from_tensors(tensors: dict[str, Tensor]) -> tuple[Batch, list[int]]:
    inputs = {name.partition(".")[2]: value for name, value in tensors.items() if name.startswith("inputs.")}
    columns = iter(tensors["columns"].tolist())
    sizes = zip(tensors["rows"].tolist(), tensors["read"].tolist(), tensors["counted"].tolist(), strict=True)
    places = tuple(
        Place(index, row, tuple(itertools.islice(columns, read)), tuple(itertools.islice(columns, counted)))
        for index, (row, read, counted) in enumerate(sizes)
    )
    return Batch(inputs, places), tensors["layers"].tolist()


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
