"""A model shared out over several processes: loading one process's part of it.

How a forward pass ends after the last block that is read: the reader's hook raises, and the exception is caught inside
of the outermost module's ``forward``. FSDP2 opens and closes its state in hooks around that ``forward``. An exception
that went past them would leave the root open: its parameters would stay gathered, and the next pass would be taken for
a part of this one. Blocks behind the last one that is read are replaced by empty ones before the weights are loaded, so
nothing of them is read from the disk or kept. So are the towers of a multimodal model, through which no text passes. A
class that looks into all of these parts keeps them.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from patcher.architectures.decoder import checkpoint_config
from patcher.architectures.model_class import on_meta, quiet_transformers
from patcher.architectures.quantised import quantisation_of
from patcher.architectures.towers import towers_of
from patcher.capture.forward import Enough, run_blocks
from patcher.capture.model import load_causal_lm
from patcher.capture.processes.launch import World
from patcher.capture.processes.messages import Processes, is_lost
from patcher.checkpoint.prepare import read_config
from patcher.checkpoint.source import fetch
from patcher.disk.json_files import read_json_object
from patcher.errors import InputError, OutsideError, no_memory
from patcher.errors.causes import cause_of

ShardingMode = Literal["fsdp", "tp", "replicate"]


@dataclass(frozen=True)
class Sharding:
    """What every process is to load.

    Attributes:
        folder: the model, on the machine of process 0.
        hub: its Hub id, for machines that do not have that folder; None for a local model.
        revision: of the Hub model.
        mode: how it is shared out.
        dtype: name of the capture's dtype.
        device: kind of device: ``cpu``, ``cuda`` ...
        blocks: path of the list of decoder blocks.
        last: the last block that is needed; -1 for none.
        trust_remote_code: whether the model's own code may run.
        whole: whether the blocks behind the last one are kept.
    """

    folder: str
    hub: str | None
    revision: str | None
    mode: ShardingMode
    dtype: str
    device: str
    blocks: str
    last: int
    trust_remote_code: bool
    whole: bool = False

    def as_text(self) -> bytes:
        """For :meth:`from_text` in another process."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_text(cls, text: bytes) -> Sharding:
        """What :meth:`as_text` made."""
        return cls(**json.loads(text))


MODES: dict[ShardingMode, str] = {
    "fsdp": "every process keeps a part of each block",
    "tp": "every process computes a part of each block",
    "replicate": "every process keeps the whole model",
}
"""How a model is shared out -> what that means, for people."""


def own_device(kind: str, world: World) -> torch.device:
    """The device of this process.

    Raises:
        InputError: the machine has fewer devices than processes.
    """
    if kind == "cpu":
        return torch.device("cpu")
    count = torch.accelerator.device_count()
    if world.local_rank >= count:
        raise InputError(
            f"there are more processes on this machine than devices ({kind})",
            where=world.name,
            found=f"{world.local_size} processes, {count} device{'s' * (count != 1)}",
            remedy=f"torchrun --nproc-per-node {max(1, count)}",
        )
    return torch.device(kind, world.local_rank)


def model_folder(sharding: Sharding) -> Path:
    """The model on this machine.

    Raises:
        InputError: it is not there.
        OutsideError: it cannot be downloaded.
    """
    folder = Path(sharding.folder)
    if folder.is_dir():
        return folder
    if sharding.hub is None:
        raise InputError(
            "the model's folder is not on this machine",
            where=str(folder),
            remedy="put the model on a disk that all machines see under the same path, or name it by its Hub id",
        )
    return fetch(sharding.hub, sharding.revision, weights=True).folder


def load_sharded(sharding: Sharding, processes: Processes) -> nn.Module:
    """This process's part of the model, in eval mode; every process takes part.

    Raises:
        InputError: the model is not on this machine, cannot be loaded, or is not shared out by its class.
        OutsideError: not enough memory.
    """
    folder = model_folder(sharding)
    if quantisation_of(read_json_object(folder / "config.json")) is not None:
        # Its tensors are not the class's parameters, so nothing can be left out or shared out.
        device = str(own_device(sharding.device, processes.world))
        options = {"dtype": getattr(torch, sharding.dtype), "trust_remote_code": sharding.trust_remote_code}
        return load_causal_lm(folder, device=device, **options)[0]
    model = load_part(folder, sharding, processes.world)
    if sharding.mode != "replicate":
        # Parameters that belong to no block's group are whole again after a pass, and stay so.
        run_blocks(model, sharding.blocks, [sharding.last], plain_inputs(torch.ones(1, 8, dtype=torch.long)))
        _require_sharded(model, sharding, processes)
    return model


