"""The relabel route: the same function is another stock class, one that has the slot.

The copy's config.json and some of its tensors are rewritten for that class; what is not rewritten is copied.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from patcher.architectures.analysis import Architecture, Slot
from patcher.architectures.decoder import decoder_part, text_key
from patcher.checkpoint.folder import CheckpointFolder
from patcher.checkpoint.safetensors_file import FLOATS, TensorInfo
from patcher.routes.disk_names import existing_name
from patcher.routes.plan import NotApplicable, Plan, Reader, TensorWrite
from patcher.routes.relabel import quantised
from patcher.routes.relabel.finding import Relabel, find_relabel
from patcher.routes.relabel.guards import has_window
from patcher.routes.relabel.stored import Experts, experts_of
from patcher.routes.relabel.tensors import Derivation, derive
from patcher.routes.relabel.tokenizer import tokenizer_changes
from patcher.routes.route import Route
from patcher.routes.vllm_backend import backend_class
from patcher.stacks.names import VLLM

NAME = "relabel"


def plan(architecture: Architecture, layers: Sequence[int], checkpoint: CheckpointFolder | None) -> Plan:
    """Plan the other class's config and tensors, the slots that carry the vectors, and zeros for its other biases.

    Raises:
        NotApplicable: no other class computes the same under this config, or the checkpoint cannot be rewritten.
    """
    if architecture.trust_remote_code and checkpoint is not None and "auto_map" in checkpoint.config:
        raise NotApplicable("the checkpoint's own code reads it, so no stock class can be put in its place")
    if architecture.wraps and checkpoint is not None and text_key(checkpoint.config) is None:
        raise NotApplicable("config.json states the decoder and the whole side by side, so no other class can be named")
    found = find_relabel(architecture, layers, decoder_part(checkpoint.config) if checkpoint is not None else None)
    config = {**_config(found), **quantised.stated(architecture, checkpoint)}
    tokenizer = {} if checkpoint is None else _tokenizer(checkpoint, config, found)
    stored, packed = quantised.as_plain(architecture, checkpoint)
    moves = _moves(architecture, found, stored)
    quantised.require_kept(packed, {*moves.dropped, *moves.renamed})
    own = "F32" if architecture.quantisation is None else architecture.quantisation.bias
    return Plan(
        route=NAME,
        architecture=found.target.class_name,
        blocks=architecture.blocks,
        sites={layer: slot.site for layer, slot in found.slots.items()},
        tensors=(*moves.writes, *_biases(found, moves, own)),
        stacks=quantised.stacks(architecture, found.stacks),
        reason=f"the same function is {found.target.class_name}, checked equal on a tiny stand-in (logits differ by at "
        f"most {found.proof.difference:.1g} of the largest, steered by {found.proof.steered:.1g})",
        dropped=frozenset(moves.dropped),
        renamed=moves.renamed,
        config=config,
        residual=found.candidate.residual,
        tokenizer_changes=tokenizer,
        warnings=_warnings(architecture, found, moves),
    )


def _config(found: Relabel) -> dict[str, Any]:
    """The copy's config.json; vLLM is led past a class of its own that would read the copy otherwise."""
    own = found.target.row.stacks.get(VLLM) if found.target.row is not None else None
    backend = found.stacks.get(VLLM) == "backend" and own != "backend"
    return {**found.config, "architectures": [backend_class(found.target)]} if backend else dict(found.config)


def _tokenizer(checkpoint: CheckpointFolder, config: Mapping[str, Any], found: Relabel) -> dict[str, str]:
    changes = tokenizer_changes(checkpoint.path, config)
    if changes is None:
        raise NotApplicable(
            f"AutoTokenizer reads the tokenizer's files otherwise beside the model type `{found.target.model_type}`, "
            "whatever tokenizer_config.json says"
        )
    return changes


@dataclass
class _Moves:
    """What becomes of the base's tensors."""

    writes: list[TensorWrite] = field(default_factory=list)
    renamed: dict[str, str] = field(default_factory=dict)
    dropped: set[str] = field(default_factory=set)
    dtypes: dict[str, str] = field(default_factory=dict)
    """Parameter of the target -> the dtype that it is stored in."""


