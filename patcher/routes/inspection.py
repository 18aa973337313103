"""What a model's architecture offers: every route, its cost, who reads it, what it would write, and why not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patcher.architectures.analysis import Architecture
from patcher.architectures.default_configs import default_config
from patcher.architectures.installed import (
    config_types,
    language_models,
    model_type_of,
    multimodal_models,
    near_types,
    text_models,
    wrappers_of,
)
from patcher.architectures.registry import excluded, rows
from patcher.checkpoint.completeness import require_complete
from patcher.checkpoint.folder import CheckpointFolder
from patcher.checkpoint.given import require_checkpoint
from patcher.checkpoint.prepare import read_config
from patcher.checkpoint.source import fetch_config, locate
from patcher.errors import InputError, OutsideError, PatchModelError, Problem
from patcher.errors.causes import cause_of
from patcher.routes.plan import Plan
from patcher.routes.planner import ROUTES, Prefer, Verdict, choose_route, survey, with_next_best
from patcher.stacks.names import demanded_stacks

WHAT_MODEL = "give a checkpoint folder, a Hub id (owner/name, owner/name@revision) or an architecture such as qwen3"
SEE_ALL = "patch-model inspect --all lists those that are"
WITH_CONFIG = "give a checkpoint folder or a Hub id: a released config may say what the default leaves out"


@dataclass(frozen=True)
class Inspection:
    """The routes of one architecture for an edit of ``layers``.

    Attributes:
        model: what was asked for.
        architecture: its class; None where even that could not be looked at.
        layers: 0-based block indices; -1 is the embedding.
        verdicts: every route; of an inspection of all architectures, only the one that ``best`` is of.
        best: the plan that serves best; a build takes it unless it is fitted and fitted ones are not allowed.
        chosen: the plan that a build would take.
        why_none: if none is chosen, why.
        checkpoint: the folder that was looked at, whose tensors have the class's names; None where there is none.
    """

    model: str
    architecture: Architecture | None
    layers: tuple[int, ...] = ()
    verdicts: tuple[Verdict, ...] = ()
    best: Plan | None = None
    chosen: Plan | None = None
    why_none: Problem | None = None
    checkpoint: CheckpointFolder | None = None

    def as_json(self) -> dict[str, Any]:
        looked_at = self.architecture
        next_best = None if self.chosen is None else self.chosen.next_best
        return {
            "model": self.model,
            "architecture": None if looked_at is None else looked_at.class_name,
            "model_type": None if looked_at is None else looked_at.model_type,
            "blocks": None if looked_at is None else looked_at.block_count,
            "layers": list(self.layers),
            "routes": [verdict.as_json() for verdict in self.verdicts],
            "chosen": None if self.chosen is None else self.chosen.route,
            "next_best": None if next_best is None else next_best.as_json(),
            "plan": None if self.chosen is None else self.chosen.as_json(),
            "why_none": None if self.why_none is None else self.why_none.as_json(),
        }


@dataclass(frozen=True)
class Demands:
    """What the routes are held to; see :func:`patcher.routes.planner.choose_route`."""

    layers: Sequence[int] = ()
    targets: Sequence[str] | str = "auto"
    exact: bool = True
    prefer: Prefer = "stacks"
    route: str = "auto"
    trust_remote_code: bool = False
    every_route: bool = True


def inspect_model(model: str, demands: Demands) -> Inspection:
    """Look at a local folder, a Hub model (only its config.json is downloaded) or an architecture by its name.

    Raises:
        InputError, OutsideError: there is no such model, or its config makes no text causal LM.
    """
    model_type = model_type_of(model) or (model if model in rows() else None)
    if model_type is not None and not Path(model).is_dir():
        return _inspect_named(model, model_type, demands)
    config, checkpoint = _find(model, trust_remote_code=demands.trust_remote_code)
    return inspect_config(model, config, checkpoint, demands)


def inspect_config(model: str, config: Any, checkpoint: CheckpointFolder | None, demands: Demands) -> Inspection:
    """The same for a transformers config.

    Raises:
        InputError: it makes no text causal LM, has no such layer, or there is no such route.
    """
    architecture = Architecture(config, trust_remote_code=demands.trust_remote_code)
    if checkpoint is not None:
        reading = require_complete(checkpoint, model, trust_remote_code=demands.trust_remote_code)
        # Under names of their own, tensors are planned for by the class's.
        checkpoint = None if reading.stripped else checkpoint
    if architecture.block_count < 1 or architecture.hidden < 1:
        raise InputError(
            "the config makes no model",
            where=model,
            found=f"{architecture.block_count} blocks, hidden {architecture.hidden}",
            remedy="check `num_hidden_layers` and `hidden_size` in config.json",
        )
    layers = tuple(dict.fromkeys(demands.layers)) or (int(0.4 * architecture.block_count),)
    for layer in layers:
        if not -1 <= layer < architecture.block_count:
            raise InputError(
                f"{architecture.class_name} has {architecture.block_count} decoder blocks",
                where="--layer",
                found=layer,
                remedy=f"use 0 to {architecture.block_count - 1}, or -1 for the embedding",
            )
    best, why_none = None, None
    try:
        best = choose_route(
            architecture,
            layers,
            checkpoint,
            targets=demands.targets,
            route=demands.route,
            exact=False,
            prefer=demands.prefer,
        )
    except InputError as error:
        if error.code != "no_route":
            raise
        why_none = error.problems[0]
    if demands.every_route:
        if best is not None:
            best = with_next_best(
                best,
                architecture,
                layers,
                checkpoint,
                targets=demands.targets,
                exact=False,
                prefer=demands.prefer,
            )
        verdicts = tuple(survey(architecture, layers, checkpoint, targets=demanded_stacks(demands.targets)))
    else:
        verdicts = () if best is None else (Verdict(ROUTES[best.route], best),)
    chosen = best
    if best is not None and demands.exact and not best.exact:
        chosen, why_none = None, _only_fitted(architecture, best, forced=demands.route != "auto")
    return Inspection(model, architecture, layers, verdicts, best, chosen, why_none, checkpoint)


def all_names() -> list[str]:
    """Every text and multimodal language model of the installed transformers, by its model type."""
    return list(language_models())


def inspect_default(name: str, demands: Demands) -> Inspection:
    """One of them, by the config that its class has by default."""
    try:
        return _inspect_named(name, name, demands)
    except PatchModelError as error:
        return Inspection(name, None, why_none=error.problems[0])


def _inspect_named(name: str, model_type: str, demands: Demands) -> Inspection:
    try:
        return inspect_config(name, _default(name, model_type), None, demands)
    except PatchModelError:
        raise
    except Exception as error:
        # Classes fail in their own ways.
        raise InputError(
            "it could not be looked at by its default config",
            where=f"MODEL: {name}",
            found=f"{type(error).__name__}: {cause_of(error)}",
            remedy=WITH_CONFIG,
        ) from error


def _find(model: str, *, trust_remote_code: bool) -> tuple[Any, CheckpointFolder | None]:
    try:
        found = locate(model, recipe_folder=Path.cwd(), where="MODEL")
        if isinstance(found, Path) and not (found / "config.json").is_file():
            require_checkpoint(found, "MODEL")
    except InputError as error:
        raise (error.with_remedy(WHAT_MODEL) if error.code == InputError.default_code else error) from None
    if not isinstance(found, Path):
        folder = _fetched(*found, code=trust_remote_code)
        return read_config(folder, trust_remote_code=trust_remote_code), None
    config = read_config(found, trust_remote_code=trust_remote_code)
    try:
        return config, CheckpointFolder(found)
    except InputError:
        # A folder with a config.json and no weights can be looked at as well.
        return config, None


def _fetched(name: str, revision: str | None, *, code: bool) -> Path:
    try:
        return fetch_config(name, revision, code=code)
    except (InputError, OutsideError) as error:
        if "/" in name:
            raise
        # It may have been meant as an architecture.
        near = near_types(name)
        meant = f"or give an architecture: {', '.join(near)}" if near else (
            "architectures have other names: patch-model inspect --all lists them"
        )  # fmt: skip
        problem = error.problems[0]
        remedy = f"{problem.remedy}; {meant}" if problem.remedy else meant
        raise error.with_remedy(remedy) from None


def _default(model: str, model_type: str) -> Any:
    where = f"MODEL: {model}"
    if model_type in excluded():
        raise InputError(
            "this architecture has no decoder that could be steered",
            where=where,
            found=excluded()[model_type],
            remedy=SEE_ALL,
        )
    if model_type not in config_types():
        raise InputError(f"the installed transformers has no `{model_type}`", where=where, remedy=SEE_ALL)
    if model_type not in text_models() and model_type not in multimodal_models():
        whole = wrappers_of(model_type)
        raise InputError(
            "this architecture is not a text causal LM, nor a multimodal one",
            where=where,
            found=f"it is a part of {', '.join(whole)}" if whole else f"no language model is a `{model_type}`",
            remedy=f"patch-model inspect {whole[0]}" if whole else SEE_ALL,
        )
    return default_config(model_type)


def _only_fitted(architecture: Architecture, plan: Plan, *, forced: bool) -> Problem:
    message = f"{architecture.class_name} has no exact route for this edit, only the fitted `{plan.route}`"
    return Problem(
        f"the route `{plan.route}` is fitted, not exact" if forced else message,
        remedy="--no-exact shows it; in a recipe the line `exact: false` allows it, and what it is off by is measured",
    )
