"""A reader of residuals over all processes of a launch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from patcher.architectures.analysis import Architecture
from patcher.architectures.decoder import decoder_config
from patcher.architectures.quantised import quantisation_of
from patcher.capture.forward import position_limit
from patcher.capture.memory import available_memory
from patcher.capture.model import pick_dtype
from patcher.capture.processes.launch import World, forget_launch
from patcher.capture.processes.messages import Processes
from patcher.capture.processes.model import MODES, Sharding, ShardingMode, otherwise, own_device
from patcher.capture.processes.proof import Proof
from patcher.capture.processes.runner import Distributed, try_together
from patcher.capture.reader import ResidualReader, token_budget
from patcher.checkpoint.prepare import PreparedBase
from patcher.checkpoint.source import Source
from patcher.disk.json_files import read_json_object
from patcher.errors import InputError
from patcher.recipe.schema import Recipe


@contextmanager
def sharded_reader(
    processes: Processes,
    architecture: Architecture,
    recipe: Recipe,
    base: PreparedBase,
    source: Source,
    *,
    last: int,
    batch_size: int | None,
    say: Callable[[str], None],
) -> Iterator[ResidualReader]:
    """While open, all processes read together; after it the others are gone and this one is alone.

    Args:
        processes: of this launch; this is process 0.
        architecture: of the base.
        recipe: says how the model is shared out, on which devices, in which dtype.
        base: the model as it is to be read.
        source: where the base came from; other machines fetch a Hub model themselves.
        last: the last block that is read.
        batch_size: most rows in a batch, or None.
        say: told how the model is shared out.

    Raises:
        InputError: the model is not shared out in this way, or the device is not one for that.
        OutsideError: a process has too little memory, or is gone.
    """
    folder, parallel, world = base.reference_folder, recipe.capture.parallel, processes.world
    quantised = quantisation_of(read_json_object(folder / "config.json")) is not None
    reasons: list[str] = []
    count = base.loaded_count(architecture)
    for mode in modes(parallel, quantised=quantised):
        kind = device_kind(recipe.device, mode)
        copies = world.local_size if mode == "replicate" else world.local_size / world.size
        chosen = pick_dtype(recipe.dtype, int(count * copies), base.stored_dtype, kind)
        if mode == "replicate" and parallel == "auto":
            _require_room(world, kind, count * chosen.itemsize, reasons)
        sharding = Sharding(
            folder=str(folder.resolve()),
            hub=source.name if source.hub and source.folder == folder else None,
            revision=source.revision,
            mode=mode,
            dtype=str(chosen).removeprefix("torch."),
            device=kind,
            blocks=architecture.blocks,
            last=last,
            trust_remote_code=architecture.trust_remote_code,
        )
        proof = Proof(True, None) if quantised else try_together(sharding, processes)
        if proof.refusal is None:
            sharding = replace(sharding, whole=proof.whole)
            break
        reasons.append(f"{mode}: {proof.refusal}")
    else:
        raise InputError(
            f"{architecture.class_name} cannot be read over several processes with `parallel: {parallel}`",
            where="capture.parallel",
            found="; ".join(reasons),
            remedy=otherwise(mode),
            code="parallel",
        )
    for reason in reasons:
        say(f"not {reason}")
    what = f"{sharding.dtype}, {sharding.device}, {mode}: {MODES[mode]}"
    say(f"loading the model in {world.size} processes ({what})")
    runner = Distributed(sharding, processes)
    assert runner.model is not None
    tokens = token_budget(decoder_config(runner.model.config), own_device(sharding.device, world), runner.dtype)
    yield ResidualReader(runner, architecture, tokens, batch_size, position_limit(runner.model), note=say)
    runner.end()
    forget_launch()


def modes(asked: str, *, quantised: bool) -> list[ShardingMode]:
    """What ``capture.parallel`` may come to, the best first.

    Raises:
        InputError: the base is quantised, and is to be shared out.
    """
    if quantised and asked in ("fsdp", "tp"):
        raise InputError(
            f"a quantised base cannot be shared out by `parallel: {asked}`",
            where="capture.parallel",
            remedy="`replicate` where it fits on every device, or one process, which spreads it over all devices",
            code="quantised",
        )
    every: list[ShardingMode] = ["replicate"] if quantised else ["fsdp", "tp", "replicate"]
    return every if asked == "auto" else [mode for mode in every if mode == asked]


def device_kind(asked: str, mode: ShardingMode) -> str:
    """The kind of device that the processes use: ``cpu``, ``cuda`` ...

    Raises:
        InputError: a single device is named, it is not there, or transformers does not share out to its kind.
    """
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    there = "cpu" if found is None else found.type
    kind = there if asked == "auto" else asked
    if ":" in kind:
        raise InputError(
            "every process has a device of its own, so none can be named",
            where=f"device: {asked}",
            remedy="device: auto; CUDA_VISIBLE_DEVICES says which devices are used",
        )
    if kind not in (there, "cpu"):
        raise InputError("this device cannot be used", where=f"device: {asked}", found=there, remedy="device: auto")
    if mode != "replicate" and (kind != there or there == "mps"):
        raise InputError(
            f"`parallel: {mode}` shares the model out over the accelerators that are there",
            where=f"device: {asked}",
            found=there,
            remedy="device: auto; or hide them to use the CPU: CUDA_VISIBLE_DEVICES=''",
        )
    return kind


def _require_room(world: World, kind: str, whole: int, reasons: Sequence[str]) -> None:
    """Refuse copies that do not fit, before hours are spent on loading them."""
    if kind == "cuda":
        free, _total = torch.cuda.mem_get_info(own_device(kind, world))
    else:
        free = available_memory() // world.local_size
    if whole > free:
        raise InputError(
            "the model cannot be shared out, and does not fit as a whole once for every process",
            where="capture.parallel",
            found="".join(f"{reason}; " for reason in reasons)
            + f"{whole / 2**30:.1f} GiB a copy, {free / 2**30:.1f} GiB free for each",
            remedy="one process (without torchrun) spreads it over all devices and the disk",
            code="memory",
        )
