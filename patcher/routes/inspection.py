"""What a model's architecture offers: every route, its cost, who reads it, what it would write, and why not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from patcher.architectures.analysis import Architecture
from patcher.architectures.default_configs import default_config
from patcher.architectures.model_class import causal_lm_class
from patcher.architectures.registry import excluded, rows
from patcher.checkpoint.folder import CheckpointFolder
from patcher.checkpoint.prepare import read_config
from patcher.checkpoint.source import fetch_config, locate
from patcher.errors import InputError, PatchModelError
from patcher.routes.plan import Plan
from patcher.routes.planner import ROUTES, STACKS, Finding, Prefer, choose_route, survey

NO_STACK = dict.fromkeys(STACKS, "no")


@dataclass(frozen=True)
class Inspection:
    """The routes of one architecture for an edit of ``layers``.

    Attributes:
        model: what was asked for.
        architecture: its class; None where even that could not be looked at.
        layers: 0-based block indices; -1 is the embedding.
        findings: every route.
        chosen: the plan that a build would take.
        why_none: if none is chosen, why.
    """

    model: str
    architecture: Architecture | None
    layers: tuple[int, ...] = ()
    findings: tuple[Finding, ...] = ()
    chosen: Plan | None = None
    why_none: str = ""

    def as_json(self) -> dict[str, Any]:
        looked_at = self.architecture
        return {
            "model": self.model,
            "architecture": None if looked_at is None else looked_at.class_name,
            "model_type": None if looked_at is None else looked_at.model_type,
            "blocks": None if looked_at is None else looked_at.block_count,
            "layers": list(self.layers),
            "routes": [_route(finding) for finding in self.findings],
            "chosen": None if self.chosen is None else self.chosen.route,
            "plan": None if self.chosen is None else self.chosen.as_json(),
            "why_none": self.why_none or None,
        }


@dataclass(frozen=True)
class Asked:
    """What the routes are held to; see :func:`patcher.routes.planner.choose_route`."""

    layers: Sequence[int] = ()
    targets: Sequence[str] | str = "auto"
    exact: bool = True
    prefer: Prefer = "stacks"
    route: str = "auto"
    trust_remote_code: bool = False
    every_route: bool = field(default=True)


def inspect_model(model: str, asked: Asked) -> Inspection:
    """Look at a local folder, a Hub model (only its config.json is downloaded) or an architecture by its name.

    Raises:
        InputError, OutsideError: there is no such model, or its config makes no text causal LM.
    """
    config, checkpoint = _find(model, trust_remote_code=asked.trust_remote_code)
    return inspect_config(model, config, checkpoint, asked)


def inspect_config(model: str, config: Any, checkpoint: CheckpointFolder | None, asked: Asked) -> Inspection:
    """The same for a transformers config.

    Raises:
        InputError: it makes no text causal LM, or has no such layer.
    """
    architecture = Architecture(config, trust_remote_code=asked.trust_remote_code)
    layers = tuple(asked.layers) or (int(0.4 * architecture.block_count),)
    for layer in layers:
        if not -1 <= layer < architecture.block_count:
            raise InputError(
                f"{architecture.class_name} has {architecture.block_count} decoder blocks",
                where="--layer",
                found=layer,
                remedy=f"use 0 to {architecture.block_count - 1}, or -1 for the embedding",
            )
    findings = tuple(survey(architecture, layers, checkpoint)) if asked.every_route else ()
    chosen, why_none = None, ""
    try:
        chosen = choose_route(
            architecture,
            layers,
            checkpoint,
            targets=asked.targets,
            route=asked.route,
            exact=asked.exact,
            prefer=asked.prefer,
        )
    except InputError as error:
        why_none = str(error)
    return Inspection(model, architecture, layers, findings, chosen, why_none)


def inspect_all(asked: Asked, progress: Callable[[str], None]) -> Iterator[Inspection]:
    """Every text causal LM of the installed transformers, by the config that its class has by default."""
    names = [name for name in sorted(rows()) if causal_lm_class(name) is not None]
    for number, name in enumerate(names, 1):
        progress(f"{number} of {len(names)} architectures: {name}")
        try:
            yield inspect_config(name, default_config(name), None, asked)
        except PatchModelError as error:
            yield Inspection(name, None, why_none=str(error))


def _find(model: str, *, trust_remote_code: bool) -> tuple[Any, CheckpointFolder | None]:
    by_name = None if Path(model).is_dir() else _by_name(model)
    if by_name is not None:
        return by_name, None
    found = locate(model, recipe_folder=Path.cwd(), where="MODEL")
    if not isinstance(found, Path):
        return read_config(fetch_config(*found), trust_remote_code=trust_remote_code), None
    config = read_config(found, trust_remote_code=trust_remote_code)
    try:
        return config, CheckpointFolder(found)
    except InputError:
        # A folder with a config.json and no weights can be looked at as well.
        return config, None


def _by_name(name: str) -> Any:
    if name in excluded():
        raise InputError(f"`{name}` is not a text causal LM of its own", where="MODEL", found=excluded()[name])
    by_class = {row.class_name: model_type for model_type, row in reversed(list(rows().items()))}
    model_type = name if name in rows() else by_class.get(name)
    if model_type is None:
        return None
    if causal_lm_class(model_type) is None:
        raise InputError(
            f"the installed transformers has no `{model_type}`", where="MODEL", remedy="upgrade transformers"
        )
    return default_config(model_type)


def _route(finding: Finding) -> dict[str, Any]:
    plan, route = finding.plan, ROUTES[finding.name]
    return {
        "name": finding.name,
        "exact": route.exact,
        "cost": route.cost if plan is None else plan.cost,
        "stacks": NO_STACK if plan is None else {**NO_STACK, **plan.stacks},
        "why_not": finding.why_not or None,
    }
