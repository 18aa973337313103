"""From the loaded model to fitted weights: what the projections read on calibration text, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import nn

from patcher.capture.batches import padded
from patcher.capture.forward import Enough, forward, steering_hooks
from patcher.progress.stage import Say, doing, silent
from patcher.routes.rank_one.gather import ConstantGatherer, ExpertGatherer, Gatherer, LayerFit, NormGatherer
from patcher.routes.rank_one.sites import Site

BATCH = 8


def fit_layers(
    model: nn.Module,
    blocks: str,
    sites: Mapping[int, Site],
    vectors: Mapping[int, torch.Tensor],
    train: Sequence[Sequence[int]],
    held_out: Sequence[Sequence[int]],
    *,
    seed: int = 0,
    rank: int | None = None,
    progress: Say = silent,
) -> dict[int, LayerFit]:
    """Fit every layer in one pass over ``train`` and one over ``held_out``.

    A later layer sees the earlier edits as the hook makes them (exactly), so the order of the fits does not matter.

    Args:
        model: the loaded stock model.
        blocks: path of its decoder blocks.
        sites: layer -> where it is edited.
        vectors: layer -> [hidden]; what the residual stream is to gain.
        train, held_out: sequences of token ids.
        rank: of the fits; see :class:`patcher.routes.rank_one.ridge.ConstantFit`.

    Raises:
        InputError: the activations are not finite or too few.
    """
    gatherers: dict[int, Gatherer] = {
        layer: _gatherer(model.get_submodule(f"{blocks}.{layer}"), site, vectors[layer], seed, rank)
        for layer, site in sites.items()
    }
    for part, rows, held in (("", train, False), ("held-out ", held_out, True)):
        with doing(progress, f"fitting on {part}calibration text", sum(map(len, rows)), "tokens") as fitting:
            for inputs, mask in batches(rows):
                _run_batch(model, blocks, gatherers, vectors, inputs, mask, held=held)
                fitting.advance(int(mask.sum()))
    return {layer: gatherer.solve() for layer, gatherer in gatherers.items()}


def batches(rows: Sequence[Sequence[int]]) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
    """Right-padded batches in the order of ``rows`` (their activations must come in a random order), with the mask."""
    for start in range(0, len(rows), BATCH):
        inputs, _ = padded(rows[start : start + BATCH], "right", 0)
        yield inputs, inputs["attention_mask"].bool()


def _run_batch(
    model: nn.Module,
    blocks: str,
    gatherers: Mapping[int, Gatherer],
    vectors: Mapping[int, torch.Tensor],
    inputs: Mapping[str, torch.Tensor],
    mask: torch.Tensor,
    *,
    held: bool,
) -> None:
    shifted = any(gatherer.needs_shift for gatherer in gatherers.values())
    for shift in (False, True) if shifted else (False,):
        with ExitStack() as stack:
            for gatherer in gatherers.values():
                if gatherer.needs_shift or not shift:
                    stack.enter_context(gatherer.watching(shift=shift))
            stack.enter_context(steering_hooks(model, blocks, vectors))
            last = model.get_submodule(f"{blocks}.{max(gatherers)}")
            stack.callback(last.register_forward_hook(_stop).remove)
            with suppress(Enough):
                forward(model, inputs)
    for gatherer in gatherers.values():
        gatherer.take(mask, held=held)


def _stop(_module: nn.Module, _inputs: Any, _output: Any) -> None:
    raise Enough


def _gatherer(block: nn.Module, site: Site, vector: torch.Tensor, seed: int, rank: int | None) -> Gatherer:
    kind = ExpertGatherer if site.experts else (NormGatherer if site.gain == "norm" else ConstantGatherer)
    return kind(block, site, vector, seed, rank)