def load_part(folder: Path, sharding: Sharding, world: World) -> nn.Module:
    """What this process keeps of the model in ``folder``.

    Raises:
        InputError: it cannot be loaded in this way.
        OutsideError: not enough memory.
        AttributeError: the class needs the blocks that were left out.
    """
    from transformers.distributed import DistributedConfig

    options: dict[str, Any] = {"device_map": str(own_device(sharding.device, world))}
    if sharding.mode == "fsdp":
        options = {"distributed_config": DistributedConfig(fsdp_size=world.size)}
    elif sharding.mode == "tp":
        options = {"distributed_config": DistributedConfig(tp_size=world.size, tp_plan="auto")}
    try:
        # A new one each time: loading leaves marks in it.
        config = read_config(folder, trust_remote_code=sharding.trust_remote_code)
        empty = on_meta(config, trust_remote_code=sharding.trust_remote_code)
        last, towers = (None, ()) if sharding.whole else (sharding.last, towers_of(empty))
        part: Any = _part_class(type(empty), sharding.blocks, last, towers)
        with quiet_transformers():
            model: nn.Module = part.from_pretrained(
                folder,
                config=checkpoint_config(config),
                dtype=getattr(torch, sharding.dtype),
                local_files_only=True,
                **options,
            ).eval()
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise out_of_memory(error, str(folder), sharding.mode) from None
    except (OSError, ValueError, RuntimeError, LookupError, TypeError, AssertionError, ImportError) as error:
        if is_lost(error):
            raise
        raise InputError(
            f"the model cannot be loaded over several processes with `{sharding.mode}`",
            where=str(folder),
            found=cause_of(error),
            remedy=otherwise(sharding.mode),
            code="parallel",
        ) from None
    model.forward = _ends_early(model.forward)
    return model


def _part_class(stock: type, blocks: str, last: int | None, towers: Sequence[str]) -> type:
    """The stock class with empty blocks behind block ``last`` (None: with all) and empty towers, and an FSDP plan that
    knows them."""

    def initialise(self: Any, *arguments: Any, **keywords: Any) -> None:
        stock.__init__(self, *arguments, **keywords)  # type: ignore[misc]
        modules = self.get_submodule(blocks)
        for index in range(len(modules) if last is None else max(last, 0) + 1, len(modules)):
            modules[index] = nn.Identity()
        for tower in towers:
            self.set_submodule(tower, nn.Identity())

    # Under its own name, which transformers looks things up by.
    own = {"__init__": initialise, "__module__": stock.__module__, "_fsdp_plan": _plan(stock, blocks)}
    return type(stock.__name__, (stock,), own)


def _plan(stock: type, blocks: str) -> dict[str, str]:
    """The class's FSDP plan and a rule for its blocks.

    Plans call the blocks ``layers``; in GPT-2, OPT, BLOOM and others they have another name, and nothing of them would
    be sharded, without a word.
    """
    return {**(getattr(stock, "_fsdp_plan", None) or {}), f"{blocks}.*": "free_full_weight"}


def _ends_early(forward: Any) -> Any:
    @functools.wraps(forward)
    def until_enough(*arguments: Any, **keywords: Any) -> Any:
        with contextlib.suppress(Enough):
            return forward(*arguments, **keywords)

    return until_enough


def held_parameters(model: nn.Module, blocks: str) -> tuple[int, int]:
    """How many parameters of the decoder blocks this process holds, and how many there are."""
    from torch.distributed.tensor import DTensor

    parameters = [value for name, value in model.named_parameters() if name.startswith(f"{blocks}.")]
    local = sum((value.to_local() if isinstance(value, DTensor) else value).numel() for value in parameters)
    return local, sum(value.numel() for value in parameters)


def most_held(size: int) -> float:
    """The largest fraction of the blocks that the average process may hold: norms and routers may stay whole."""
    return (1 + 1 / size) / 2


def _require_sharded(model: nn.Module, sharding: Sharding, processes: Processes) -> None:
    """Raise unless the processes hold about one copy of the blocks between them.

    Raises:
        InputError: they hold (nearly) one each.
    """
    held, whole = processes.total(*held_parameters(model, sharding.blocks))
    size = processes.world.size
    if held > whole * most_held(size):
        raise InputError(
            f"{type(model).__name__.removeprefix('FSDP')} is not shared out by `parallel: {sharding.mode}`",
            where=sharding.folder,
            found=f"each of {size} processes holds {held / max(1, whole):.0%} of the decoder blocks",
            remedy=otherwise(sharding.mode),
            code="parallel",
        )


def plain_inputs(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """The inputs of a forward pass over ``ids`` [1, tokens]."""
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": torch.arange(ids.shape[1])[None]}


def otherwise(mode: ShardingMode) -> str:
    """What to do where a class cannot be shared out in this way."""
    fits = "where the whole model fits on every device"
    others = {"fsdp": f"replicate, {fits}", "tp": f"fsdp (or replicate, {fits})", "replicate": "fsdp"}
    return f"capture.parallel: {others[mode]}; or one process, without torchrun"


def out_of_memory(error: BaseException, where: str, mode: ShardingMode) -> OutsideError:
    """The error of a process that ran out of memory."""
    remedy = "more processes with `capture: {parallel: fsdp}`, a smaller `capture.batch_size`, or dtype: bfloat16"
    return no_memory(f"a process ran out of memory (`{mode}`: {MODES[mode]})", where, error, remedy)