def _moves(architecture: Architecture, found: Relabel, stored: Mapping[str, TensorInfo] | None) -> _Moves:
    moves = _Moves()
    names = _names(found)
    sources = {each.source for each in found.derivations if each.source is not None}
    parts = {name: kept for name in sources if (kept := _experts(name, architecture, stored)) is not None}
    on_disk = {parameter: _on_disk(parameter, architecture, stored) for parameter in sources - parts.keys()}
    copied: set[str] = set()
    for each in found.derivations:
        if each.source in parts:
            _move_experts(each, parts[each.source], found, architecture, stored, moves, copied)
            continue
        name = names[each.target]
        if each.source is None:
            moves.writes.append(_created(each, name, None, found, architecture, "F32"))
            moves.dtypes[each.target] = "F32"
            continue
        disk = on_disk[each.source]
        dtype = stored[disk].dtype if stored is not None else "F32"
        if dtype not in FLOATS:
            raise NotApplicable(f"`{disk}` is stored as {dtype}")
        if not each.steps and disk not in copied:
            copied.add(disk)
            if disk != name:
                moves.renamed[disk] = name
        else:
            # Half precision would round what these operations make, and the copy would be another function.
            dtype = "F32" if each.rounds(architecture.config) and dtype != "F64" else dtype
            moves.writes.append(_created(each, name, disk, found, architecture, dtype))
        moves.dtypes[each.target] = dtype
    moves.dropped = {*on_disk.values(), *(name for kept in parts.values() for name in kept.names)} - copied
    if stored is not None:
        moves.dropped |= _unread(architecture, stored, copied, moves)
    return moves


def _names(found: Relabel) -> dict[str, str]:
    """Where the copy stores each tensor; what only the library's newest names are known of keeps the class's own."""
    return {name: found.target.saved_names([name])[name] for name in found.shapes}


def _experts(parameter: str, architecture: Architecture, stored: Mapping[str, TensorInfo] | None) -> Experts | None:
    """The parts that the checkpoint stores a fused parameter in; None where it stores it whole."""
    kept = experts_of(architecture, parameter)
    if kept is None or stored is None:
        return kept
    whole = existing_name(parameter, architecture, stored) is not None
    return None if whole else kept.in_checkpoint(stored, architecture.base_prefix)


def _move_experts(
    each: Derivation,
    kept: Experts,
    found: Relabel,
    architecture: Architecture,
    stored: Mapping[str, TensorInfo] | None,
    moves: _Moves,
    copied: set[str],
) -> None:
    """Experts that are stored one by one: their bytes are copied where the target stores them likewise."""
    dtypes = {stored[name].dtype if stored is not None else "F32" for name in kept.names}
    if len(dtypes) > 1 or not dtypes <= set(FLOATS):
        raise NotApplicable(f"the experts of `{each.source}` are stored as {', '.join(sorted(dtypes))}")
    dtype = dtypes.pop()
    wanted = experts_of(found.target, each.target)
    if not each.steps and wanted is not None and len(wanted.names) == len(kept.names):
        copied.update(kept.names)
        moves.renamed |= {old: new for old, new in zip(kept.names, wanted.names, strict=True) if old != new}
        return
    config = architecture.config
    dtype = "F32" if each.rounds(config) and dtype != "F64" else dtype
    name = found.target.saved_names([each.target])[each.target]

    def make(read: Reader) -> torch.Tensor:
        return derive(kept.read(read), each.steps, config)

    words = each.words(f"{kept.names[0]}` to `{kept.names[-1]}")
    moves.writes.append(TensorWrite.beside(name, each.target, found.shapes[each.target], dtype, make, words))
    moves.dtypes[each.target] = dtype


