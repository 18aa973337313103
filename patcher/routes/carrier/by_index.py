"""What a multimodal class adds between its decoder's blocks by their index, and how it follows an inserted block.

DeepStack (arXiv 2406.04334) takes features of an image behind several blocks of the vision tower, and adds the i-th
behind the i-th block of the decoder. An inserted block would shift them: text is right then, and images are wrong. The
tower can make one more feature, in its place, by a merger of zeros: zero is added behind the inserted block, and every
feature is added behind the block that it was added behind.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import nn

from patcher.architectures.analysis import Architecture
from patcher.architectures.decoder import TEXT_KEY, decoder_config
from patcher.architectures.model_class import on_meta
from patcher.architectures.shrink import shrink_config
from patcher.architectures.stand_in import FAILURES, RandomStandIn
from patcher.checkpoint.folder import CheckpointFolder
from patcher.checkpoint.safetensors_file import FLOATS
from patcher.routes.carrier.insertion import Insertion
from patcher.routes.plan import NotApplicable, TensorWrite

_FEATURES = re.compile(r"\b(list|dict\[int,)\s*\[?\s*torch\.\w*Tensor")


@dataclass(frozen=True)
class Features:
    """Where a class states how many features it adds.

    Attributes:
        key: of config.json, such as ``vision_config.deepstack_visual_indexes``.
        indexes: the blocks of the tower that they are taken behind, ascending.
        modules: path of the list of modules that make them, in the order of the list of indexes.
        leaves: the parameters of one such module, with their shapes.
    """

    key: str
    indexes: tuple[int, ...]
    modules: str
    leaves: Mapping[str, tuple[int, ...]]


def feature_changes(
    architecture: Architecture, insertion: Insertion, checkpoint: CheckpointFolder | None
) -> tuple[dict[str, Any], list[TensorWrite]]:
    """The config key and the tensors of zeros that keep every feature behind its block; nothing where none moves.

    Raises:
        NotApplicable: features would move, and the class has no way to state where they go.
    """
    argument = added_by_index(architecture)
    if argument is None:
        return {}, []
    told = f"the class adds features of an image behind its blocks by their index (`{argument}`)"
    features = find_features(architecture)
    if features is None:
        raise NotApplicable(f"{told}, and where it states how many is not known: an inserted block would shift them")
    places = [insertion.moved(number) for number in range(len(features.indexes))]
    if places == list(range(len(places))):
        return {}, []
    zeros = _indexes_of_zeros(features.indexes, places)
    if zeros is None:
        raise NotApplicable(
            f"{told}, and none of `{features.key}` = {list(features.indexes)} can come between two that follow each "
            f"other: insert behind block {len(places) - 1} or a later one, where nothing moves"
        )
    writes = [
        write
        for number in range(len(places), len(places) + len(zeros))
        for write in _zeros(features, number, checkpoint)
    ]
    return {features.key: [*features.indexes, *zeros]}, writes


def _indexes_of_zeros(indexes: Sequence[int], places: Sequence[int]) -> list[int] | None:
    """Blocks of the tower that nothing is taken behind, as many between two that are as places are free there."""
    found: list[int] = []
    for before, after in itertools.pairwise([(-1, -1), *zip(indexes, places, strict=True)]):
        free, wanted = range(before[0] + 1, after[0]), after[1] - before[1] - 1
        if len(free) < wanted:
            return None
        found += free[:wanted]
    return found


def _zeros(features: Features, number: int, checkpoint: CheckpointFolder | None) -> list[TensorWrite]:
    """One module more, whose output is zero. The checkpoint's names are those of the module before."""
    writes = []
    for leaf, shape in features.leaves.items():
        parameter, like = (f"{features.modules}.{index}.{leaf}" for index in (number, 0))
        name, dtype = parameter, "F32"
        if checkpoint is not None:
            short = ".".join(like.split(".")[-(2 + leaf.count(".") + 1) :])
            stored = [info for key, info in checkpoint.tensors.items() if f".{key}".endswith(f".{short}")]
            if len(stored) != 1 or stored[0].dtype not in FLOATS:
                raise NotApplicable(f"the checkpoint does not store one `{short}` of floating point numbers")
            name = f"{stored[0].name.removesuffix(f'0.{leaf}')}{number}.{leaf}"
            shape, dtype = stored[0].shape, stored[0].dtype
        writes.append(TensorWrite.beside(name, parameter, shape, dtype))
    return writes


