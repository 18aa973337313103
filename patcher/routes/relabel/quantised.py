"""Another class for quantised weights: only where each of them keeps its name and its bytes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from patcher.architectures.analysis import Architecture
from patcher.checkpoint.folder import CheckpointFolder
from patcher.checkpoint.safetensors_file import TensorInfo
from patcher.routes.disk_names import stored_tensors
from patcher.routes.plan import NotApplicable
from patcher.stacks.names import STACKS, TRANSFORMERS, VLLM

KEY = "quantization_config"
Stored = Mapping[str, TensorInfo] | None


def as_plain(architecture: Architecture, checkpoint: CheckpointFolder | None) -> tuple[Stored, Collection[str]]:
    """What is stored, each quantised weight as one tensor of its class's name, and the names of those.

    Raises:
        NotApplicable: nothing is known of what is stored.
    """
    stored, quantisation = stored_tensors(checkpoint), architecture.quantisation
    if quantisation is None:
        return stored, ()
    if stored is None:
        raise NotApplicable("which of the weights are quantised, and under which names, is known from the files alone")
    weights = quantisation.quantised_weights(stored)
    parts = {part for parts in weights.values() for part in parts}
    plain = {name: info for name, info in stored.items() if name not in parts}
    shapes = architecture.parameters
    for weight, held in weights.items():
        like = stored[held[0]]
        shape = shapes.get(weight, like.shape)
        plain[weight] = replace(like, name=weight, dtype=quantisation.bias, shape=shape)
    return plain, weights.keys()


def require_kept(quantised: Collection[str], changed: Collection[str]) -> None:
    """Refuse a plan that does not leave quantised weights as they are.

    Raises:
        NotApplicable: with the first of them that is rewritten or renamed.
    """
    rewritten = [name for name in quantised if name in changed]
    if rewritten:
        raise NotApplicable(f"`{rewritten[0]}` is quantised, and the other class has it in another form or place")


def stated(architecture: Architecture, checkpoint: CheckpointFolder | None) -> dict[str, Any]:
    """What the copy's config.json says of the quantisation: the same, since all modules keep their names."""
    return {} if architecture.quantisation is None or checkpoint is None else {KEY: checkpoint.config[KEY]}


def stacks(architecture: Architecture, read: Mapping[str, str]) -> dict[str, str]:
    """What was not run is not claimed: beside quantised weights stock transformers alone.

    Raises:
        NotApplicable: vLLM has no class of its own for the copy, and would get these weights through its backend.
    """
    if architecture.quantisation is None:
        return dict(read)
    if read.get(VLLM) == "backend":
        raise NotApplicable("the checkpoint is quantised, and the other class is one that vLLM does not have")
    return {stack: read.get(stack, "no") if stack == TRANSFORMERS else "no" for stack in STACKS}
