"""The passes of a verification as data: which probes run, what is added where, and what is read.

Nothing here computes. :mod:`stock_forward` runs them on a model in memory; whoever runs a model block by block runs
the same list, all passes of a round side by side. Round 1 is what does not depend on how far the vector has to be
amplified, round 2 is the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

EMBEDDING = -1
EFFECT_WANTED = 0.05
SHARE_WANTED = 0.01
LARGEST_FACTOR = 1e6
RESIDUAL_PROBES = 2
"""How many probes the residual stream is read on."""
UNSTEERED_PROBES = 2
"""How many probes the copy is run on with its vector taken out."""
LAST = 4
"""Positions at the end of a padded prompt whose logits are kept."""
OWN_DTYPE_PROBES = 3
"""How many probes are run in the dtype in which the folder is stored."""


@dataclass(frozen=True)
class Hook:
    """A vector that a forward hook adds to the residual stream at every position.

    Attributes:
        layer: the block.
        entering: add to what the block takes in, not to what it puts out.
        key: which vector.
        factor: how many times the vector.
    """

    layer: int
    entering: bool
    key: str
    factor: float = 1.0


@dataclass(frozen=True)
class Pass:
    """One forward pass over some probes, in fp32, without a cache.

    Attributes:
        name: log-probabilities go to ``NAME/PROBE``, [positions, vocabulary] fp32; empty if none are wanted.
        probes: numbers of the probes.
        hooks: what is added; the candidate has none.
        factor: how many times the candidate's own tensors hold the vector.
        residuals: key of a vector -> the block after which the residual stream is read, before any hook on it;
            it goes to ``residual/READ_AS/KEY/PROBE``, [positions, hidden] fp32, of the first probes.
        read_as: see there.
        whole: from ids to logits, even where other passes start from a residual stream that is known.
    """

    name: str
    probes: tuple[int, ...]
    hooks: tuple[Hook, ...] = ()
    factor: float = 1.0
    residuals: Mapping[str, int] = field(default_factory=dict)
    read_as: str = ""
    whole: bool = False


def reference_passes(layers: Mapping[str, int], lengths: Sequence[int], blocks: int) -> list[Pass]:
    """Round 1 of the base.

    Args:
        layers: key of a vector -> the block after which it is added.
        lengths: of the probes.
        blocks: how many the model has.
    """
    everywhere = tuple(range(len(lengths)))
    return [
        Pass("base", everywhere, residuals=_unsteered(layers), read_as="base", whole=True),
        Pass("hook", everywhere, all_hooks(layers)),
        # The same in another place, on one probe: how far two ways to compute the same thing are apart.
        Pass("hook_again", (shortest(lengths),), other_hooks(layers, blocks), whole=True),
        *_later_residuals("base", layers, lengths, 1.0),
    ]


def amplified_reference(layers: Mapping[str, int], lengths: Sequence[int], factor: float) -> list[Pass]:
    """Round 2 of the base: under ``factor`` times the vectors."""
    return [
        Pass("hook_amplified", tuple(range(len(lengths))), all_hooks(layers, factor)),
        *_later_residuals("base_amplified", layers, lengths, factor),
    ]


def candidate_passes(layers: Mapping[str, int], lengths: Sequence[int], amplify: float) -> list[Pass]:
    """Both rounds of the copy; ``layers`` are the blocks of the copy."""
    everywhere = tuple(range(len(lengths)))
    passes = [
        Pass("candidate", everywhere, residuals=layers, read_as="candidate"),
        Pass("unsteered", everywhere[:UNSTEERED_PROBES], factor=0.0),
    ]
    if amplify > 1:
        loud = Pass("candidate_amplified", everywhere, factor=amplify, residuals=layers, read_as="candidate_amplified")
        passes.append(loud)
    return passes


def whole_candidate(lengths: Sequence[int]) -> Pass:
    """One probe of the copy from ids to logits, to which a pass that starts later is held."""
    return Pass("candidate_whole", (shortest(lengths),), whole=True)


def reference_image_passes(layers: Mapping[str, int], blocks: int, factor: float) -> list[Pass]:
    """Of the base over one prompt with an image, beside the pass without hooks."""
    found = [Pass("hook", (0,), all_hooks(layers)), Pass("hook_again", (0,), other_hooks(layers, blocks))]
    return found if factor == 1.0 else [*found, Pass("hook_amplified", (0,), all_hooks(layers, factor))]


def candidate_image_passes(factor: float) -> list[Pass]:
    """Of the copy over the same prompt, beside the pass of the copy as it is."""
    return [] if factor == 1.0 else [Pass("candidate_amplified", (0,), factor=factor)]


def own_dtype_pass(hooks: tuple[Hook, ...], lengths: Sequence[int]) -> Pass:
    """The steered model in the dtype in which it is stored."""
    return Pass("own_dtype", tuple(range(len(lengths)))[:OWN_DTYPE_PROBES], hooks, whole=True)


def all_hooks(layers: Mapping[str, int], factor: float = 1.0, below: int | None = None) -> tuple[Hook, ...]:
    """A hook for every vector, or for those that are added before block ``below`` has run."""
    return tuple(
        Hook(max(layer, 0), layer == EMBEDDING, key, factor)
        for key, layer in layers.items()
        if below is None or layer < below
    )


def other_hooks(layers: Mapping[str, int], blocks: int) -> tuple[Hook, ...]:
    """Each vector where it means the same: at the entrance of the next block, or at its own place in two halves."""
    hooks: list[Hook] = []
    for key, layer in layers.items():
        if layer == EMBEDDING or layer + 1 == blocks:
            hooks += [Hook(max(layer, 0), layer == EMBEDDING, key, 0.5)] * 2
        else:
            hooks.append(Hook(layer + 1, True, key))
    return tuple(hooks)


def _unsteered(layers: Mapping[str, int]) -> dict[str, int]:
    first = min(layers.values())
    return {key: layer for key, layer in layers.items() if layer == first}


def _later_residuals(name: str, layers: Mapping[str, int], lengths: Sequence[int], factor: float) -> list[Pass]:
    """The residual stream after each edited block but the first, with the edits of earlier blocks only."""
    probes, first = tuple(range(len(lengths)))[:RESIDUAL_PROBES], min(layers.values())
    return [
        Pass("", probes, all_hooks(layers, factor, below=layer), residuals={key: layer}, read_as=name)
        for key, layer in layers.items()
        if layer != first
    ]


def choose_factor(effect: float, share: float, measure: Any) -> float:
    """How many times the vector a tiny effect is probed at: a power of ten, 1 where the effect is large enough.

    Args:
        effect: the largest difference of a log-probability that the vector makes.
        share: its length beside the residual stream's.
        measure: factor -> the effect of so many times the vector.
    """
    factor, first = 1.0, effect
    while factor < LARGEST_FACTOR and (effect < EFFECT_WANTED or share * factor < SHARE_WANTED):
        factor *= 10.0
        # The effect grows about as the vector does, so what must be too small is not run.
        while factor < LARGEST_FACTOR and (first * factor < EFFECT_WANTED or share * factor < SHARE_WANTED):
            factor *= 10.0
        effect = measure(factor)
    return factor


def shortest(lengths: Sequence[int]) -> int:
    """The number of the shortest probe."""
    return min(range(len(lengths)), key=lambda number: lengths[number])


def groups(probes: Sequence[int], ids: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """Probes that go through a model in one batch: those of one length."""
    found: dict[int, list[int]] = {}
    for number in probes:
        found.setdefault(len(ids[number]), []).append(number)
    return [tuple(numbers) for numbers in found.values()]
