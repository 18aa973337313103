"""May this architecture be shared out in this way? Decided by doing it to a tiny stand-in, in all processes.

Sharing out is transformers' and torch's work, and not every class survives it. Some have no plan; some keep every block
whole; some are left with buffers that nothing has filled, and compute other numbers without a word. No list of names
says which; the stand-in does.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from patcher.architectures.model_class import quiet_transformers
from patcher.architectures.shrink import shrink_config
from patcher.architectures.stand_in import build_stand_in, randomise
from patcher.capture.forward import EMBEDDING, run_blocks
from patcher.capture.processes.messages import Processes, is_lost
from patcher.capture.processes.model import (
    Sharding,
    held_parameters,
    load_part,
    most_held,
    plain_inputs,
)
from patcher.capture.residuals import relative_error
from patcher.checkpoint.prepare import read_config
from patcher.errors import InputError
from patcher.errors.causes import cause_of

TOKENS = 24
TOLERANCE = 1e-4
"""Largest difference between the stand-in shared out and whole, relative. Rounding makes about 1e-7 of it."""


@dataclass(frozen=True)
class Proof:
    """What the stand-in says.

    Attributes:
        whole: whether the class needs the blocks behind the last one that is read.
        refusal: None if it may be shared out in this way, else why not.
    """

    whole: bool
    refusal: str | None


@dataclass(frozen=True)
class StandIn:
    """A tiny checkpoint, and what its blocks put out.

    Attributes:
        files: name -> bytes, uint8.
        ids: [1, tokens], int64.
        wanted: layer -> [1, tokens, hidden], fp32, computed by the whole model in one process.
    """

    files: Mapping[str, Tensor]
    ids: Tensor
    wanted: Mapping[int, Tensor]

    def as_tensors(self) -> dict[str, Tensor]:
        """For :meth:`from_tensors` in another process."""
        files = {f"file.{name}": content for name, content in self.files.items()}
        return {**files, **{f"wanted.{layer}": states for layer, states in self.wanted.items()}, "ids": self.ids}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> StandIn:
        """What :meth:`as_tensors` made, among other tensors."""
        files = {name.removeprefix("file."): content for name, content in tensors.items() if name.startswith("file.")}
        wanted = {int(name.split(".")[1]): value for name, value in tensors.items() if name.startswith("wanted.")}
        return cls(files, tensors["ids"], wanted)


def make_stand_in(sharding: Sharding) -> StandIn | None:
    """The stand-in for the model of ``sharding``; None if there is none. (In process 0; the others only load it.)

    Raises:
        InputError: transformers does not understand the model's config.
    """
    config = read_config(Path(sharding.folder), trust_remote_code=sharding.trust_remote_code)
    try:
        tiny, last = shrink_config(config, max(sharding.last, 0))
        model = build_stand_in(tiny, trust_remote_code=sharding.trust_remote_code)
    except InputError:
        return None
    randomise(model, torch.Generator().manual_seed(0))
    ids = torch.arange(3, 3 + TOKENS)[None] % int(tiny.vocab_size)
    layers = {EMBEDDING, last if sharding.last >= 0 else EMBEDDING}
    with quiet_transformers(), tempfile.TemporaryDirectory(prefix="patch-model-") as name:
        wanted = run_blocks(model, sharding.blocks, layers, plain_inputs(ids))
        # A wrapper's towers have no weights.
        held = {key: tensor for key, tensor in model.state_dict().items() if not tensor.is_meta}
        model.save_pretrained(name, state_dict=held)  # type: ignore[operator]
        contents = {item.name: bytearray(item.read_bytes()) for item in Path(name).iterdir() if item.is_file()}
    files = {item: torch.frombuffer(content, dtype=torch.uint8) for item, content in contents.items() if content}
    return StandIn(files, ids, wanted)


def prove(sharding: Sharding, stand_in: StandIn, processes: Processes) -> Proof:
    """Shard the stand-in as the model is to be, in all processes, which find the same."""
    with tempfile.TemporaryDirectory(prefix="patch-model-") as name:
        for file, content in stand_in.files.items():
            (Path(name) / file).write_bytes(content.numpy().tobytes())
        for whole in (False, True):
            tiny = replace(sharding, folder=name, hub=None, dtype="float32", last=max(stand_in.wanted), whole=whole)
            trial = _try(tiny, stand_in, processes)
            if not trial.incomplete:
                break
    # Whole numbers, because the processes' verdicts are added up.
    wrong, failed, held, of = processes.total(
        int(not trial.error <= TOLERANCE), int(trial.failure is not None), *trial.held
    )
    if failed and sharding.mode == "tp" and processes.world.size > 2:
        # The stand-in has four heads; what can be divided by more than two is for the real model to say.
        return Proof(True, None)
    # What stays whole under tensor parallelism is larger beside the small widths of the stand-in than in the model.
    limit = most_held(processes.world.size) if sharding.mode == "fsdp" else 0.99
    refusal = None
    if failed:
        refusal = trial.failure or "it fails in another process"
    elif sharding.mode != "replicate" and held > of * limit:
        refusal = f"its class is not shared out: each process keeps {held / max(1, of):.0%} of the decoder blocks"
    elif wrong:
        refusal = f"its class computes other numbers when it is shared out (a tiny one is off by {trial.error:.1g})"
    return Proof(whole, refusal)


@dataclass(frozen=True)
class _Trial:
    failure: str | None = None
    incomplete: bool = False
    error: float = 0.0
    held: tuple[int, int] = (0, 0)


def _try(sharding: Sharding, stand_in: StandIn, processes: Processes) -> _Trial:
    part, failure, incomplete = None, None, False
    try:
        part = load_part(Path(sharding.folder), sharding, processes.world)
    except AttributeError as error:
        # It looks for something in the blocks that were left out.
        failure, incomplete = cause_of(error), True
    except InputError as error:
        failure = error.problems[0].found or str(error)
    missing, left_out = processes.total(int(part is None), int(incomplete))
    if part is None or missing:
        return _Trial(failure or "it fails in another process", left_out > 0)
    try:
        found = run_blocks(part, sharding.blocks, list(stand_in.wanted), plain_inputs(stand_in.ids))
    except Exception as error:
        # Classes fail in ways of their own under what they were not made for, and alike in all processes.
        if is_lost(error):
            raise
        return _Trial(cause_of(error), isinstance(error, AttributeError))
    errors = [relative_error(found[layer].cpu(), wanted) for layer, wanted in stand_in.wanted.items()]
    return _Trial(error=max(errors), held=held_parameters(part, sharding.blocks))
