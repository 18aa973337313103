"""Do two classes compute the same function? Measured on tiny random models, with the very operations of the writer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from patcher.architectures.analysis import Slot
from patcher.architectures.config_keys import stated
from patcher.architectures.model_class import parameter_aliases, quiet_transformers, stored_buffers
from patcher.architectures.shrink import VOCABULARY, shrink_config
from patcher.architectures.stand_in import FAILURES, build_stand_in, randomise, run_on
from patcher.errors.causes import cause_of
from patcher.routes.plan import NotApplicable
from patcher.routes.relabel.config import parsed, target_config
from patcher.routes.relabel.guards import has_window
from patcher.routes.relabel.rows import Candidate
from patcher.routes.relabel.tensors import derivations, derive

LIMIT = 1e-5
"""Largest difference, relative to the largest logit, that fp32 arithmetic in another order may leave."""

_WINDOW, _ORIGINAL, _SHORT, _LONG, _PADDED = 8, 16, 12, 40, 7


class NoRelabel(NotApplicable):
    """A relabel does not hold; the text says why."""


@dataclass(frozen=True)
class RelabelProof:
    """What was measured on the stand-ins; all relative to the largest logit (of the residual: the largest value).

    Attributes:
        difference: of the logits, unsteered.
        residual: of the residual stream after the block.
        steered: of the logits, a hook on the source against the slot of the target.
        effect: of the logits, steered against unsteered.
    """

    difference: float
    residual: float
    steered: float
    effect: float


def prove(config: Any, row: Candidate, slot: Slot, blocks: str | None = None) -> RelabelProof:
    """Compare stand-ins of the source under ``config`` and of the target, unsteered and steered at ``slot``.

    Args:
        config: the source's.
        slot: the target's.
        blocks: path of the source's list of decoder blocks, where the target's class calls it otherwise.

    The prompts are longer than the stand-in's sliding window and original position range, and one is padded left.

    Raises:
        NoRelabel: they differ, or the stand-ins could not be built.
    """
    try:
        return _prove(config, row, slot, blocks)
    except FAILURES as error:
        raise NoRelabel(f"no proof: the stand-in failed ({cause_of(error)})") from error


def _prove(config: Any, row: Candidate, slot: Slot, own: str | None) -> RelabelProof:
    tiny, layer = shrink_config(config, slot.layer)
    _shorten(tiny, config)
    generator = torch.Generator().manual_seed(0)
    source = build_stand_in(tiny, trust_remote_code=False)
    randomise(source, generator)
    target = build_stand_in(parsed(target_config(tiny, row.to, row.config), tiny), trust_remote_code=False)
    _fill(source, target, row, tiny)
    blocks, _, name = slot.parameter.partition(f".{slot.layer}.")
    path, own_path = f"{blocks}.{layer}", f"{own or blocks}.{layer}"
    vector = torch.randn(int(tiny.hidden_size), generator=generator)
    in_copy = vector - vector.mean() if row.residual == "centred" else vector
    carrier = target.get_submodule(path).get_parameter(name)

    before = carrier.detach().clone()
    worst = dict.fromkeys(("difference", "residual", "steered"), 0.0)
    effect = 0.0
    for ids, mask in _prompts(generator):
        with torch.no_grad(), quiet_transformers():
            carrier.copy_(before)
            residual, logits = _run(source, own_path, ids, mask)
            gained, relabelled = _run(target, path, ids, mask)
            _, hooked = _run(source, own_path, ids, mask, vector)
            carrier.copy_(before + (in_copy / slot.factor).expand_as(carrier))
            _, baked = _run(target, path, ids, mask)
        if not all(bool(torch.isfinite(seen).all()) for seen in (logits, relabelled, hooked, baked)):
            raise NoRelabel("the stand-ins do not compute finite numbers")
        if row.residual == "centred":
            residual = residual - residual.mean(-1, keepdim=True)
        for key, (one, other) in {
            "difference": (logits, relabelled), "residual": (residual, gained), "steered": (hooked, baked)
        }.items():  # fmt: skip
            worst[key] = max(worst[key], _apart(one, other))
        effect = max(effect, _apart(logits, hooked))
    for key, value in worst.items():
        if not value <= LIMIT:
            raise NoRelabel(f"on a tiny stand-in it computes otherwise ({key} off by {value:.2g} of the largest value)")
    return RelabelProof(**worst, effect=effect)


def _run(
    model: nn.Module, path: str, ids: torch.Tensor, mask: torch.Tensor, add: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The residual stream after the block ``path`` and the logits, at the positions that are no padding."""
    residual, logits = run_on(model, model.get_submodule(path), ids, add, mask=mask)
    return residual[mask.bool()], logits[mask.bool()]


def _apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max()) / max(float(one.abs().max()), 1e-12)


def _shorten(tiny: Any, config: Any) -> None:
    """Positions scaled down along with the rest, so that short prompts reach what long texts reach."""
    if has_window(config):
        tiny.sliding_window = _WINDOW
    rope = stated(tiny, "rope_parameters")
    if not isinstance(rope, dict):
        return
    original = rope.get("original_max_position_embeddings")
    longest = config.max_position_embeddings
    if original is not None and longest > original:
        tiny.max_position_embeddings = max(_ORIGINAL + 1, round(_ORIGINAL * longest / original))
        for owner in (rope, vars(tiny)):
            if "original_max_position_embeddings" in owner:
                owner["original_max_position_embeddings"] = _ORIGINAL
    elif original is None and rope.get("rope_type") == "dynamic":
        tiny.max_position_embeddings = _ORIGINAL


def _fill(source: nn.Module, target: nn.Module, row: Candidate, tiny: Any) -> None:
    """Give the target the source's function, as the writer will."""
    given = {**dict(source.named_parameters(remove_duplicate=False)), **stored_buffers(source)}
    aliases = parameter_aliases(target)
    taken: dict[str, torch.Tensor] = {
        name: value for name, value in target.named_parameters(remove_duplicate=False) if name not in aliases
    }
    taken |= stored_buffers(target)
    found, missing = derivations(row.tensors, given, taken)
    with torch.no_grad():
        for each in found:
            taken[each.target].fill_(each.fill)
            if each.source is not None:
                value = derive(given[each.source], each.steps, tiny)
                if value.shape != taken[each.target].shape:
                    raise NoRelabel(f"`{each.target}` would have the shape {list(value.shape)}")
                taken[each.target].copy_(value)
        for name in missing:
            if not name.endswith("bias"):
                raise NoRelabel(f"nothing gives its `{name}`")
            taken[name].zero_()
    used = {each.source for each in found}
    owners = parameter_aliases(source)
    if unused := [name for name in given if name not in used and owners.get(name) not in used]:
        raise NoRelabel(f"its `{unused[0]}` would be lost")


def _prompts(generator: torch.Generator) -> list[tuple[torch.Tensor, torch.Tensor]]:
    short = torch.randint(3, VOCABULARY, (2, _SHORT), generator=generator)
    long = torch.randint(3, VOCABULARY, (2, _LONG), generator=generator)
    padded = torch.ones_like(long)
    padded[0, :_PADDED] = 0
    return [(short, torch.ones_like(short)), (long, padded)]
