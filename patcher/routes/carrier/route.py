"""The carrier route: one more decoder block after each steered one, which adds the vector and nothing else.

The model type stays as it is, so whatever loads the architecture runs the copy, at the cost of one layer in L.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from patcher.architectures.analysis import Architecture
from patcher.architectures.model_class import saved_names
from patcher.architectures.streams import stream_count
from patcher.checkpoint.folder import CheckpointFolder
from patcher.checkpoint.safetensors_file import FLOATS, TensorInfo
from patcher.routes.carrier.by_index import feature_changes
from patcher.routes.carrier.choice import Choice
from patcher.routes.carrier.config import config_changes, moved_quantisation
from patcher.routes.carrier.disk import CarrierNames, DiskTensor, class_tensors, disk_tensors, saved_block
from patcher.routes.carrier.fills import content
from patcher.routes.carrier.grown import grown_on_disk
from patcher.routes.carrier.insertion import DRAFT_COUNT, QUANTISED, CannotInsert, MovesOthers
from patcher.routes.carrier.probe import Form
from patcher.routes.carrier.readers import blocks_of_pattern, readers_of_pattern, stacks_of_insertion
from patcher.routes.carrier.search import choose_insertion, length_of_pattern
from patcher.routes.carrier.twins import BOUND, TWIN, choose_twins
from patcher.routes.plan import ConstantError, NotApplicable, Plan, Reader, TensorWrite, refuse_embedding
from patcher.routes.route import Route

NAME = "carrier"
_DERIVED = ("inv_freq", "masked_bias", ".attn.bias", ".attention.bias")
"""Buffers that old checkpoints store and classes compute."""


def plan(
    architecture: Architecture,
    layers: Sequence[int],
    checkpoint: CheckpointFolder | None,
    *,
    lossless: bool = False,
) -> Plan:
    """Plan the inserted blocks: their tensors, the others' new indices, and the config.

    It is one a layer. Where transformers' own class would then compute other types for later blocks, it is as many as
    their pattern is long.

    Args:
        lossless: only with a constant that is exact however small the residual stream is.

    Raises:
        NotApplicable: no block can be inserted here, or none that adds a constant.
    """
    try:
        return _alone_or_in_pattern(architecture, layers, checkpoint, lossless=lossless)
    except NotApplicable as finding:
        refuse_embedding(layers, "; a block is inserted after another one")
        try:
            choice = choose_twins(architecture, layers)
        except CannotInsert:
            raise finding from None
        planned = _planned(architecture, choice, checkpoint, 2)
        return replace(planned, warnings=(*planned.warnings, BOUND))


def _alone_or_in_pattern(
    architecture: Architecture, layers: Sequence[int], checkpoint: CheckpointFolder | None, *, lossless: bool
) -> Plan:
    try:
        return _plan(architecture, layers, checkpoint, 1, lossless=lossless)
    except MovesOthers as finding:
        number = length_of_pattern(architecture)
        if number is None or number == 1:
            raise
        try:
            return _plan(architecture, layers, checkpoint, number, lossless=lossless)
        except NotApplicable as other:
            raise NotApplicable(f"{finding}; with {number} blocks: {other}") from None


def plan_pattern(architecture: Architecture, layers: Sequence[int], checkpoint: CheckpointFolder | None) -> Plan | None:
    """The same for stacks that compute a block's type from its index: with as many blocks as their pattern is long.

    Returns:
        None where no such stack is known.

    Raises:
        NotApplicable: as above.
    """
    number = blocks_of_pattern(architecture)
    return None if number is None else _plan(architecture, layers, checkpoint, number)


def _plan(
    architecture: Architecture,
    layers: Sequence[int],
    checkpoint: CheckpointFolder | None,
    number: int,
    *,
    lossless: bool = False,
) -> Plan:
    refuse_embedding(layers, "; a block is inserted after another one")
    choice = choose_insertion(architecture, layers, number=number, lossless=lossless)
    return _planned(architecture, choice, checkpoint, number)


def _planned(architecture: Architecture, choice: Choice, checkpoint: CheckpointFolder | None, number: int) -> Plan:
    insertion, blocks = choice.insertion, architecture.blocks
    names = CarrierNames(architecture, choice, checkpoint)
    tensors: list[TensorWrite] = []
    sites = {}
    for layer, places in insertion.inserted.items():
        sites[layer] = f"{blocks}.{insertion.copy_layers[layer]}.{choice.forms[layer].carrier}".rpartition(".")[0]
        for place in places:
            tensors += _block_tensors(architecture, choice, names, layer, place)
    tensors += _flag_tensors(architecture, choice, names)
    renamed, dropped = names.moved()
    changes = config_changes(architecture, choice, checkpoint)
    features, zeros = feature_changes(architecture, insertion, checkpoint)
    changes, tensors = {**changes, **features}, [*tensors, *zeros]
    quantisation = architecture.quantisation
    if quantisation is not None:
        changes[QUANTISED] = moved_quantisation(architecture, choice, names, checkpoint, tensors)
    warnings = [
        "LoRA adapters made for the base address blocks by index: from block "
        f"{min(insertion.layers) + 1} on they hit the wrong one",
    ]
    counting = readers_of_pattern(architecture)
    if number == 1 and counting is not None:
        warnings.append(
            f"the types of blocks are computed from their places by {' and '.join(counting[1])}, which computes "
            "another function of this copy, without an error"
        )
    if changes.get(DRAFT_COUNT) == 0 and dropped:
        warnings.append("blocks that draft further tokens are left out")
    new = len(choice.blocks)
    if quantisation is not None:
        warnings.append(
            f"the inserted {'block is' if new == 1 else 'blocks are'} not quantised, and quantization_config says so: "
            f"of {quantisation.method}, such a copy is checked in transformers alone"
        )
    more = "one more layer" if new == 1 else f"{new} more layers"
    return Plan(
        route=NAME,
        architecture=architecture.class_name,
        blocks=blocks,
        sites=sites,
        tensors=tuple(tensors),
        stacks=stacks_of_insertion(architecture, choice, changes),
        reason=_reason(choice),
        cost=f"{more} in {insertion.count} and {'its' if new == 1 else 'their'} KV cache",
        config_changes=changes,
        dropped=dropped,
        renamed=renamed,
        grown=grown_on_disk(architecture, choice.grown, checkpoint),
        copy_layers=insertion.copy_layers,
        inserted=insertion.inserted,
        warnings=tuple(warnings),
        streams=stream_count(architecture),
        constant=ConstantError.of({layer: form.loss for layer, form in choice.forms.items()}),
    )


def _block_tensors(
    architecture: Architecture, choice: Choice, names: CarrierNames, layer: int, place: int
) -> list[TensorWrite]:
    blocks, form, template = architecture.blocks, choice.blocks[place].form, choice.blocks[place].template
    beside = names.blocks.get(template, {})
    split = disk_tensors(architecture, choice, place)
    fused = class_tensors(choice.extended, blocks, place, form)
    wanted = []
    for tensor in split.values():
        whole = fused[tensor.parameter]
        if tensor.name not in beside and whole.name in beside:
            if whole not in wanted:
                wanted.append(whole)
        else:
            wanted.append(tensor)
    _require_understood(architecture, choice, names, template, {tensor.name for tensor in wanted})
    here, there = f"{names.prefix}{place}.", f"{names.prefix}{template}."
    return [_write(tensor, beside, architecture, choice, (layer, place), here, there) for tensor in wanted]


def _require_understood(
    architecture: Architecture, choice: Choice, names: CarrierNames, template: int, wanted: set[str]
) -> None:
    """Everything that the template stores must be known, and whatever the copies of its kind need must be there."""
    beside = names.blocks.get(template, {})
    _, own = saved_block(choice.base, architecture.blocks, template)
    known = wanted | own.keys()
    # Gemma 4's releases store keys and values of blocks that read another's.
    ignored = [re.compile(each) for each in getattr(choice.base, "_keys_to_ignore_on_load_unexpected", None) or ()]
    unknown = [
        name
        for name in beside
        if name not in known
        and not name.endswith(_DERIVED)
        and not any(each.search(f"{names.prefix}{template}.{name}") for each in ignored)
    ]
    if unknown:
        raise NotApplicable(f"the checkpoint stores `{names.prefix}{template}.{unknown[0]}`, which the class does not")
    lacking = [name for name in wanted if name in own and name not in beside]
    if lacking:
        raise NotApplicable(f"the checkpoint does not store `{names.prefix}{template}.{lacking[0]}`")


def _usual_dtype(beside: Mapping[str, TensorInfo | None]) -> str:
    known = [info for info in beside.values() if info is not None and info.dtype in FLOATS]
    found = [info.dtype for info in sorted(known, key=lambda info: len(info.shape) < 2)]
    return found[0] if found else "F32"


def _write(
    tensor: DiskTensor,
    beside: Mapping[str, TensorInfo | None],
    architecture: Architecture,
    choice: Choice,
    where: tuple[int, int],
    prefix: str,
    template_prefix: str,
) -> TensorWrite:
    (layer, place), info, fill, hidden = where, beside.get(tensor.name), tensor.fill, architecture.hidden
    shape, dtype = tensor.shape, info.dtype if info is not None else _usual_dtype(beside)
    if info is not None and info.shape != shape:
        raise NotApplicable(f"`{info.name}` is stored as {list(info.shape)}, not as {list(shape)}")
    if info is not None and fill.kind != "copied" and dtype not in FLOATS:
        raise NotApplicable(f"`{info.name}` is stored as {dtype}: the checkpoint is quantised")
    name, parameter = prefix + tensor.name, f"{architecture.blocks}.{place}.{tensor.parameter}"
    form = choice.forms[layer]
    if fill.after:
        fill = replace(fill, after=form.after)
    if tensor.index is not None and fill.kind != "copied" and not fill.share(tensor.index, hidden)[1]:
        return TensorWrite.beside(name, parameter, shape, dtype)
    if fill.kind == "carrier":
        casts = architecture.quantisation is None or architecture.quantisation.casts
        right = None if fill.right is None else fill.rights(shape, hidden, tensor.index)
        return TensorWrite(
            name,
            parameter,
            "created",
            layer,
            form.factor(hidden, tensor.parameter),
            shape,
            # Experts are many and large, and what shares the vector with them rounds it as they do; all others hold
            # the vector in full, where every loader casts them.
            dtype if len(shape) > 2 or tensor.index is not None or form.units or not casts else "F32",
            offset=fill.offset,
            right=right,
            transposed=fill.transposed,
            index=tensor.index,
        )
    if fill.kind == "copied" and info is None and architecture.quantisation is not None and tensor.name in beside:
        raise NotApplicable(f"`{template_prefix}{tensor.name}` is quantised, and its values would be needed")
    if fill.kind == "copied":
        source = template_prefix + tensor.name
        return TensorWrite.beside(name, parameter, shape, dtype, lambda read: read(source), f"`{source}`")
    if fill.kind in ("zeros", "constant") and fill.value == 0.0:
        return TensorWrite.beside(name, parameter, shape, dtype)
    expert = tensor.index

    def make(_read: Reader) -> torch.Tensor:
        return content(fill, shape, hidden, expert=expert)

    return TensorWrite.beside(name, parameter, shape, dtype, make, fill.holds)


def _flag_tensors(architecture: Architecture, choice: Choice, names: CarrierNames) -> list[TensorWrite]:
    """Zeros for what the flags create in all other blocks: vLLM leaves a missing one uninitialised."""
    if not choice.flags:
        return []
    insertion = choice.insertion
    before = {insertion.moved_name(name, architecture.blocks + ".") for name in choice.base.state_dict()}
    inserted = tuple(f"{architecture.blocks}.{place}." for place in choice.blocks)
    state = choice.extended.state_dict()
    created = [name for name in state if name not in before and not name.startswith(inserted)]
    saved = saved_names(choice.extended, created)
    usual = _usual_dtype(names.blocks.get(0, {}))
    return [TensorWrite.beside(names.in_copy(saved[name]), name, tuple(state[name].shape), usual) for name in created]


def _reason(choice: Choice) -> str:
    form = next(iter(choice.forms.values()))
    source = {
        "bias": "a bias in front of",
        "norm bias": "the bias of the norm before",
        "norm": "the norm, whose sum of squares is a constant, before",
    }[form.source]
    carried = f"`{form.carrier}`" if form.carrier != form.sink else "it"
    flags = "".join(f"; the config key `{name}` creates it" for name in choice.flags)
    others = len(choice.blocks) // len(choice.insertion.layers) - 1
    twins = any(block.form.source == TWIN for block in choice.blocks.values())
    idle = (
        "; a block in front of it takes back beforehand what it does to the streams"
        if twins
        else f"; {others} more do nothing, so that every later block keeps its place in the pattern of types"
        if others
        else ""
    )
    flags += _division(form)
    return (
        f"an inserted block that is otherwise the identity gets a constant from {source} `{form.sink}`, and {carried} "
        f"holds the vector{flags}{idle}; on a stand-in the whole model differs from the hook by "
        f"{form.difference:.1g} of {form.effect:.2g}"
    )


def _division(form: Form) -> str:
    """Between which experts the coordinates are divided, in words."""
    shares = form.fills[form.carrier].shares
    if shares > 1:
        selector = next(name for name, fill in form.fills.items() if fill.kind in ("pinned", "opposed"))
        return f"; the {shares} experts of a token hold a share of the coordinates each, and `{selector}` selects them"
    return "".join(
        f"; `{other}` holds the first {form.after} coordinates, the experts the others" for other in form.units
    )


ROUTE = Route(
    NAME,
    plan,
    cost="one more layer and its KV cache",
    keeps_quantised=True,
    wider=plan_pattern,
    readers_of_wider=readers_of_pattern,
    plan_lossless=functools.partial(plan, lossless=True),
)
