"""The rank-one route: W z + v (a'z), with a fitted so that a'z is close to 1 on every token.

The last weight of any MLP takes it. So every architecture with a linear one has this route, in every stack that loads
the model, at no cost and with no change of its config. It is not exact: a is fitted on calibration text. What it is off
by is measured on held-out text, and the verification holds it to limits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from patcher.architectures.analysis import Architecture
from patcher.architectures.model_class import as_saved, on_meta
from patcher.checkpoint.folder import CheckpointFolder
from patcher.checkpoint.names import stored_name
from patcher.checkpoint.safetensors_file import TensorInfo
from patcher.routes.disk_names import dtype_to_add_to, place_to_add, stored_tensors
from patcher.routes.plan import NotApplicable, Plan, TensorWrite, refuse_embedding
from patcher.routes.rank_one.calibration import calibration_tokens
from patcher.routes.rank_one.collect import fit_layers
from patcher.routes.rank_one.divergence import kl_report
from patcher.routes.rank_one.gather import LayerFit
from patcher.routes.rank_one.norm import norm_spread
from patcher.routes.rank_one.sites import Site, find_site
from patcher.routes.route import Route

NAME = "rank_one"


def plan(architecture: Architecture, layers: Sequence[int], checkpoint: CheckpointFolder | None) -> Plan:
    """Plan outer products on the last weight of each layer's MLP; :func:`fit` completes them.

    Raises:
        NotApplicable: a layer has no weight that writes linearly into the residual stream, or the checkpoint stores it
            in a form that cannot be added to.
    """
    refuse_embedding(layers, ", which is no MLP")
    stored = stored_tensors(checkpoint)
    tensors: list[TensorWrite] = []
    sites = {}
    for layer in layers:
        site = find_site(architecture, layer)
        sites[layer] = f"{architecture.blocks}.{layer}.{site.module}"
        parameter = f"{architecture.blocks}.{layer}.{site.parameter}"
        shape = (site.width, architecture.hidden) if site.transposed else (architecture.hidden, site.width)
        for index, (name, dtype) in _places(architecture, site, parameter, shape, stored).items():
            form: dict[str, Any] = {"transposed": site.transposed, "index": index}
            tensors.append(TensorWrite(name, parameter, "added", layer, site.factor, shape, dtype, **form))
    return Plan(
        route=NAME,
        architecture=architecture.class_name,
        blocks=architecture.blocks,
        sites=sites,
        tensors=tuple(tensors),
        stacks=architecture.loads,
        reason="a rank-one addition to the MLP's last weight, fitted so that it is close to a constant on every token; "
        "a probe found that the weight writes into the residual stream",
        exact=False,
        warnings=("The edit is fitted, not exact: how far it is off depends on the text.",),
    )


def _places(
    architecture: Architecture,
    site: Site,
    parameter: str,
    shape: tuple[int, ...],
    stored: Mapping[str, TensorInfo] | None,
) -> dict[int | None, tuple[str, str]]:
    """Expert (None: no routed expert) -> name on disk and dtype."""
    if not site.experts:
        return {None: place_to_add(parameter, shape, architecture, stored)}
    named = _expert_names(architecture, parameter, site.experts)
    if stored is None:
        return {index: (name, "F32") for index, name in named.items()}
    found: dict[int | None, tuple[str, str]] = {}
    for index, saved in named.items():
        name = stored_name(saved, stored, architecture.base_prefix)
        if name is None:
            raise NotApplicable(f"the checkpoint does not store `{saved}`")
        found[index] = name, dtype_to_add_to(stored[name], shape)
    return found


def _expert_names(architecture: Architecture, parameter: str, count: int) -> dict[int, str]:
    """What each slice of a fused parameter [experts, ...] is called on disk, by transformers' own conversion."""

    def look() -> dict[int, str] | None:
        model = on_meta(architecture.config, trust_remote_code=architecture.trust_remote_code)
        reverted = as_saved(model, {parameter: torch.arange(count).reshape(-1, 1, 1)})
        if reverted is None:
            return None
        single = {int(tensor): name for name, tensor in reverted.items() if tensor.numel() == 1}
        return {} if count == 1 and parameter in reverted else single

    names = architecture.once(("expert names", parameter, count), look, dict[int, str] | None)
    if names is None:
        raise NotApplicable(f"how the experts' `{parameter}` is stored is not known")
    if sorted(names) != list(range(count)):
        raise NotApplicable(
            f"`{parameter}` is stored as one tensor for all experts, and each needs an addition of its own"
        )
    return names


def fit(
    plan: Plan,
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    architecture: Architecture,
    vectors: Mapping[int, torch.Tensor],
    tokens: int = 100_000,
    seed: int = 0,
    progress: Callable[[str], None] = print,
) -> Plan:
    """Complete a plan of this route on the loaded stock model.

    Args:
        plan: from :func:`plan`.
        model: the base, loaded by stock code, in any dtype and on any device.
        tokenizer: its tokenizer.
        texts: calibration passages, from :func:`patcher.routes.rank_one.calibration.load_calibration`.
        architecture: the base's.
        vectors: layer -> [hidden]; what the residual stream is to gain after each block.
        tokens: use at most this many calibration tokens. Where the texts are few for the MLP's width, the model writes
            the rest itself (:mod:`patcher.routes.rank_one.calibration`).
        seed: of the order, the held-out split and the samples.
        progress: called with a line about what is going on.

    Returns:
        The plan with ``right`` in every carrier and with the report: ``tokens``, ``held_out_tokens``,
        ``sampled_tokens``, ``error_mean``, ``error_p95``, ``mean``, ``cosine``, ``ridge`` (of the layer with the
        largest error), ``layers`` (the same layer by layer), ``kl_hook_fit``, ``kl_hook_base`` and ``ratio``.

    Raises:
        InputError: there is no tokenizer or too little text, or the activations are not usable.
    """
    sites = {layer: find_site(architecture, layer) for layer in plan.sites}
    calibration = calibration_tokens(
        texts,
        model,
        tokenizer,
        limit=tokens,
        width=max(site.width for site in sites.values()),
        seed=seed,
        progress=progress,
    )
    fits = fit_layers(
        model, plan.blocks, sites, vectors, calibration.train, calibration.held_out, seed=seed, progress=progress
    )
    writes = []
    for write in plan.tensors:
        assert write.layer is not None
        right = fits[write.layer].right
        changes: dict[str, Any] = {"right": right if write.index is None else right[write.index]}
        norm = sites[write.layer].norm
        if norm is not None:
            module = model.get_submodule(f"{plan.blocks}.{write.layer}.{norm}")
            changes["spread"] = norm_spread(module, architecture.hidden)
        writes.append(replace(write, **changes))
    done = replace(plan, tensors=tuple(writes))
    kl = kl_report(done, model, vectors, calibration.held_out, progress=progress)
    return replace(done, fit={**_report(fits), "sampled_tokens": calibration.sampled, **kl})


def _report(fits: Mapping[int, LayerFit]) -> dict[str, Any]:
    layers = {str(layer): found.report() for layer, found in fits.items()}
    worst = max(layers.values(), key=lambda entry: (not math.isfinite(entry["error_mean"]), entry["error_mean"]))
    return {**worst, "layers": layers}


ROUTE = Route(NAME, plan, fit=fit)
