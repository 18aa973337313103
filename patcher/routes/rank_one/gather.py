"""What one layer's fit sees of a calibration batch: one class for each way in which an MLP reaches the residual."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from patcher.architectures.residual import attached, block_output
from patcher.errors import InputError
from patcher.routes.rank_one.experts import RoutedCall, expert_inputs, watch_routing
from patcher.routes.rank_one.norm import NormResponse
from patcher.routes.rank_one.ridge import RIDGES, ConstantFit
from patcher.routes.rank_one.sites import Site

_KEPT = 1 << 13
"""Held-out tokens of which more than the fit needs is kept."""
_EXPERT_BYTES = 8 << 30


@dataclass(frozen=True)
class LayerFit:
    """The fit of one layer.

    Attributes:
        right: [width] fp32, or [experts, width].
        ridge: the strength that was chosen.
        errors: per held-out token, |gain - v| / |v| of the residual stream.
        gains: per held-out token, the part of the gain along v, per |v|.
        cosines: per held-out token, between the gain and v.
        tokens: tokens that were fitted.
        unfitted_experts: routed experts that no calibration token went to.
    """

    right: torch.Tensor
    ridge: float
    errors: torch.Tensor
    gains: torch.Tensor
    cosines: torch.Tensor
    tokens: int
    unfitted_experts: int = 0

    def report(self) -> dict[str, Any]:
        """The numbers of the fit, JSON-ready."""
        result: dict[str, Any] = {
            "tokens": self.tokens,
            "held_out_tokens": len(self.errors),
            "error_mean": float(self.errors.mean()),
            "error_p95": float(self.errors.quantile(0.95)),
            "mean": float(self.gains.mean()),
            "cosine": float(self.cosines.mean()),
            "ridge": self.ridge,
        }
        return {**result, "unfitted_experts": self.unfitted_experts} if self.unfitted_experts else result


@dataclass
class Gatherer:
    """What one layer's fit sees of a batch. Subclasses know how the projection reaches the residual stream."""

    block: nn.Module
    site: Site
    vector: torch.Tensor
    seed: int = 0
    rank: int | None = None
    needs_shift: bool = False
    seen: list[torch.Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Make what the subclass accumulates into."""

    @property
    def module(self) -> nn.Module:
        return self.block.get_submodule(self.site.module)

    @contextmanager
    def watching(self, *, shift: bool) -> Iterator[None]:
        """Hooks for one forward pass; ``shift``: the second one, in which the projection's output is moved.

        Only those that need it are watching then.
        """
        raise NotImplementedError

    @staticmethod
    def keep(module: nn.Module, seen: list[torch.Tensor]) -> RemovableHandle:
        """A hook that keeps what the module reads."""
        return module.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].detach()))

    def take(self, mask: torch.Tensor, *, held: bool) -> None:
        """Take in what was seen; ``mask`` [batch, width] tells tokens from filling."""
        raise NotImplementedError

    def solve(self) -> LayerFit:
        """The fit, with its errors on the held-out tokens."""
        raise NotImplementedError

    def one(self, mask: torch.Tensor) -> torch.Tensor:
        """The projection's input on the batch's tokens: [tokens, width]."""
        if len(self.seen) != 1:
            raise InputError(
                "the MLP's output projection is not run once a pass in the loaded model",
                where=self.site.parameter,
                remedy="load it without compilation or custom kernels",
            )
        return _tokens(self.seen.pop(), mask)


class ConstantGatherer(Gatherer):
    """The projection's output reaches the stream times a constant, or times a gate of each token's own."""

    def __post_init__(self) -> None:
        self.fit = ConstantFit(self.site.width, rank=self.rank, seed=self.seed)
        self.needs_shift = self.site.gain == "token"
        self._outputs: list[torch.Tensor] = []
        self._amount = 1.0

    @contextmanager
    def watching(self, *, shift: bool) -> Iterator[None]:
        def move(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
            # As large as the stream, so that half precision still resolves what the gate lets through.
            size = self._outputs[0].float().square().mean().sqrt() / self.vector.square().mean().sqrt()
            self._amount = float(size) or 1.0
            return output + (self._amount * self.vector).to(output.device, output.dtype)

        def after(_module: nn.Module, _inputs: Any, output: Any) -> None:
            self._outputs.append(block_output(output).detach())

        seeing = self.module.register_forward_hook(move) if shift else self.keep(self.module, self.seen)
        with attached(seeing, *([self.block.register_forward_hook(after)] if self.needs_shift else [])):
            yield

    def take(self, mask: torch.Tensor, *, held: bool) -> None:
        features = self.one(mask)
        if self.needs_shift:
            before, after = (_tokens(output, mask).float() for output in self._outputs)
            self._outputs.clear()
            vector = self.vector.to(before.device).float()
            gate = (after - before) @ vector / (vector @ vector) / self._amount
            features = features.float() * gate[:, None]
        self.fit.update(features, held_out=held)

    def solve(self) -> LayerFit:
        fitted = self.fit.solve(exact_mean=True)
        held = self.fit.held_out()
        gains = held.activations.double() @ fitted.right.double()
        return LayerFit(fitted.right, fitted.ridge, (gains - 1).abs(), gains, gains.sign(), fitted.tokens)


class NormGatherer(Gatherer):
    """A norm follows: the target of each token is the amount with which the norm's output comes closest to v."""

    def __post_init__(self) -> None:
        assert self.site.norm is not None
        self.fit = ConstantFit(self.site.width, rank=self.rank, seed=self.seed)
        self.response = NormResponse(self.block.get_submodule(self.site.norm), self.vector, self.site.factor)
        self._before: list[torch.Tensor] = []
        self._kept: list[tuple[torch.Tensor, torch.Tensor]] = []

    @contextmanager
    def watching(self, *, shift: bool) -> Iterator[None]:
        assert self.site.norm is not None
        norm = self.block.get_submodule(self.site.norm)
        with attached(self.keep(self.module, self.seen), self.keep(norm, self._before)):
            yield

    def take(self, mask: torch.Tensor, *, held: bool) -> None:
        features, before = self.one(mask), _tokens(self._before.pop(), mask).float()
        amounts, weights = self.response.best_amounts(before)
        self.fit.update(features, amounts, weights, held_out=held)
        if held and sum(len(part) for part, _before in self._kept) < _KEPT:
            self._kept.append((features.float().cpu(), before.cpu()))

    def solve(self) -> LayerFit:
        fitted = self.fit.solve()
        parts = []
        for features, before in self._kept:
            parts.append(self.response.gain(before, features @ fitted.right))
        gain = torch.cat(parts).double()
        vector = self.vector.cpu().double()
        norm = vector.norm()
        along = gain @ vector / norm**2
        cosines = along * norm / gain.norm(dim=-1).clamp(min=1e-30)
        return LayerFit(fitted.right, fitted.ridge, (gain - vector).norm(dim=-1) / norm, along, cosines, fitted.tokens)


class ExpertGatherer(Gatherer):
    """Routed experts: each is fitted on the tokens that come to it, so that their weighted sum is the constant."""

    def __post_init__(self) -> None:
        count, width = self.site.experts, self.site.width
        # Second moments of every expert at once; where they would not fit, in a smaller basis.
        fitting = int((_EXPERT_BYTES / (8 * count)) ** 0.5)
        rank = self.rank if self.rank is not None else (fitting if fitting < width else None)
        self.fits = [ConstantFit(width, rank=rank, seed=self.seed + index) for index in range(count)]
        self._calls: list[RoutedCall] = []
        self._held: list[list[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]]] = []
        self._held_tokens: list[int] = []
        self.tokens = 0

    @contextmanager
    def watching(self, *, shift: bool) -> Iterator[None]:
        with watch_routing(self.module, self._calls):
            yield

    def take(self, mask: torch.Tensor, *, held: bool) -> None:
        if len(self._calls) != 1:
            raise InputError("the experts are not run once a pass in the loaded model", where=self.site.parameter)
        call = self._calls.pop()
        real = mask.reshape(-1).to(call.hidden.device)
        call = RoutedCall(call.hidden[real], call.chosen[real], call.weights[real])
        total = call.weights.double().sum(dim=-1).clamp(min=1e-6)
        parameter = self.block.get_parameter(self.site.parameter)
        kept = []
        self.tokens += 0 if held else len(call.hidden)
        for expert, fit in enumerate(self.fits):
            inputs = expert_inputs(self.module, parameter, call, expert, self.site.width)
            if inputs is None:
                raise InputError("the experts' inputs cannot be seen in the loaded model", where=self.site.parameter)
            if not len(inputs.tokens):
                continue
            goal = 1 / total[inputs.tokens]
            fit.update(inputs.activations, goal, inputs.weights.double().square(), held_out=held)
            if held and sum(self._held_tokens) < _KEPT:
                kept.append(
                    (expert, inputs.tokens.cpu(), inputs.weights.float().cpu(), inputs.activations.float().cpu())
                )
        if kept:
            self._held.append(kept)
            self._held_tokens.append(len(call.hidden))

    def solve(self) -> LayerFit:
        """One ridge for all experts (some see few held-out tokens): the one that serves their sum best."""
        used = [fit for fit in self.fits if fit.tokens]
        if not used:
            raise InputError("there is no calibration token to fit on", remedy="give more calibration texts")
        found = [fit.candidates(exact_mean=True) if fit.tokens else {} for fit in self.fits]
        best: tuple[float, float, torch.Tensor, torch.Tensor] | None = None
        for ridge in RIDGES:
            if any(ridge not in options for options in found if options):
                continue
            rights = torch.stack([options.get(ridge, torch.zeros(self.site.width)) for options in found])
            gains = self._gains(rights)
            loss = float((gains - 1).square().sum())
            if best is None or loss < best[0]:
                best = loss, ridge, rights, gains
        if best is None:
            raise InputError("the experts' activations are too degenerate", remedy="give more calibration texts")
        _loss, ridge, rights, gains = best
        unused = len(self.fits) - len(used)
        return LayerFit(rights, ridge, (gains - 1).abs(), gains, gains.sign(), self.tokens, unused)

    def _gains(self, rights: torch.Tensor) -> torch.Tensor:
        parts = []
        for count, kept in zip(self._held_tokens, self._held, strict=True):
            gain = torch.zeros(count, dtype=torch.float64)
            for expert, tokens, weights, activations in kept:
                gain.index_add_(0, tokens, weights.double() * (activations.double() @ rights[expert].double()))
            parts.append(gain)
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)


def _tokens(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return states.reshape(-1, states.shape[-1])[mask.reshape(-1).to(states.device)]
