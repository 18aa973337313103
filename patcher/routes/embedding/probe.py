"""Which parameter in front of block 0 shifts the residual stream that enters it by a constant? Measured.

Candidates are a norm's bias, a table of learned positions, and the input embedding itself (untied from the output head
where it is tied). The same vector is added to every row of one, on a tiny random model of the same structure.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from patcher.architectures.analysis import Architecture, Slot
from patcher.architectures.config_keys import stated
from patcher.architectures.model_class import parameter_aliases, quiet_transformers, submodule, with_flags
from patcher.architectures.probe import TOLERANCE
from patcher.architectures.shrink import shrink_config
from patcher.architectures.stand_in import FAILURES, RandomStandIn, apart, run_on
from patcher.capture.forward import EMBEDDING
from patcher.errors.causes import cause_of
from patcher.routes.plan import NotApplicable

UNTIED = {"tie_word_embeddings": False}

ELSEWHERE = 3e-5
"""Of the largest logit. Zamba's blocks read the embedding a second time, which moves a random model by 1e-4."""


def find_embedding_slot(architecture: Architecture) -> tuple[Slot | None, str]:
    """The first slot in front of block 0, or None and why there is none.

    Where it is tied to the output head, the slot's flags untie them, and they create the head.
    """
    kind = tuple[Slot | None, str]
    return architecture.once(("embedding",), lambda: _find_slot(architecture), kind)


def _find_slot(architecture: Architecture) -> tuple[Slot | None, str]:
    reason = "no parameter in front of block 0 is as wide as the residual stream"
    for parameter, shape in _candidates(architecture):
        try:
            heads = [alias for alias, owner in architecture.aliases.items() if owner == parameter]
            factor = _factor(architecture, parameter, heads)
            return Slot(EMBEDDING, parameter, shape, factor, UNTIED if heads else {}, dict.fromkeys(heads, shape)), ""
        except NotApplicable as finding:
            reason = f"`{parameter}`{finding}"
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


def _factor(architecture: Architecture, parameter: str, heads: Sequence[str]) -> float:
    """What the residual stream that enters block 0 gains per unit of the parameter, under the real config."""
    if len(heads) > 1:
        raise NotApplicable(f" is tied to {len(heads)} others")
    if heads and stated(architecture.config, "tie_word_embeddings", ...) is ...:
        raise NotApplicable(f" is tied to `{heads[0]}`, and no config key unties them")
    tiny, _ = shrink_config(architecture.config, 0)
    try:
        changed = with_flags(tiny, UNTIED if heads else {})
        stand_in = RandomStandIn.of(changed, trust_remote_code=architecture.trust_remote_code)
        model, ids = stand_in.model, stand_in.ids
        if heads and parameter in parameter_aliases(model).values():
            raise NotApplicable(": the class ties it whatever the config says")
        block = submodule(model, f"{architecture.blocks}.0")
        slot = dict(model.named_parameters())[parameter]
        vector = stand_in.random(slot.shape[-1])
        with torch.no_grad(), quiet_transformers():
            before, _ = run_on(model, block, ids, entering=True)
            slot.add_(vector)
            after, logits = run_on(model, block, ids, entering=True)
            slot.sub_(vector)
            gain = after - before
            if gain.shape[-1] != len(vector):
                raise NotApplicable(": it is not as wide as the residual stream")
            factor = float((gain * vector).sum() / (vector @ vector) / gain[..., 0].numel())
            _, hooked = run_on(model, block, ids, add=factor * vector, entering=True)
    except FAILURES as error:
        raise NotApplicable(f": the probe could not run on a stand-in ({cause_of(error)})") from None
    if abs(factor) < 1e-6:
        raise NotApplicable(": it does not reach the residual stream that enters block 0")
    off = float((gain - factor * vector).abs().max()) / (abs(factor) * float(vector.abs().max()))
    if not off <= TOLERANCE:
        raise NotApplicable(f": what enters block 0 does not gain a constant (off by {off:.0%} of the vector)")
    if not apart(logits, hooked) <= ELSEWHERE:
        raise NotApplicable(": it is used elsewhere as well")
    on_real = _stated(factor, tiny, architecture.config)
    if on_real is None:
        raise NotApplicable(f": its factor is {factor:.4g}, and no rule gives it")
    return on_real


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