def added_by_index(architecture: Architecture) -> str | None:
    """The decoder's argument whose parts are added to the residual stream behind the blocks of their index, or None.

    Its annotation says that it is a list of tensors, or one by index; a stand-in's decoder says whether the residual
    stream gains them. One that does not run is taken to.
    """
    if not architecture.wraps:
        return None

    def look() -> str:
        tiny, _ = shrink_config(architecture.config, 0)
        meta = on_meta(tiny, trust_remote_code=architecture.trust_remote_code)
        path = architecture.blocks.rpartition(".")[0]
        arguments = signature(type(meta.get_submodule(path)).forward).parameters
        for name, argument in arguments.items():
            if _FEATURES.search(str(argument.annotation)):
                stand_in = RandomStandIn.of(tiny, trust_remote_code=architecture.trust_remote_code)
                if _is_added(stand_in, path, architecture.blocks, name, list(arguments)):
                    return name
        return ""

    return architecture.once(("added by index",), look, str) or None


def _is_added(stand_in: RandomStandIn, path: str, blocks: str, name: str, arguments: Sequence[str]) -> bool:
    model: Any = stand_in.model
    decoder, block_list = model.get_submodule(path), model.get_submodule(blocks)
    width = int(model.get_input_embeddings().weight.shape[1])
    embeds = stand_in.random(1, 6, width)
    mask = torch.zeros(1, 6, dtype=torch.bool)
    mask[:, 2:4] = True
    features = {index: stand_in.random(2, width) for index in range(len(block_list))}
    masks = [argument for argument in arguments if "mask" in argument and argument != "attention_mask"]
    ran = False
    for value, places in itertools.product(
        (list(features.values()), features), (mask, mask[..., None].expand(1, 6, width))
    ):
        given: dict[str, Any] = {"inputs_embeds": embeds, "use_cache": False, name: value}
        try:
            moved = _moved_between(decoder, block_list, {**given, **dict.fromkeys(masks, places)})
        except FAILURES:
            continue
        ran = True
        if moved:
            return True
    return not ran


def _moved_between(decoder: Callable[..., Any], blocks: Any, given: Mapping[str, Any]) -> bool:
    """Whether a block takes in something else than the one before gave."""
    seen: list[torch.Tensor] = []

    def enter(_module: Any, inputs: Any, keywords: Mapping[str, Any]) -> None:
        seen.append((inputs[0] if inputs else keywords["hidden_states"]).detach().clone())

    def leave(_module: Any, _inputs: Any, output: Any) -> None:
        seen.append((output if isinstance(output, torch.Tensor) else output[0]).detach().clone())

    handles = [block.register_forward_pre_hook(enter, with_kwargs=True) for block in blocks]
    handles += [block.register_forward_hook(leave) for block in blocks]
    try:
        with torch.no_grad():
            decoder(**given)
    finally:
        for handle in handles:
            handle.remove()
    return any(not torch.equal(gave, took) for gave, took in zip(seen[1::2], seen[2::2], strict=False))


def find_features(architecture: Architecture) -> Features | None:
    """The list in the wrapper's config that makes the class build one module more for one entry more; None if none."""
    whole = architecture.checkpoint_config
    before = dict(architecture.parameters)
    found = []
    for part_name, part in vars(whole).items():
        if part_name == TEXT_KEY or not hasattr(part, "to_dict"):
            continue
        for key, value in vars(part).items():
            numbers = isinstance(value, (list, tuple)) and all(type(item) is int for item in value)
            if not numbers or not value or list(value) != sorted(set(value)):
                continue
            longer = copy.deepcopy(whole)
            setattr(getattr(longer, part_name), key, [*value, value[-1] + 1])
            try:
                names = _parameters(on_meta(decoder_config(longer), trust_remote_code=architecture.trust_remote_code))
            except FAILURES:
                continue
            new = {name: shape for name, shape in names.items() if name not in before}
            module = _one_module(new, len(value))
            if module is not None:
                leaves = {name.removeprefix(f"{module}.{len(value)}."): shape for name, shape in new.items()}
                found.append(Features(f"{part_name}.{key}", tuple(value), module, leaves))
    return found[0] if len(found) == 1 else None


def _parameters(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _one_module(names: Mapping[str, Any], number: int) -> str | None:
    """The list in which all these parameters are those of module ``number``."""
    lists = {name.partition(f".{number}.")[0] for name in names if f".{number}." in name}
    whole = all(f".{number}." in name for name in names)
    return lists.pop() if len(lists) == 1 and whole else None
