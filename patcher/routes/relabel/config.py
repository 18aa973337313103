"""The config of a relabelled checkpoint: every field of the target class stated, none left to its default.

Defaults differ between classes (rope theta, epsilon, tying, layer types ...), and between releases of one class.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from patcher.architectures.config_keys import block_count, stated
from patcher.architectures.decoder import own_values, put_inside
from patcher.architectures.model_class import quiet_transformers
from patcher.routes.relabel.guards import has_window, rope, rotary_fraction

CARRIED = ("dtype", "torch_dtype", "transformers_version", "bos_token_id", "eos_token_id", "pad_token_id")
"""Keys of a config.json that describe the checkpoint or its text, not the function."""

UNROTATED = 1e30
"""Divides a rotary frequency: at any position the angle is below fp32's resolution, so nothing is rotated."""


def config_class(model_type: str) -> Any:
    """transformers' config class for ``model_type``, or None where this release has none."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        return CONFIG_MAPPING[model_type]
    except KeyError:
        return None


def own_fields(model_type: str) -> list[str]:
    """The fields that the config class of ``model_type`` declares itself."""
    from transformers import PreTrainedConfig

    shared = {item.name for item in dataclasses.fields(PreTrainedConfig)}
    return [item.name for item in dataclasses.fields(config_class(model_type)) if item.name not in shared]


def target_config(
    source: Any, to: str, rules: Mapping[str, Any], raw: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """A complete config.json for the class of model type ``to``.

    Args:
        source: the source's transformers config.
        to: the target's model type.
        rules: field -> constant, {"from": field}, {"per_layer": value} or {"computed": name of a rule here}; fields
            that are not here have the source's value.
        raw: the source's config.json, for the keys that are carried over as they were written.

    Raises:
        LookupError: a field of the target is neither stated nor a field of the source.
    """
    values: dict[str, Any] = {"model_type": to}
    for name in dict.fromkeys([*own_fields(to), *rules]):
        if name in rules:
            values[name] = _value(rules[name], source)
        elif name in vars(source) and (own := stated(source, name, ...)) is not ...:
            values[name] = copy.deepcopy(own)
        else:
            raise LookupError(f"`{name}` of {to} is not stated, and {source.model_type} has no such field")
    values.update(_rope_spellings(values.get("rope_parameters")))
    before = raw if raw is not None else own_values(source)
    for name in CARRIED:
        if name in before and (name not in values or values[name] is None):
            value = before[name]
            values[name] = str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
    return values


def parsed(values: Mapping[str, Any], source: Any = None) -> Any:
    """The transformers config that a stock loader makes of a config.json with ``values``.

    Args:
        source: a config; if it is of the decoder in a wrapper, so is the new one.

    Raises:
        ValueError: that wrapper's class takes no such decoder.
    """
    with quiet_transformers():
        return put_inside(config_class(values["model_type"]).from_dict(copy.deepcopy(dict(values))), source)


def _rope_spellings(parameters: Any) -> dict[str, Any]:
    """The same in the spelling of transformers 4 and of other readers; they would fall back on their default theta."""
    if not isinstance(parameters, dict):
        return {}
    scaling = {key: value for key, value in parameters.items() if key not in ("rope_theta", "partial_rotary_factor")}
    plain = scaling.get("rope_type", "default") == "default"
    return {"rope_theta": parameters["rope_theta"], "rope_scaling": None if plain else scaling}


def _value(rule: Any, source: Any) -> Any:
    kind: str
    argument: Any
    kind, argument = next(iter(rule.items())) if isinstance(rule, dict) and len(rule) == 1 else ("", None)
    if kind == "from":
        return copy.deepcopy(getattr(source, argument))
    if kind == "per_layer":
        return [_value(argument, source)] * block_count(source)
    if kind == "computed":
        return COMPUTED[argument](source)
    return copy.deepcopy(rule)


def head_dim(source: Any) -> int:
    """Width of an attention head, as the classes derive it."""
    width = stated(source, "head_dim")
    return int(width if width is not None else source.hidden_size // source.num_attention_heads)


def _layer_types(source: Any) -> list[str]:
    types = stated(source, "layer_types")
    return list(types) if types is not None else ["sliding_attention"] * block_count(source)


def _windowed_layers(source: Any) -> list[str]:
    # llama.cpp does not load a model of this class in which no block has a window.
    return _layer_types(source) if has_window(source) else ["sliding_attention"] * block_count(source)


def _window(source: Any) -> int:
    return int(source.sliding_window if has_window(source) else source.max_position_embeddings)


def _rope_layers(source: Any) -> list[int]:
    """1 for a block that rotates queries and keys, 0 for one that does not."""
    if stated(source, "position_embedding_type", "rope") != "rope":
        return [0] * block_count(source)
    rotated = stated(source, "no_rope_layers")
    return (
        [1] * block_count(source) if rotated is None else [int(bool(each)) for each in rotated[: block_count(source)]]
    )


def _rope_theta_of_layers(source: Any) -> list[float]:
    theta = rope(source).get("rope_theta", 0.0)
    return [theta * rotated for rotated in _rope_layers(source)]


def _attention_scale(source: Any) -> float:
    scalar = float(stated(source, "query_pre_attn_scalar") or head_dim(source))
    return 1.0 / math.sqrt(scalar)


def _rope_without_position_scaling(source: Any) -> dict[str, Any]:
    dropped = ("llama_4_scaling_beta", "max_position_embeddings", "type")
    return {key: copy.deepcopy(value) for key, value in rope(source).items() if key not in dropped}


def rotary_scale(source: Any) -> float:
    """What the source multiplies the rotated part of queries and of keys by (yarn, longrope)."""
    return _frequencies(source)[2]


def _frequencies(source: Any) -> tuple[torch.Tensor, torch.Tensor, float, int]:
    """The source's rotary frequencies in short texts and in long ones, their scale, and the length between them."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = rope(source)
    kind = parameters.get("rope_type", "default")
    original = int(parameters.get("original_max_position_embeddings") or source.max_position_embeddings)
    if kind == "default":
        rotated = int(head_dim(source) * rotary_fraction(source))
        exponents = torch.arange(0, rotated, 2, dtype=torch.int64).float() / rotated
        frequencies = 1.0 / (float(parameters["rope_theta"]) ** exponents)
        return frequencies, frequencies, 1.0, original
    cpu = torch.device("cpu")
    short, scale = ROPE_INIT_FUNCTIONS[kind](source, cpu)
    long, _ = ROPE_INIT_FUNCTIONS[kind](source, cpu, seq_len=original + 1)
    return short, long, float(scale), original


