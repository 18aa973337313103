"""What is inserted for an edit: blocks, their content, and the config that creates them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from patcher.checkpoint.slices import SliceOrder
from patcher.routes.carrier.insertion import Insertion
from patcher.routes.carrier.probe import Form
from patcher.routes.carrier.trial import InsertionTrial


@dataclass(frozen=True)
class Block:
    """One inserted block.

    Attributes:
        form: its content; of a block that does nothing, one without a carrier.
        trial: the stand-in on which that was proven, made when it is asked for.
        key: what tells the proofs of this stand-in from those of others.
        template: the base's block whose type it has.
    """

    form: Form
    trial: Callable[[], InsertionTrial]
    key: Hashable
    template: int


@dataclass(frozen=True)
class Choice:
    """What is inserted.

    Attributes:
        insertion: the extended config, with the flags.
        forms: layer -> the content of the block after it that holds the vector.
        blocks: place in the copy -> the block that is inserted there.
        flags: config keys that the contents need.
        base: the base's class on meta.
        extended: the extended class on meta, with the flags.
        grown: see :func:`patcher.routes.carrier.grown.grown_tensors`.
    """

    insertion: Insertion
    forms: Mapping[int, Form]
    blocks: Mapping[int, Block]
    flags: Mapping[str, Any]
    base: nn.Module
    extended: nn.Module
    grown: Mapping[str, SliceOrder]
