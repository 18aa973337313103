"""A default build up to its copy, in this process, and the proof's three limits in a few lines of their own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from support.stock_loading import log_probs, stock_model
from support.tiny_models import write_recipe
from support.tiny_patch import _changed, hooks, largest

from patcher.build.base_run import BaseRun
from patcher.build.job import Job
from patcher.build.planning import plan_build
from patcher.checkpoint.prepare import prepared_base
from patcher.recipe.file import load_recipe
from patcher.routes.apply import write_plan
from patcher.routes.plan import Plan
from patcher.vectors.steering_vector import sum_by_layer
from patcher.verify.probes import PROBES


@dataclass(frozen=True)
class Built:
    """A copy that a build would prove next.

    Attributes:
        plan: what was chosen.
        difference: largest difference of a log-probability from the hook, on the texts of the verification.
        effect: largest difference that the hook makes.
        residual: the largest error of what the residual stream gains, relative to the vector.
    """

    plan: Plan
    difference: float
    effect: float
    residual: float

    @property
    def why(self) -> str:
        return "" if self.passes else f"differs by {self.difference:.2g} of {self.effect:.2g}, {self.residual:.2g}"

    @property
    def passes(self) -> bool:
        return self.difference <= min(1e-4, 0.01 * self.effect) and self.residual <= 1e-3


def built(scratch: Path, layer: int | list[int], **keys: Any) -> Built:
    """The copy of ``scratch / "base"``, made in ``scratch / "copy"`` as a build makes it."""
    recipe = write_recipe(scratch / "recipe.yaml", scratch / "base", layer, scratch / "out", **keys)
    job = Job(load_recipe(recipe), scratch / "out", say=lambda _line: None)
    planned = plan_build(job)
    with prepared_base(planned.source, job.loaded, job.output, job.say) as base:
        run = BaseRun.of(job, planned, base)
        found = run.find(run.weighing.before_load(planned.plan))
        (scratch / "copy").mkdir()
        write_plan(found.plan, found.vectors, base.checkpoint, scratch / "copy")
    vectors = sum_by_layer(found.vectors)
    model, _ = stock_model(scratch / "base")
    copy, _ = stock_model(scratch / "copy")
    plan, apart, effect, residual = found.plan, 0.0, 0.0, 0.0
    for text in PROBES:
        ids = torch.tensor([planned.tokenizer(text)["input_ids"]])
        before = log_probs(model, ids)
        with hooks(model, planned.plan.blocks, vectors):
            hooked = log_probs(model, ids)
        apart = max(apart, largest(log_probs(copy, ids), hooked))
        effect = max(effect, largest(hooked, before))
        if len(vectors) == 1 and plan.residual == "same":
            residual = max(residual, _residual_error(model, copy, planned.plan.blocks, plan, ids, vectors))
    return Built(plan, apart, effect, residual)


def _residual_error(
    model: torch.nn.Module, copy: torch.nn.Module, blocks: str, plan: Plan, ids: torch.Tensor, vectors: Any
) -> float:
    ((layer, vector),) = vectors.items()
    seen = []
    for which, path, at in ((model, blocks, layer), (copy, plan.blocks, plan.copy_layers.get(layer, layer))):
        with _changed(which, path, [at], lambda _layer, hidden: seen.append(hidden.detach()) or hidden):
            log_probs(which, ids)
    distance = (seen[1] - seen[0] - vector).norm(dim=-1)
    slack = 1e-6 * seen[0].norm(dim=-1)
    return float(((distance - slack).clamp(min=0.0) / vector.norm()).max())
