"""From a tiny checkpoint to a patched copy and its comparison with a hook: the one place that follows the API."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from support.stock_loading import log_probs, stock_model
from support.tiny_models import VOCABULARY, tiny_tokenizer
from support.writing import write_steered
from transformers import AutoConfig

from patcher.architectures.analysis import Architecture
from patcher.architectures.model_class import quiet_transformers
from patcher.checkpoint.folder import CheckpointFolder
from patcher.routes import planner
from patcher.routes.plan import Plan
from patcher.routes.planner import choose_route

RESIDUAL_SHARE = 0.5
LEAST_EFFECT = 0.05
ROUNDING = 1e-7
AMPLIFICATIONS = (1.0, 8.0, 64.0)
REPORTED = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")


@dataclass(frozen=True)
class Patched:
    """A copy with an edit, and what was measured of it.

    Attributes:
        plan: the route that was chosen.
        difference: largest difference of the copy's log-probabilities from those of the hooked base.
        effect: largest difference of the hooked base's from the base's own.
        noise: the same from a base that is hooked with a vector rounded otherwise.
        vector_share: the vector's norm, as a share of the residual stream's.
        report: what the stock library reports of loading the copy and does not report of loading the base.
        moved: the largest difference of the copy from the base.
    """

    plan: Plan
    difference: float
    effect: float
    noise: float
    vector_share: float
    report: Mapping[str, Sequence[str]]
    moved: float


def probe_ids(vocabulary: int) -> torch.Tensor:
    """Two rows of 19 token ids."""
    return torch.randint(3, vocabulary, (2, 19), generator=torch.Generator().manual_seed(5))


def architecture_of(folder: Path) -> Architecture:
    """The stock class of a checkpoint."""
    with quiet_transformers():
        return Architecture(AutoConfig.from_pretrained(folder))


def planned(base: Path, layers: Sequence[int], **options: Any) -> Plan:
    """The route of the planner's choice; fitted ones are allowed unless ``exact`` says otherwise."""
    return choose_route(architecture_of(base), layers, CheckpointFolder(base), **{"exact": False, **options})


def patch_tiny(base: Path, copy: Path, layers: Sequence[int], **options: Any) -> Patched:
    """Patch a tiny checkpoint with random vectors, load the copy with the stock class, compare it with a hook.

    Args:
        base: the checkpoint.
        copy: where the copy goes; made.
        layers: the layers that gain a vector of half the residual norm; -1 is the embedding.
        options: for :func:`patcher.routes.planner.choose_route`.

    Raises:
        InputError: there is no route; the text says why.
    """
    plan = planned(base, layers, **options)
    model, own_report = stock_model(base)
    ids = probe_ids(int(model.config.vocab_size))
    before = log_probs(model, ids)
    norms = residual_norms(model, plan.blocks, layers, ids)
    generator = torch.Generator().manual_seed(7)
    hidden = int(model.config.hidden_size)
    directions = {
        layer: torch.nn.functional.normalize(torch.randn(hidden, generator=generator), dim=0) for layer in layers
    }
    for amplification in AMPLIFICATIONS:
        share = RESIDUAL_SHARE * amplification
        vectors = {layer: share * norms[layer] * direction for layer, direction in directions.items()}
        with hooks(model, plan.blocks, vectors):
            hooked = log_probs(model, ids)
        effect = largest(hooked, before)
        if effect > LEAST_EFFECT:
            break
    rounded = {
        layer: vector * (1.0 + ROUNDING * torch.randn(hidden, generator=generator)) for layer, vector in vectors.items()
    }
    with hooks(model, plan.blocks, rounded):
        noise = largest(log_probs(model, ids), hooked)
    if not plan.exact:
        plan = fitted(plan, model, base, vectors)
    write_steered(plan, vectors, CheckpointFolder(base), copy)
    steered, report = stock_model(copy)
    after = log_probs(steered, ids)
    assert type(steered).__name__ == plan.architecture, f"{type(steered).__name__} reads the copy"
    new = {
        key: sorted(map(str, set(map(str, report.get(key) or ())) - set(map(str, own_report.get(key) or ()))))
        for key in REPORTED
    }
    return Patched(
        plan=plan,
        difference=largest(after, hooked),
        effect=effect,
        noise=noise,
        vector_share=share,
        report={key: names for key, names in new.items() if names},
        moved=largest(after, before),
    )


def fitted(plan: Plan, model: torch.nn.Module, base: Path, vectors: Mapping[int, torch.Tensor]) -> Plan:
    """The plan of a fitted route, with its fit on random text: a random model knows no other."""
    fit = planner.ROUTES[plan.route].fit
    assert fit is not None, f"the route `{plan.route}` is not exact and has no fit"
    tokenizer = tiny_tokenizer()
    rows = torch.randint(3, VOCABULARY - 1, (200, 60), generator=torch.Generator().manual_seed(9))
    with quiet_transformers():
        return fit(
            plan,
            model,
            tokenizer,
            [tokenizer.decode(row) for row in rows],
            architecture=architecture_of(base),
            vectors=vectors,
            tokens=rows.numel(),
            progress=lambda _line: None,
        )


def largest(left: torch.Tensor, right: torch.Tensor) -> float:
    """Largest difference; NaN if there is any."""
    return float((left - right).abs().max())


def residual_norms(model: torch.nn.Module, blocks: str, layers: Sequence[int], ids: torch.Tensor) -> dict[int, float]:
    """Mean norm of the residual stream after each of the layers."""
    seen: dict[int, torch.Tensor] = {}
    with _changed(model, blocks, layers, lambda layer, hidden: seen.setdefault(layer, hidden.detach().float())):
        log_probs(model, ids)
    return {layer: float(seen[layer].norm(dim=-1).mean()) for layer in layers}


def hooks(
    model: torch.nn.Module, blocks: str, vectors: Mapping[int, torch.Tensor]
) -> contextlib.AbstractContextManager[None]:
    """While open, the residual stream after each layer gains its vector; it shares no code with the package."""
    return _changed(model, blocks, list(vectors), lambda layer, hidden: hidden + tiled(vectors[layer], hidden))


def tiled(vector: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """As often as several residual streams lie side by side in ``hidden``."""
    return vector.repeat(hidden.shape[-1] // len(vector))


@contextlib.contextmanager
def _changed(model: torch.nn.Module, blocks: str, layers: Sequence[int], change: Any) -> Iterator[None]:
    def before(_module: Any, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        if inputs:
            return (change(-1, inputs[0]), *inputs[1:]), keywords
        return inputs, {**keywords, "hidden_states": change(-1, keywords["hidden_states"])}

    def after(layer: int) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> Any:
            if isinstance(output, torch.Tensor):
                return change(layer, output)
            return (change(layer, output[0]), *output[1:])

        return hook

    places = {layer: model.get_submodule(f"{blocks}.{max(layer, 0)}") for layer in layers}
    handles = [
        place.register_forward_pre_hook(before, with_kwargs=True)
        if layer == -1
        else place.register_forward_hook(after(layer))
        for layer, place in places.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
