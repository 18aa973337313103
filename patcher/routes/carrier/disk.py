"""How the tensors of an inserted block are called and shaped on disk, and what each of them holds."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from patcher.architectures.model_class import as_saved, submodule
from patcher.routes.carrier.fills import Fill, matches
from patcher.routes.carrier.insertion import CannotInsert
from patcher.routes.carrier.probe import Form
from patcher.routes.carrier.trial import InsertionTrial

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_MOST_EXPERTS = 4096


@dataclass(frozen=True)
class DiskTensor:
    """One tensor of the inserted block as it is stored.

    Attributes:
        name: what follows the block's index in its name.
        shape: on disk.
        parameter: the class's parameter that it becomes a part of, inside the block.
        index: which expert of that parameter, or None.
        fill: its content.
    """

    name: str
    shape: tuple[int, ...]
    parameter: str
    index: int | None
    fill: Fill


def disk_tensors(
    extended: nn.Module, blocks: str, place: int, trial: InsertionTrial, form: Form
) -> dict[str, DiskTensor]:
    """The inserted block as transformers would save it, by the part of the name after the block's index.

    Args:
        extended: the extended class on meta.
        blocks: path of the list of decoder blocks.
        place: index of the inserted block.
        trial: the stand-in with ``form``.
        form: the content.

    Raises:
        CannotInsert: the class stores the block in a way that is not understood.
    """
    contents = _contents(trial, form)
    found = {}
    prefix, stored = saved_block(extended, blocks, place)
    for name, tensor in stored.items():
        key = _NUMBER.sub("#", "." + name)
        if key not in contents:
            raise CannotInsert(f"it is not known what `{prefix}{place}.{name}` holds")
        parameter, per_expert, fill = contents[key]
        numbers = _NUMBER.findall("." + name)
        index = int(numbers[-1]) if per_expert and numbers else None
        found[name] = DiskTensor(name, tuple(tensor.shape), parameter, index, fill)
    return found


def class_tensors(extended: nn.Module, blocks: str, place: int, form: Form) -> dict[str, DiskTensor]:
    """The same in the class's own form, in which some checkpoints are stored."""
    block = submodule(extended, f"{blocks}.{place}")
    return {
        name: DiskTensor(name, tuple(tensor.shape), name, None, form.fills.get(name, Fill("zeros")))
        for name, tensor in block.state_dict().items()
    }


def saved_block(
    model: nn.Module, blocks: str, place: int, contents: Mapping[str, torch.Tensor] | None = None
) -> tuple[str, dict[str, torch.Tensor]]:
    """A block as transformers saves it: what comes before its index in the names on disk, and tensors by what follows.

    Args:
        model: the class, on any device.
        place: index of the block.
        contents: of its parameters; by default what they hold.
    """
    state = submodule(model, f"{blocks}.{place}").state_dict() if contents is None else contents
    own = {f"{blocks}.{place}.{name}": tensor for name, tensor in state.items()}
    named = as_saved(model, own) or own
    marker = f".{place}."
    prefixes = {name[: name.find(marker) + 1] for name in named}
    if len(prefixes) != 1 or not all(marker in name for name in named):
        raise CannotInsert("the names of a block's tensors on disk have no common form")
    prefix = prefixes.pop()
    start = len(prefix) + len(marker) - 1
    return prefix, {name[start:]: tensor for name, tensor in named.items()}


def _contents(trial: InsertionTrial, form: Form) -> dict[str, tuple[str, bool, Fill]]:
    """Name on disk with # for numbers -> the class's parameter, whether it is one of several experts, the content."""
    trial.set(form.fills, trial.vector)
    state = {name: tensor.detach().clone() for name, tensor in trial.block.state_dict().items()}
    names = list(state)
    tags = {}
    for number, name in enumerate(names, 1):
        tags[name] = torch.full(state[name].shape, float(number * _MOST_EXPERTS))
        if state[name].ndim == 3:
            tags[name] += torch.arange(state[name].shape[0]).view(-1, 1, 1)
    _, stored = saved_block(trial.model, trial.blocks, trial.place, state)
    _, tagged = saved_block(trial.model, trial.blocks, trial.place, tags)
    found: dict[str, tuple[str, bool, Fill]] = {}
    for name, tensor in stored.items():
        tag = tagged[name].flatten()[0].item()
        parameter = names[int(tag) // _MOST_EXPERTS - 1]
        per_expert = state[parameter].ndim == 3 and tensor.ndim == 2
        fill: Fill | None = form.fills.get(parameter, Fill("zeros"))
        if fill is not None and fill.kind != "copied":
            fill = matches(tensor, trial.hidden, [fill], trial.vector) if tensor.is_floating_point() else Fill("copied")
        if fill is None:
            raise CannotInsert(f"what `{name}` holds on disk is not what `{parameter}` holds in the class")
        key = _NUMBER.sub("#", "." + name)
        if found.setdefault(key, (parameter, per_expert, fill)) != (parameter, per_expert, fill):
            raise CannotInsert(f"experts hold different contents (`{name}`)")
    return found
