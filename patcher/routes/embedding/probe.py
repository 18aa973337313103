"""Which parameter in front of block 0 shifts the residual stream that enters it by a constant? Measured.

Candidates are a norm's bias, a table of learned positions, and the input embedding itself (untied from the output
head where it is tied): the same vector is added to every row, on a tiny random model of the same structure.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from patcher.architectures.analysis import Architecture
from patcher.architectures.model_class import parameter_aliases, quiet_transformers, submodule
from patcher.architectures.probe import TOLERANCE, build_stand_in, logits_of, randomise
from patcher.architectures.shrink import shrink_config
from patcher.errors import first_line

UNTIED = {"tie_word_embeddings": False}

ELSEWHERE = 3e-5
"""Of the largest logit. Zamba's blocks read the embedding a second time, which moves a random model by 1e-4."""


@dataclass(frozen=True)
class EmbeddingSlot:
    """A parameter that holds an edit before block 0.

    Attributes:
        parameter: its name in the class.
        shape: [hidden], or [rows, hidden] where every row holds the vector.
        factor: residual gain per unit.
        untied_from: the output head's weight that must be stored on its own; None where nothing is tied.
    """

    parameter: str
    shape: tuple[int, ...]
    factor: float
    untied_from: str | None = None


def find_embedding_slot(architecture: Architecture) -> tuple[EmbeddingSlot | None, str]:
    """The first slot in front of block 0, or None and why there is none."""
    tiny, _ = shrink_config(architecture.config, 0)
    reason = "no parameter in front of block 0 is as wide as the residual stream"
    for parameter, shape in _candidates(architecture):
        heads = [alias for alias, owner in architecture.aliases.items() if owner == parameter]
        if len(heads) > 1:
            reason = f"`{parameter}` is tied to {len(heads)} others"
            continue
        changes = UNTIED if heads else {}
        if heads and not hasattr(architecture.config, "tie_word_embeddings"):
            reason = f"`{parameter}` is tied to `{heads[0]}`, and no config key unties them"
            continue
        measured, why = _measure(tiny, architecture, parameter, changes)
        factor = None if measured is None else _stated(measured, tiny, architecture.config)
        if factor is None:
            reason = f"`{parameter}`: " + (why or f"its factor is {measured:.4g}, and no rule gives it")
            continue
        return EmbeddingSlot(parameter, shape, factor, heads[0] if heads else None), ""
    return None, reason


def _candidates(architecture: Architecture) -> Iterator[tuple[str, tuple[int, ...]]]:
    outside = {
        name: shape
        for name, shape in architecture.parameters.items()
        if not name.startswith(architecture.blocks + ".") and shape[-1:] == (architecture.hidden,)
        if name not in architecture.aliases
    }
    yield from ((name, shape) for name, shape in outside.items() if len(shape) == 1 and name.endswith("bias"))
    # The vocabulary last: a table of positions is smaller, and tied to nothing.
    tables = [(name, shape) for name, shape in outside.items() if len(shape) == 2]
    yield from sorted(tables, key=lambda item: (item[1][0] == architecture.config.vocab_size, item[1][0]))


def _measure(
    tiny: Any, architecture: Architecture, parameter: str, changes: dict[str, Any]
) -> tuple[float | None, str]:
    config = copy.deepcopy(tiny)
    for key, value in changes.items():
        setattr(config, key, value)
    generator = torch.Generator().manual_seed(0)
    try:
        model = build_stand_in(config, trust_remote_code=architecture.trust_remote_code)
        if changes and parameter in parameter_aliases(model).values():
            return None, "the class ties it whatever the config says"
        randomise(model, generator)
        block = submodule(model, f"{architecture.blocks}.0")
        slot = dict(model.named_parameters())[parameter]
        ids = torch.randint(3, int(config.vocab_size), (2, 11), generator=generator)
        vector = torch.randn(slot.shape[-1], generator=generator)
        with torch.no_grad(), quiet_transformers():
            before, _ = _entering(model, block, ids)
            slot.add_(vector)
            after, logits = _entering(model, block, ids)
            slot.sub_(vector)
            gain = after - before
            if gain.shape[-1] != len(vector):
                return None, "it is not as wide as the residual stream"
            factor = float((gain * vector).sum() / (vector @ vector) / gain[..., 0].numel())
            _, hooked = _entering(model, block, ids, add=factor * vector)
    except (RuntimeError, ValueError, IndexError, TypeError, AttributeError, KeyError) as error:
        return None, f"the probe could not run on a stand-in ({first_line(error)})"
    if abs(factor) < 1e-6:
        return None, "it does not reach the residual stream that enters block 0"
    off = float((gain - factor * vector).abs().max()) / (abs(factor) * float(vector.abs().max()))
    if not off <= TOLERANCE:
        return None, f"what enters block 0 does not gain a constant (off by {off:.0%} of the vector)"
    elsewhere = float((logits - hooked).abs().max())
    if not elsewhere <= ELSEWHERE * max(1.0, float(hooked.abs().max())):
        return None, "it is used elsewhere as well"
    return factor, ""


def _entering(
    model: nn.Module, block: nn.Module, ids: torch.Tensor, add: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    seen: list[torch.Tensor] = []

    def hook(_module: nn.Module, inputs: Any, keywords: dict[str, Any]) -> Any:
        hidden = inputs[0] if inputs else keywords["hidden_states"]
        hidden = hidden if add is None else hidden + add
        seen.append(hidden.detach().clone().float())
        return ((hidden, *inputs[1:]), keywords) if inputs else (inputs, {**keywords, "hidden_states": hidden})

    handle = block.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        logits = logits_of(model, ids)
    finally:
        handle.remove()
    return seen[-1], logits


def _stated(measured: float, tiny: Any, real: Any) -> float | None:
    """The rule over the config that gives the measured factor, applied to the real config."""
    keys = [
        key
        for key, value in vars(tiny).items()
        if key.startswith(("embedding_", "scale_emb", "emb")) and isinstance(value, (int, float))
    ]

    def rules(config: Any) -> list[float]:
        return [1.0, math.sqrt(config.hidden_size), *(float(getattr(config, key)) for key in keys)]

    pairs = zip(rules(tiny), rules(real), strict=True)
    return next((on_real for on_tiny, on_real in pairs if math.isclose(measured, on_tiny, rel_tol=1e-4)), None)
