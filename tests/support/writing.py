"""Copies as a build writes them, of vectors that are given."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from patcher.checkpoint.folder import CheckpointFolder
from patcher.checkpoint.writer import Written
from patcher.routes.apply import write_plan
from patcher.routes.plan import Plan
from patcher.vectors.steering_vector import SteeringVector


def steering_vectors(vectors: Mapping[int, torch.Tensor], name: str = "v") -> list[SteeringVector]:
    """Layer -> [hidden], as the vectors of a build."""
    return [
        SteeringVector(name=name, layer=layer, read_layer=layer, values=values, coefficient=1.0, residual_norm=None)
        for layer, values in vectors.items()
    ]


def write_steered(
    plan: Plan, vectors: Mapping[int, torch.Tensor], base: CheckpointFolder, folder: Path, **options: Any
) -> Written:
    """Make ``folder``, and write into it what a build writes for ``vectors`` (layer -> [hidden])."""
    folder.mkdir(parents=True)
    return write_plan(plan, steering_vectors(vectors), base, folder, **options)
