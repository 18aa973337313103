"""The rows of data: for each model type, what an analysis of the installed class cannot see.

That is which stacks read it, and which of several biases takes the vector by which flags and factors. Which classes
there are, and where their blocks are, is seen (:mod:`patcher.architectures.installed`, :mod:`.class_listing`): most
types need no row. A row is a lead, never a proof. What it names must exist in the instantiated class, and the probe
must find that the slot shifts the residual stream as the row says (:mod:`patcher.architectures.analysis`).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from patcher.architectures.config_keys import stated
from patcher.stacks.names import STACKS, TRANSFORMERS, TRANSFORMERS_ALONE, Support


@dataclass(frozen=True)
class ModelTypeRow:
    """What is known of a model type.

    Attributes:
        loads: which stacks load this architecture at all.
        blocks: path of the list of modules that give the residual stream, where it is not that of the blocks.
        slots: parameters inside a block that may take the vector, first match wins ([hidden] or [experts, hidden]).
            None are stated of classes without such a bias, and of those that are only analysed at run time.
        flags: config keys that create the slots where they are not there.
        also: config keys that another stack reads for the same thing.
        scale: config key -> power; their product is the residual gain per unit of the slot.
        stacks: which stacks read the slot; what is not stated is not read.
        patterns: how stacks know the type of a block, as it was run: ``listed`` by the config, or computed from the
            block's index, in a pattern of so many blocks.
        depths: numbers of blocks by which a stack tells releases that it computes in a way of their own.
        block_flags: config key that creates a bias in every block -> the stacks that were seen to read an inserted
            block which needs it; what is not stated is not read.
    """

    loads: Mapping[str, Support]
    blocks: str | None = None
    slots: tuple[str, ...] = ()
    flags: Mapping[str, Any] = field(default_factory=dict)
    also: Mapping[str, Any] = field(default_factory=dict)
    scale: Mapping[str, float] = field(default_factory=dict)
    stacks: Mapping[str, Support] = field(default_factory=dict)
    patterns: Mapping[str, int | str] = field(default_factory=dict)
    depths: Mapping[str, Sequence[int]] = field(default_factory=dict)
    block_flags: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def factor(self, config: Any) -> float:
        """Residual gain per unit of the slot under ``config``, as the row states it."""
        product = 1.0
        for key, power in self.scale.items():
            name, _, index = key.partition(".")
            value = stated(config, name)
            product *= float(value[int(index)] if index else value) ** power
        return product


@functools.cache
def rows() -> Mapping[str, ModelTypeRow]:
    """All rows, by transformers' ``model_type``."""
    text = Path(__file__).with_name("rows.json").read_text(encoding="utf-8")
    return {
        name: ModelTypeRow(
            loads={TRANSFORMERS: "native", **row["loads"]},
            blocks=row.get("blocks"),
            slots=tuple(row.get("slots", ())),
            flags=row.get("flags", {}),
            also=row.get("also", {}),
            scale=row.get("scale", {}),
            stacks={**TRANSFORMERS_ALONE, **row.get("stacks", {})},
            patterns=row.get("patterns", {}),
            depths=row.get("depths", {}),
            block_flags={key: tuple(stacks) for key, stacks in row.get("block_flags", {}).items()},
        )
        for name, row in json.loads(text).items()
    }


@functools.cache
def rows_inside() -> Mapping[str, Mapping[str, ModelTypeRow]]:
    """The rows of decoders inside a multimodal wrapper, by the wrapper's ``model_type`` and the decoder's.

    A stack is there only where it was run on the wrapper with that decoder in it. Of a slot it is as well the stack of
    the decoder's own row, and what else is known of the decoder holds inside too, unless the row says otherwise.
    """
    text = Path(__file__).with_name("wrappers.json").read_text(encoding="utf-8")
    return {
        wrapper: {name: _inside(rows().get(name), row) for name, row in inner.items()}
        for wrapper, inner in json.loads(text).items()
    }


def _inside(alone: ModelTypeRow | None, row: Mapping[str, Any]) -> ModelTypeRow:
    loads: dict[str, Support] = {**TRANSFORMERS_ALONE, **row["loads"]}
    alone = ModelTypeRow(loads) if alone is None else alone
    both = {stack for stack in STACKS if loads[stack] == alone.stacks.get(stack) == "native"}
    flags = {key: tuple(stacks) for key, stacks in row.get("block_flags", alone.block_flags).items()}
    return replace(
        alone,
        loads=loads,
        stacks={stack: "native" if stack in both else "no" for stack in STACKS},
        patterns=row.get("patterns", alone.patterns),
        depths=row.get("depths", alone.depths),
        block_flags=flags,
    )


def row_inside(wrapper: str, model_type: str) -> ModelTypeRow | None:
    """What is known of a decoder inside of a wrapper; one that no other stack was run on is read by transformers."""
    alone = rows().get(model_type)
    inside = rows_inside().get(wrapper, {}).get(model_type)
    if inside is not None or alone is None:
        return inside
    return replace(alone, loads=TRANSFORMERS_ALONE, stacks=TRANSFORMERS_ALONE)


@functools.cache
def excluded() -> Mapping[str, str]:
    """Model types that transformers maps to a language model and that are no decoder to be steered: why, in words."""
    reasons: dict[str, str] = json.loads(Path(__file__).with_name("excluded.json").read_text(encoding="utf-8"))
    return reasons
