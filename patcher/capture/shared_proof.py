"""May this architecture be shared out in this way? Decided by doing it to a tiny stand-in, in all processes.

Sharing out is transformers' and torch's work, and not every class survives it: some have no plan, some keep every block
whole, and some are left with buffers that nothing has filled, and compute other numbers without a word. No list of
names says which; the stand-in does.
"""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from patcher.architectures.model_class import quiet_transformers
from patcher.architectures.probe import build_stand_in, randomise
from patcher.architectures.shrink import shrink_config
from patcher.capture.forward import EMBEDDING, run_blocks
from patcher.capture.processes import Processes, is_lost
from patcher.capture.shared_model import (
    Share,
    has_plan,
    held_parameters,
    load_part,
    model_folder,
    most_held,
    read_config,
)
from patcher.errors import InputError

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
class _Trial:
    whole: bool
    error: float
    held: tuple[int, int]
    failure: str | None = None


def prove(share: Share, processes: Processes) -> Proof:
    """Try ``share`` on a stand-in; every process takes part and finds the same.

    Raises:
        InputError: the model is not on this machine, or transformers does not understand its config.
    """
    folder = model_folder(share)
    config = read_config(folder, share)
    if share.mode == "tp" and not has_plan(config, share):
        return Proof(True, "its class has no plan for tensor parallelism")
    try:
        tiny, last = shrink_config(config, max(share.last, 0))
        stand_in = build_stand_in(tiny, trust_remote_code=share.trust_remote_code)
    except InputError:
        # The real model will say whether it can be loaded.
        return Proof(True, None)
    randomise(stand_in, torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory(prefix="patch-model-") as name:
        with quiet_transformers():
            stand_in.save_pretrained(name)  # type: ignore[operator]
        alike = replace(share, folder=name, hub=None, dtype="float32", last=min(last, share.last))
        trial = _try(alike, stand_in, processes)
    # In whole numbers, because the processes' verdicts are added up.
    wrong, failed, whole, held, of = processes.total(
        int(not trial.error <= TOLERANCE), int(trial.failure is not None), int(trial.whole), *trial.held
    )
    if failed and share.mode == "tp" and processes.world.size > 2:
        # The stand-in has four heads; what can be divided by more than two is for the real model to say.
        return Proof(True, None)
    refusal = None
    if failed:
        refusal = trial.failure or "it fails in another process"
    elif share.mode != "replicate" and held > of * most_held(processes.world.size):
        refusal = f"its class is not shared out: each process keeps {held / max(1, of):.0%} of the decoder blocks"
    elif wrong:
        refusal = f"its class computes other numbers when it is shared out (a tiny one is off by {trial.error:.1g})"
    return Proof(whole > 0, refusal)


def _try(share: Share, stand_in: nn.Module, processes: Processes) -> _Trial:
    ids = torch.arange(3, 27)[None] % int(stand_in.config.vocab_size)  # type: ignore[union-attr, arg-type]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": torch.arange(24)[None]}
    layers = sorted({EMBEDDING, share.last})
    with quiet_transformers():
        wanted = run_blocks(stand_in, share.blocks, layers, inputs)
    failure = ""
    for whole in (False, True):
        try:
            part = load_part(Path(share.folder), replace(share, whole=whole), processes.world)
            found = run_blocks(part, share.blocks, layers, inputs)
        except AttributeError as error:
            # It looks for something in the blocks that were left out.
            failure = str(error).splitlines()[0]
            continue
        except InputError as error:
            return _Trial(whole, 0.0, (0, 0), error.problems[0].found or str(error))
        except Exception as error:
            if is_lost(error):
                raise
            # Classes fail in ways of their own under what they were not made for.
            return _Trial(whole, 0.0, (0, 0), (str(error).strip().splitlines() or [type(error).__name__])[0][:200])
        error_found = max(_difference(found[layer], wanted[layer]) for layer in layers)
        return _Trial(whole, error_found, held_parameters(part, share.blocks))
    return _Trial(True, 0.0, (0, 0), failure)


def _difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    error = float((found.cpu() - wanted).norm() / wanted.norm().clamp(min=1e-30))
    return error if error == error else math.inf