def _on_disk(parameter: str, architecture: Architecture, stored: Mapping[str, TensorInfo] | None) -> str:
    # Of tied parameters a checkpoint stores one, under the name of either.
    owner = architecture.aliases.get(parameter, parameter)
    others = [name for name, other in architecture.aliases.items() if other == owner]
    if stored is None:
        return architecture.saved_names([owner])[owner]
    spellings = (existing_name(name, architecture, stored) for name in (parameter, owner, *others))
    disk = next((name for name in spellings if name is not None), None)
    if disk is None:
        raise NotApplicable(f"the checkpoint does not store `{parameter}`")
    return disk


def _unread(architecture: Architecture, stored: Mapping[str, TensorInfo], copied: set[str], moves: _Moves) -> set[str]:
    """Stored tensors that no parameter of the target is made of: the other class might take them for something else.

    Of tied parameters that are stored twice the second one stays if the first one does.
    """
    known = {existing_name(alias, architecture, stored): owner for alias, owner in architecture.aliases.items()}
    kept = {
        name
        for name, owner in known.items()
        if name is not None and existing_name(owner, architecture, stored) in copied - moves.renamed.keys()
    }
    return set(stored) - copied - kept - moves.dropped


def _created(
    each: Derivation, name: str, disk: str | None, found: Relabel, architecture: Architecture, dtype: str
) -> TensorWrite:
    shape, config = found.shapes[each.target], architecture.config

    def make(read: Reader) -> torch.Tensor:
        if disk is None:
            return torch.full(shape, each.fill)
        return derive(read(disk), each.steps, config)

    return TensorWrite.beside(name, each.target, shape, dtype, make, each.words(disk or "nothing"))


def _biases(found: Relabel, moves: _Moves, own: str) -> list[TensorWrite]:
    """The slots, and zeros for all other biases that only the target has: vLLM leaves a missing one uninitialised."""
    carried = {slot.parameter: slot for slot in found.slots.values()}
    names = _names(found)
    writes = [_added(slot, names, moves) for slot in carried.values() if slot.parameter not in found.zeros]
    for parameter in found.zeros:
        shape, slot = found.shapes[parameter], carried.get(parameter)
        if slot is not None:
            # In F32 the vector survives every conversion exactly; a loader casts it to the model's dtype.
            writes.append(TensorWrite(names[parameter], parameter, "created", slot.layer, slot.factor, shape, own))
        else:
            dtype = moves.dtypes.get(parameter.removesuffix("bias") + "weight", "F32")
            writes.append(TensorWrite.beside(names[parameter], parameter, shape, dtype))
    return writes


def _added(slot: Slot, names: Mapping[str, str], moves: _Moves) -> TensorWrite:
    """An addition to a bias that the source has as well, in bytes that are copied otherwise."""
    name = names[slot.parameter]
    if name in {write.name for write in moves.writes} or name in moves.renamed.values():
        raise NotApplicable(f"`{name}` is rewritten as well as added to")
    dtype = moves.dtypes[slot.parameter]
    return TensorWrite(name, slot.parameter, "added", slot.layer, slot.factor, slot.shape, dtype)


def _warnings(architecture: Architecture, found: Relabel, moves: _Moves) -> tuple[str, ...]:
    to = found.target.model_type
    warnings = [f"the copy is of model type `{to}`, the base of `{architecture.model_type}`"]
    if moves.writes:
        warnings.append(
            f"{len(moves.writes)} tensors were rewritten for {found.target.class_name}, so an adapter (LoRA) made for "
            "the base does not fit the copy"
        )
    if any(each.rounds(architecture.config) for each in found.derivations):
        warnings.append(
            "some of them are stored in fp32; loaded in half precision they are rounded, and the copy then differs "
            "from the base by that rounding"
        )
    window = found.config.get("sliding_window")
    if window is not None and not has_window(architecture.config):
        warnings.append(f"text beyond {window} tokens, the base's position range, looks back {window} tokens at most")
    if found.candidate.residual == "centred":
        warnings.append("the copy's residual stream is the base's without its mean: probes of it must be centred too")
    return tuple(warnings)


ROUTE = Route(NAME, plan, keeps_quantised=True)
