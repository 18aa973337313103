"""What blocks are called on disk, and the inserted ones' tensors there: their names, shapes and contents."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from patcher.architectures.analysis import Architecture
from patcher.architectures.model_class import as_saved, submodule
from patcher.checkpoint.folder import CheckpointFolder
from patcher.checkpoint.safetensors_file import TensorInfo
from patcher.routes.carrier.choice import Choice
from patcher.routes.carrier.fills import Fill, all_match
from patcher.routes.carrier.insertion import CannotInsert
from patcher.routes.carrier.probe import Form
from patcher.routes.carrier.trial import InsertionTrial
from patcher.routes.disk_names import stored_tensors
from patcher.routes.plan import NotApplicable

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


def disk_tensors(architecture: Architecture, choice: Choice, place: int) -> dict[str, DiskTensor]:
    """The block that is inserted at ``place`` as transformers would save it, by what follows its index in the name.

    Raises:
        CannotInsert: the class stores the block in a way that is not understood.
    """
    block, blocks, extended = choice.blocks[place], architecture.blocks, choice.extended
    kind = dict[str, tuple[str, bool, Fill]]
    known = ("carrier contents", block.key, repr(block.form))
    contents = architecture.once(known, lambda: _contents(block.trial(), block.form), kind)
    found = {}
    prefix, stored = saved_block(extended, blocks, place)
    for name, tensor in stored.items():
        key = next((key for key in _keys(name) if key in contents), None)
        if key is None:
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


def _keys(name: str) -> list[str]:
    """A name on disk as it is and, where it holds a number, with # for the last one."""
    numbered = re.sub(r"(?<=\.)\d+(?=\.)(?!.*\.\d+\.)", "#", "." + name)
    return list(dict.fromkeys(["." + name, numbered]))


def _contents(trial: InsertionTrial, form: Form) -> dict[str, tuple[str, bool, Fill]]:
    """Name on disk, with # for an expert's number -> the class's parameter, whether it is an expert's, the content."""
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
    parts: dict[str, dict[str, dict[int | None, torch.Tensor]]] = {}
    for name, tensor in stored.items():
        tag = int(tagged[name].flatten()[0].item())
        parameter = names[tag // _MOST_EXPERTS - 1]
        expert = tag % _MOST_EXPERTS if state[parameter].ndim == 3 and tensor.ndim == 2 else None
        key = _keys(name)[0 if expert is None else -1]
        parts.setdefault(key, {}).setdefault(parameter, {})[expert] = tensor
    found: dict[str, tuple[str, bool, Fill]] = {}
    for key, of in parts.items():
        (parameter, tensors), *others = of.items()
        if others:
            raise CannotInsert(f"`{key}` is made of `{parameter}` and of `{others[0][0]}`")
        fill: Fill | None = form.fills.get(parameter, Fill("zeros"))
        if fill is not None and fill.kind != "copied":
            floating = all(tensor.is_floating_point() for tensor in tensors.values())
            fill = all_match(tensors, trial.hidden, fill, trial.vector) if floating else Fill("copied")
        if fill is None:
            raise CannotInsert(f"what `{key}` holds on disk is not what `{parameter}` holds in the class")
        found[key] = parameter, None not in tensors, fill
    return found


class CarrierNames:
    """Names on disk: the base's blocks as this checkpoint calls them, or as the class would save them."""

    def __init__(self, architecture: Architecture, choice: Choice, checkpoint: CheckpointFolder | None) -> None:
        self.architecture, self.choice = architecture, choice
        self.stored = stored_tensors(checkpoint)
        self.saved = saved_block(choice.base, architecture.blocks, 0)[0]
        self.prefix = self._prefix()
        self.raw = self._blocks()
        self.blocks = {block: self._plain(stored) for block, stored in self.raw.items()}

    def _prefix(self) -> str:
        bare = self.architecture.base_prefix + "."
        found = []
        for prefix in dict.fromkeys((self.saved, self.architecture.blocks + ".")):
            found += [prefix, prefix.removeprefix(bare), bare + prefix]
        if self.stored is None:
            return self.saved
        for prefix in found:
            if any(name.startswith(f"{prefix}0.") for name in self.stored):
                return prefix
        raise NotApplicable("the checkpoint stores its blocks under names that the class does not know")

    def _blocks(self) -> dict[int, dict[str, TensorInfo | None]]:
        """Index -> name after it -> what is stored there."""
        found: dict[int, dict[str, TensorInfo | None]] = {}
        if self.stored is None:
            for block in range(self.choice.insertion.count):
                found[block] = dict.fromkeys(saved_block(self.choice.base, self.architecture.blocks, block)[1])
            return found
        for name, info in self.stored.items():
            index, _, rest = name.removeprefix(self.prefix).partition(".")
            if name.startswith(self.prefix) and index.isdigit():
                found.setdefault(int(index), {})[rest] = info
        return found

    def _plain(self, stored: Mapping[str, TensorInfo | None]) -> dict[str, TensorInfo | None]:
        """A block's tensors as the class calls them: of a quantised weight nothing is known but its name."""
        quantisation = self.architecture.quantisation
        if quantisation is None or self.stored is None:
            return dict(stored)
        weights = quantisation.quantised_weights(stored)
        parts = {part for parts in weights.values() for part in parts}
        return {name: info for name, info in stored.items() if name not in parts} | dict.fromkeys(weights)

    def moved(self) -> tuple[dict[str, str], frozenset[str]]:
        """Names that change, and names of draft blocks, which are left out."""
        insertion = self.choice.insertion
        stored = [(block, f"{self.prefix}{block}.{rest}") for block, rests in self.raw.items() for rest in rests]
        drafts = frozenset(name for block, name in stored if block >= insertion.count)
        copied = {name: insertion.moved_name(name, self.prefix) for _, name in stored if name not in drafts}
        return {name: new for name, new in copied.items() if name != new}, drafts

    def in_copy(self, saved_name: str) -> str:
        """A name under which the class saves a tensor, in this checkpoint's spelling."""
        if saved_name.startswith(self.saved):
            return self.prefix + saved_name.removeprefix(self.saved)
        return saved_name