def _rope_as_factors(source: Any) -> dict[str, Any]:
    """Any fixed frequencies of a part of each head, as the factors of a full rotary embedding of type ``longrope``.

    Its own scale would reach the unrotated part as well, so it is 1 here, and the queries carry the source's.
    """
    short, long, _, original = _frequencies(source)
    theta, width = float(rope(source)["rope_theta"]), head_dim(source)
    return {
        "rope_type": "longrope",
        "rope_theta": theta,
        "short_factor": _factors(short, theta, width),
        "long_factor": _factors(long, theta, width),
        "factor": 1.0,
        "attention_factor": 1.0,
        "original_max_position_embeddings": original,
    }


def _rope_as_llama3(source: Any) -> dict[str, Any]:
    """A partial rotary embedding, or none at all, as a full one of type ``llama3``, which every stack reads.

    That type divides the frequencies whose wavelength is above a limit. With the base raised to the inverse of the
    rotated fraction the first frequencies are the source's; the limit lies between the last of them and the next,
    and what is above it is divided until nothing is rotated (Llama Team, "The Llama 3 Herd of Models", 2024).
    """
    theta, width = float(rope(source)["rope_theta"]), head_dim(source)
    rotated = int(width * rotary_fraction(source))
    above = 2 * math.pi * theta
    step = theta ** (2 / rotated)  # between the wavelengths of neighbours
    positions = max(int(source.max_position_embeddings) // 2, 1)
    return {
        "rope_type": "llama3",
        "rope_theta": theta ** (width / rotated),
        "factor": UNROTATED,
        "low_freq_factor": positions / (above * step ** (-1 / 3)),
        "high_freq_factor": positions / (above * step ** (-2 / 3)),
        "original_max_position_embeddings": positions,
    }


def _any_attention_bias(source: Any) -> bool:
    return bool(source.attention_bias or source.attention_out_bias)


def _factors(frequencies: torch.Tensor, theta: float, width: int) -> list[float]:
    """What the frequencies of a full embedding must be divided by, such that fp32 arithmetic gives exactly these."""
    exponents = torch.arange(0, width, 2, dtype=torch.int64).float() / width
    powers = (theta**exponents)[: len(frequencies)]
    nearest = (1.0 / (frequencies.double() * powers.double())).float()
    # The reader computes 1 / (factor * power) in fp32; of the factor's neighbours one usually gives the very bits.
    best, best_error = nearest.clone(), torch.full_like(nearest, math.inf)
    for step in (0, 1, -1, 2, -2, 3, -3):
        candidate = nearest * (1.0 + step * 2.0**-23)
        error = (1.0 / (candidate * powers) - frequencies).abs()
        better = error < best_error
        best, best_error = torch.where(better, candidate, best), torch.where(better, error, best_error)
    return [*(float(value) for value in best), *([UNROTATED] * (width // 2 - len(frequencies)))]


def factor_of(name: str, source: Any) -> float:
    """A factor that the source's class multiplies by and the target's does not."""
    return float(FACTORS[name](source))


def _tied_embedding(source: Any) -> float:
    return float(source.embedding_multiplier) if source.tie_word_embeddings else 1.0


def _dense_or_sparse(source: Any) -> list[str]:
    first = int(source.first_k_dense_replace)
    return ["dense" if layer < first else "sparse" for layer in range(block_count(source))]


def _shared_experts(source: Any) -> int:
    """How many experts' widths the shared one has."""
    width = int(stated(source, "shared_intermediate_size", 0) or 0)
    return width // int(source.intermediate_size)


FACTORS: Mapping[str, Callable[[Any], float]] = {
    "residual multiplier": lambda source: source.residual_multiplier,
    "embedding multiplier": lambda source: source.embedding_multiplier,
    "attention multiplier": lambda source: source.attention_multiplier * math.sqrt(head_dim(source)),
    "logits scaling": lambda source: 1.0 / (source.logits_scaling * _tied_embedding(source)),
}
"""Every factor by the name that relabels.json uses."""

COMPUTED: Mapping[str, Callable[[Any], Any]] = {
    "head_dim": head_dim,
    "layer_types": _layer_types,
    "rope_theta": lambda source: rope(source)["rope_theta"],
    "root_of_hidden": lambda source: float(source.hidden_size) ** 0.5,
    "attention_scale": _attention_scale,
    "rope_without_position_scaling": _rope_without_position_scaling,
    "rope_as_factors": _rope_as_factors,
    "rope_as_llama3": _rope_as_llama3,
    "windowed_layers": _windowed_layers,
    "rope_layers": _rope_layers,
    "rope_theta_of_layers": _rope_theta_of_layers,
    "window": _window,
    "any_attention_bias": _any_attention_bias,
    "dense_or_sparse": _dense_or_sparse,
    "shared_experts": _shared_experts,
    "neox_width": lambda source: int(source.hidden_size * source.intermediate_multiple_size),
}
"""Every rule for a value that follows from several fields, by the name that relabels.json uses."""
