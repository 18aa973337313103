"""Where a block's MLP is projected into the residual stream: found by its shape, proven by a probe.

Nothing here goes by an architecture's name. On the tiny stand-in, an outer product is added to every weight of a block
whose output is as wide as the residual stream. What the residual after the block then gains is compared with what it
should gain, by the weight's input.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from patcher.architectures.analysis import Architecture
from patcher.architectures.model_class import quiet_transformers, submodule
from patcher.architectures.probe import TOLERANCE
from patcher.architectures.residual import attached
from patcher.architectures.shrink import shrink_config
from patcher.architectures.stand_in import FAILURES, RandomStandIn, apart, run_on
from patcher.errors.causes import cause_of
from patcher.routes.plan import NotApplicable
from patcher.routes.rank_one.experts import RoutedCall, expert_inputs, outer, watch_routing

Gain = Literal["constant", "token", "norm"]
_ATTENTION = ("attn", "attention")


@dataclass(frozen=True)
class Site:
    """The weight W of a block that takes an outer product, and how W z reaches the residual stream.

    Attributes:
        parameter: its name inside the block.
        module: the module inside the block that owns it.
        width: length of its input z.
        transposed: it lies as [width, hidden] instead of [hidden, width].
        experts: number of routed experts of a fused weight [experts, ...]; 0 where the projection is always on.
        gain: ``constant``: times ``factor``. ``token``: times a gate of the token's own. ``norm``: through a norm.
        factor: residual gain per unit of W z (of routed experts: per unit of their weighted sum; after a norm: per
            unit of the norm's output).
        norm: the module inside the block that is that norm.
    """

    parameter: str
    module: str
    width: int
    transposed: bool
    experts: int
    gain: Gain
    factor: float
    norm: str | None = None


def find_site(architecture: Architecture, layer: int) -> Site:
    """The best place for a rank-one edit of block ``layer``: always on before routed, constant before gated or normed.

    Raises:
        NotApplicable: no weight of the block writes linearly into the residual stream.
    """

    def find() -> Site | str:
        try:
            return _find(architecture, layer)
        except NotApplicable as finding:
            return str(finding)

    found = architecture.once(("rank-one site", layer), find, Site | str)
    if isinstance(found, str):
        raise NotApplicable(found)
    return found


def _find(architecture: Architecture, layer: int) -> Site:
    prefix = f"{architecture.blocks}.{layer}."
    shapes = {
        name.removeprefix(prefix): shape
        for name, shape in architecture.parameters.items()
        if name.startswith(prefix) and name not in architecture.aliases and name not in architecture.aliases.values()
    }
    try:
        probed = _Probed(architecture, layer)
        found = list(_measure(probed, shapes, architecture.hidden))
    except FAILURES as error:
        raise NotApplicable(f"layer {layer}: the probe could not run on a stand-in ({cause_of(error)})") from None
    order: Mapping[str, int] = {"constant": 0, "token": 1, "norm": 2}
    # A projection that is always on serves every token with one tensor; the MLP's comes after the attention's.
    found.sort(key=lambda site: (site.experts > 0, order[site.gain], any(mark in site.module for mark in _ATTENTION)))
    why = "no weight of this block writes linearly into the residual stream: " + (
        "; ".join(probed.refused.values()) or "none is as wide as the stream"
    )
    for site in found:
        factor = _real_factor(architecture, probed.config, site.factor)
        if factor is not None:
            return Site(**{**vars(site), "factor": factor})
        why = f"`{site.parameter}` has a factor of {site.factor:.4g}, and the registry has no rule for it"
    raise NotApplicable(f"layer {layer}: {why}")


def _real_factor(architecture: Architecture, tiny: Any, measured: float) -> float | None:
    """The factor under the real config, by the rule that the stand-in was seen to follow."""
    if abs(measured - 1) <= TOLERANCE:
        return 1.0
    stated, real = (architecture.stated_factor(config) for config in (tiny, architecture.config))
    return real if stated is not None and abs(measured / stated - 1) <= TOLERANCE else None


class _Probed:
    """A block of a random stand-in, and why each of its weights that does not serve does not."""

    def __init__(self, architecture: Architecture, layer: int) -> None:
        self.config, place = shrink_config(architecture.config, layer)
        self.stand_in = RandomStandIn.of(self.config, trust_remote_code=architecture.trust_remote_code)
        self.block = submodule(self.stand_in.model, f"{architecture.blocks}.{place}")
        self.ids, self.random = self.stand_in.ids, self.stand_in.random
        self.hidden = int(self.config.hidden_size)
        self.refused: dict[str, str] = {}

    def output(self, add: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """The block's output [tokens, hidden] and the logits."""
        with torch.no_grad(), quiet_transformers():
            hidden, logits = run_on(self.stand_in.model, self.block, self.ids, add=add)
        if hidden.ndim > 3:
            streams = "what a weight adds reaches the residual streams through gates that depend on the token"
            raise NotApplicable(f"the block has {hidden.shape[2]} residual streams: {streams}")
        return hidden.reshape(-1, self.hidden), logits


def _measure(probed: _Probed, shapes: Mapping[str, Sequence[int]], hidden: int) -> Iterator[Site]:
    for name, shape in shapes.items():
        try:
            yield from _candidate(probed, name, shape, hidden)
        except FAILURES as error:
            probed.refused[name] = f"`{name}` could not be probed ({cause_of(error)})"


def _candidate(probed: _Probed, name: str, shape: Sequence[int], hidden: int) -> Iterator[Site]:
    owner, _, leaf = name.rpartition(".")
    module = submodule(probed.block, owner)
    parameter = getattr(module, leaf, None)
    if module is None or not isinstance(parameter, nn.Parameter) or parameter.ndim != len(shape):
        if hidden in shape and len(shape) > 1:
            probed.refused[name] = f"the stand-in has no `{name}`"
        return
    if len(shape) == 2 and leaf == "weight" and not isinstance(module, nn.Embedding):
        transposed = type(module).__name__ == "Conv1D"
        if shape[1 if transposed else 0] == hidden and parameter.shape[1 if transposed else 0] == probed.hidden:
            width = shape[0 if transposed else 1]
            yield from _linear(probed, name, owner, module, parameter, width, transposed)
    elif len(shape) == 3 and hidden in shape[1:]:
        for transposed in (False, True):
            if shape[2 if transposed else 1] == hidden and parameter.shape[2 if transposed else 1] == probed.hidden:
                width = shape[1 if transposed else 2]
                yield from _experts(probed, name, owner, module, parameter, (shape[0], width), transposed)


def _linear(
    probed: _Probed, name: str, owner: str, module: nn.Module, parameter: nn.Parameter, width: int, transposed: bool
) -> Iterator[Site]:
    inputs: list[torch.Tensor] = []
    norms = [
        (path, part)
        for path, part in probed.block.named_modules()
        if tuple(getattr(getattr(part, "weight", None), "shape", ())) == (probed.hidden,)
    ]
    entering: dict[str, torch.Tensor] = {}
    handles = [module.register_forward_pre_hook(lambda _module, args: inputs.append(args[0].detach()))]
    for path, part in norms:
        handles.append(part.register_forward_hook(_keep_pair(entering, path)))
    with attached(*handles):
        before, _ = probed.output()
        if len(inputs) != 1 or inputs[0].numel() != probed.ids.numel() * inputs[0].shape[-1]:
            probed.refused[name] = f"`{name}` does not see every token once"
            return
        activations = inputs[0].reshape(-1, inputs[0].shape[-1]).float()
        left, right = probed.random(probed.hidden), probed.random(activations.shape[1]) / activations.norm(dim=1).mean()
        still = dict(entering)
        with _added(parameter, left, right, transposed):
            after, logits = probed.output()
    constant = activations @ right
    gain, deviation = _along(after - before, left, constant)
    if deviation <= TOLERANCE and float(gain.abs().max()) > 1e-6:
        if not _same_downstream(probed, before, after, logits):
            probed.refused[name] = f"`{name}`: later blocks see another change than the residual's"
            return
        spread = float((gain - gain.mean()).abs().max() / gain.mean().abs())
        kind: Gain = "constant" if spread <= 10 * TOLERANCE else "token"
        yield Site(name, owner, width, transposed, 0, kind, float(gain.mean()) if kind == "constant" else 1.0)
        return
    for path, _part in norms:
        if path + "/in" not in still:
            continue
        into, out = (entering[path + side] - still[path + side] for side in ("/in", "/out"))
        into, out = into.reshape(-1, probed.hidden), out.reshape(-1, probed.hidden)
        scale, off = _along(into, left, constant)
        # The norm takes the whole output of the MLP, and hands on nothing but its own output.
        if off > TOLERANCE or float((scale - 1).abs().max()) > 10 * TOLERANCE or float(out.norm()) < 1e-6:
            continue
        shift = after - before
        factor = float((shift * out).sum() / (out * out).sum())
        if float((shift - factor * out).abs().max()) <= TOLERANCE * float(shift.abs().max()):
            yield Site(name, owner, width, transposed, 0, "norm", factor, path)
            return
    probed.refused[name] = f"what `{name}` adds does not reach the residual stream unchanged"


def _experts(
    probed: _Probed,
    name: str,
    owner: str,
    module: nn.Module,
    parameter: nn.Parameter,
    sizes: tuple[int, int],
    transposed: bool,
) -> Iterator[Site]:
    calls: list[RoutedCall] = []
    with watch_routing(module, calls):
        before, _ = probed.output()
    if len(calls) != 1:
        probed.refused[name] = f"`{name}`: its module is not called with tokens, indices and weights"
        return
    call = calls[0]
    count, width = parameter.shape[0], parameter.shape[1 if transposed else 2]
    left, rights = probed.random(probed.hidden), probed.random(count, width)
    total = torch.zeros(len(before))
    for expert in range(count):
        inputs = expert_inputs(module, parameter, call, expert, width)
        if inputs is None or inputs.activations.shape[1:] != (width,):
            probed.refused[name] = f"`{name}` is not multiplied expert by expert"
            return
        rights[expert] /= inputs.activations.norm(dim=1).mean().clamp(min=1e-6) if len(inputs.activations) else 1.0
        total.index_add_(0, inputs.tokens, inputs.weights.float() * (inputs.activations.float() @ rights[expert]))
    with _added(parameter, left, rights, transposed):
        after, logits = probed.output()
    gain, deviation = _along(after - before, left, total)
    spread = float((gain - gain.mean()).abs().max() / gain.mean().abs())
    if deviation <= TOLERANCE and spread <= 10 * TOLERANCE and _same_downstream(probed, before, after, logits):
        yield Site(name, owner, sizes[1], transposed, sizes[0], "constant", float(gain.mean()))
    else:
        probed.refused[name] = f"what the experts' `{name}` adds does not reach the residual stream unchanged"


def _along(shift: torch.Tensor, left: torch.Tensor, constant: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Gain of each token along ``left`` per unit of ``constant``, and the largest deviation from that direction."""
    along = shift @ left / (left @ left)
    deviation = float((shift - torch.outer(along, left)).abs().max() / shift.abs().max().clamp(min=1e-12))
    clear = constant.abs() > 0.05 * constant.abs().max()
    return (along / constant)[clear], deviation


def _same_downstream(probed: _Probed, before: torch.Tensor, after: torch.Tensor, logits: torch.Tensor) -> bool:
    shift = (after - before).reshape(*probed.ids.shape, -1)
    _, hooked = probed.output(add=shift)
    return apart(logits, hooked) <= 1e-3


def _keep_pair(into: dict[str, torch.Tensor], path: str) -> Any:
    def hook(_module: nn.Module, inputs: Any, output: Any) -> None:
        if inputs and isinstance(output, torch.Tensor):
            into[path + "/in"], into[path + "/out"] = inputs[0].detach().float(), output.detach().float()

    return hook


@contextmanager
def _added(parameter: nn.Parameter, left: torch.Tensor, right: torch.Tensor, transposed: bool) -> Iterator[None]:
    """While open, ``parameter`` holds the outer product too; ``right`` is [width] or [experts, width]."""
    saved = parameter.detach().clone()
    try:
        with torch.no_grad():
            parameter.add_(outer(left, right, transposed))
        yield
    finally:
        with torch.no_grad():
            parameter.copy_(saved)
