"""One function, two names: a source class whose function is another stock class's, one that has the slot.

relabels.json states the leads as data. A relabel is used only after the two classes were seen to compute the same on a
tiny stand-in, with the very config and tensor operations that will be written (:mod:`.proof`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from patcher.architectures.analysis import Architecture, Slot
from patcher.architectures.config_keys import stated
from patcher.architectures.model_class import causal_lm_class
from patcher.architectures.stand_in import FAILURES
from patcher.routes.bias_slots import slots_of
from patcher.routes.plan import NotApplicable
from patcher.routes.relabel.config import config_class, parsed, target_config
from patcher.routes.relabel.guards import GUARDS, even_heads
from patcher.routes.relabel.proof import NoRelabel, RelabelProof, prove
from patcher.routes.relabel.rows import Candidate, candidates, in_wrapper
from patcher.routes.relabel.tensors import Derivation, derivations


@dataclass(frozen=True)
class Relabel:
    """A relabel of one source config that was seen to hold.

    Attributes:
        candidate: the row that it follows.
        config: the complete config.json of the copy.
        target: the class that reads the copy.
        derivations: how each of its stored parameters follows from the source's.
        shapes: of each.
        zeros: biases that the target has and the source has not; all but the slots' stay zero.
        slots: layer -> the parameter that carries the vector.
        stacks: stack -> native, backend or no.
        proof: what was measured.
    """

    candidate: Candidate
    config: Mapping[str, Any]
    target: Architecture
    derivations: tuple[Derivation, ...]
    shapes: Mapping[str, tuple[int, ...]]
    zeros: tuple[str, ...]
    slots: Mapping[int, Slot]
    stacks: Mapping[str, str]
    proof: RelabelProof


def find_relabel(architecture: Architecture, layers: Sequence[int], raw: Mapping[str, Any] | None = None) -> Relabel:
    """The first candidate that holds for this config and has a slot in every layer.

    Args:
        architecture: the source.
        layers: the blocks whose output is steered.
        raw: the source's config.json, for keys that are carried over as they were written.

    Raises:
        NoRelabel: none does; the text says why, candidate by candidate.
    """
    rows = [in_wrapper(row, architecture) for row in candidates().get(architecture.model_type, ())]
    if not rows:
        raise NoRelabel(f"no other class is known to compute what {architecture.class_name} computes")
    why: list[str] = []
    for row in rows:
        try:
            return _relabel(architecture, row, layers, raw)
        except NotApplicable as finding:
            why.append(f"{row.to}: {finding}")
    raise NoRelabel("; ".join(dict.fromkeys(why)))


def _relabel(
    architecture: Architecture, row: Candidate, layers: Sequence[int], raw: Mapping[str, Any] | None
) -> Relabel:
    config = architecture.config
    if differing := stated(config, "per_layer_attributes"):
        raise NoRelabel(f"its blocks differ in {', '.join(sorted(differing))}, and a relabel states one value for all")
    for name in row.guards:
        if (reason := GUARDS[name](config)) is not None:
            raise NoRelabel(reason)
    if config_class(row.to) is None:
        raise NoRelabel("this release of transformers does not have the class")
    try:
        values = target_config(config, row.to, row.config, raw)
        target = Architecture(parsed(values, config))
    except FAILURES as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise NoRelabel(f"its config cannot be stated ({lines[-1] if lines else type(error).__name__})") from None
    slots = slots_of(target.native_slot, layers)
    stored = {name: shape for name, shape in target.parameters.items() if name not in target.aliases}
    given = {**architecture.parameters, **architecture.buffers}
    shapes = {**stored, **target.buffers}
    found, missing = derivations(row.tensors, given, shapes)
    if lost := [name for name in missing if not name.endswith("bias")]:
        raise NoRelabel(f"nothing gives its `{lost[0]}`")
    own = [slot.parameter for slot in slots.values() if slot.parameter not in missing]
    # Of the same class under another config the bias is added to; a copy of another class is for bases without it.
    if own and row.to != architecture.model_type:
        raise NoRelabel(f"the source has a bias that would become `{own[0]}`")
    proofs = [_proof(architecture, row, slot) for slot in slots.values()]
    worst = max(proofs, key=lambda proof: max(proof.difference, proof.steered))
    # Inside a wrapper it is the text's own class: llama.cpp's converter goes by it.
    inside = causal_lm_class(row.to) if target.wraps else None
    values = {**values, "architectures": [target.class_name if inside is None else inside.__name__]}
    return Relabel(row, values, target, tuple(found), shapes, tuple(missing), slots, _stacks(row, target), worst)


def _proof(architecture: Architecture, row: Candidate, slot: Slot) -> RelabelProof:
    """The proof for the kind of block that ``slot`` is in; once per architecture."""

    def measure() -> RelabelProof | str:
        try:
            return prove(architecture.config, row, slot, architecture.blocks)
        except NoRelabel as finding:
            return str(finding)

    key = ("relabel", repr(row), slot.parameter, architecture.kind(slot.layer))
    found = architecture.once(key, measure, RelabelProof | str, slot.layer)
    if isinstance(found, str):
        raise NoRelabel(found)
    return found


def _stacks(row: Candidate, target: Architecture) -> dict[str, str]:
    """What the target's row says, less what a stack reads otherwise under this config."""
    stacks = dict(target.stacks)
    rope = stated(target.config, "rope_parameters") or {}
    for rule in row.stacks:
        known = {
            **vars(target.config),
            "rope_type": rope.get("rope_type", "default"),
            "even_heads": even_heads(target.config),
            "rotates": any(stated(target.config, "no_rope_layers") or [True]),
        }
        if "unless" in rule and all(known.get(name) in values for name, values in rule["unless"].items()):
            continue
        stacks.update({stack: support for stack, support in rule.items() if stack != "unless"})
    if target.wraps:
        # What a rule gains is gained for the text class alone.
        inside = target.stacks
        return {stack: support if support == inside.get(stack) else "no" for stack, support in stacks.items()}
    return stacks
