"""The rows of relabels.json: for each model type, which other classes may compute the same, and how to get there.

A row is a lead, never a proof (:mod:`patcher.routes.relabel.proof`).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from patcher.architectures.analysis import Architecture
from patcher.architectures.decoder import taken_out


@dataclass(frozen=True)
class Candidate:
    """A row of relabels.json: one target class for one source.

    Attributes:
        to: the target's model type.
        guards: names of :data:`patcher.routes.relabel.guards.GUARDS`, all of which must hold.
        config: target field -> rule; see :func:`patcher.routes.relabel.config.target_config`.
        tensors: target pattern -> rule; see :func:`patcher.routes.relabel.tensors.derivations`.
        residual: how the target's residual stream compares with the source's.
        stacks: rules for the stacks that read the target, or tokenise for it, in a way of their own.
    """

    to: str
    guards: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    residual: Literal["same", "centred"] = "same"
    stacks: tuple[Mapping[str, Any], ...] = ()


@functools.cache
def candidates() -> Mapping[str, tuple[Candidate, ...]]:
    """The rows of relabels.json, by the source's model type."""
    data = json.loads(Path(__file__).with_name("relabels.json").read_text(encoding="utf-8"))
    return {source: tuple(_candidate(row, data) for row in found) for source, found in data["sources"].items()}


def in_wrapper(row: Candidate, architecture: Architecture) -> Candidate:
    """The row for a decoder inside a multimodal wrapper, whose parameters have other names; else the row itself."""
    if not architecture.wraps:
        return row
    text_model = Architecture(taken_out(architecture.config))
    alone, inside = (blocks.rpartition(".")[0] + "." for blocks in (text_model.blocks, architecture.blocks))

    def moved(name: str) -> str:
        return inside + name.removeprefix(alone) if name.startswith(alone) else name

    def rule(stated: Mapping[str, Any]) -> Mapping[str, Any]:
        return {**stated, "from": moved(stated["from"])} if "from" in stated else stated

    return replace(row, tensors={moved(name): rule(stated) for name, stated in row.tensors.items()})


def _candidate(row: Mapping[str, Any], data: Mapping[str, Any]) -> Candidate:
    target = data["targets"][row["to"]]
    return Candidate(
        to=row["to"],
        guards=tuple(row.get("guards", ())),
        config={**target["config"], **row.get("config", {})},
        tensors={key: rule for name in row.get("tensors", ()) for key, rule in data["tensors"][name].items()},
        residual=row.get("residual", "same"),
        stacks=(*target.get("stacks", ()), *row.get("stacks", ())),
    )
