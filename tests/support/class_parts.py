"""A tiny model taken apart by the part that each tensor plays, so that another class can be put together from them."""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from patcher.architectures.config_keys import block_count
from patcher.architectures.model_class import quiet_transformers
from patcher.architectures.registry import rows

Variant = tuple[str, ...]

_ROLES = (
    ("experts_gate_up", r"experts\.(gate_up_proj|input_linear|fc1)"),
    ("experts_down", r"experts\.(down_proj|output_linear|fc2)"),
    ("router_correction", r"e_score_correction_bias|expert_bias|moe_statics"),
    ("router", r"(^|\.)(gate|router)(\.layer)?$"),
    ("shared_gate_up", r"shared\w*\.(gate_up_proj|input_linear|up_gate_proj)$"),
    ("shared_gate", r"shared\w*\.(gate_proj|w1)$"),
    ("shared_up", r"shared\w*\.(up_proj|w3)$"),
    ("shared_down", r"shared\w*\.(down_proj|w2|output_linear)$"),
    ("q_norm", r"(q_norm|query_layernorm|q_layernorm|query_norm|norm_q)$"),
    ("k_norm", r"(k_norm|key_layernorm|k_layernorm|key_norm|norm_k)$"),
    ("qkv", r"(qkv_proj|query_key_value|c_attn|Wqkv|qkv)$"),
    ("q", r"att\w*\.(\w+\.)*(q_proj|query|wq)$"),
    ("k", r"att\w*\.(\w+\.)*(k_proj|key|wk)$"),
    ("v", r"att\w*\.(\w+\.)*(v_proj|value|wv)$"),
    ("o", r"att\w*\.(\w+\.)*(o_proj|out_proj|dense|c_proj|wo|Wo)$"),
    ("gate_up", r"(gate_up_proj|input_linear|up_gate_proj)$"),
    ("gate", r"(gate_proj|w1)$"),
    ("up", r"(up_proj|w3|fc_in|fc1|c_fc|dense_h_to_4h)$"),
    ("down", r"(down_proj|w2|fc_out|fc2|mlp\.c_proj|dense_4h_to_h|output_linear)$"),
)
_TOP = (
    ("embedding", r"(embed_tokens|wte|embed_in|word_embeddings|embeddings?)$"),
    ("head", r"(lm_head|embed_out|output)$"),
)
_SPLIT = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up"), "shared_gate_up": ("shared_gate", "shared_up")}


@dataclass
class Parts:
    """The tensors of a tiny model by (block, part), block None outside of them.

    Attributes:
        tensors: the model's own tensors, whole or fused as the class has them.
        offset: parts whose norm multiplies by 1 + weight.
        layer_norms: parts that take the mean off.
        scales: block -> what its attention multiplies scores by; "embedding" -> what it multiplies embeddings by.
    """

    config: Any
    tensors: dict[tuple[int | None, str], torch.Tensor]
    offset: set[tuple[int | None, str]] = field(default_factory=set)
    layer_norms: set[tuple[int | None, str]] = field(default_factory=set)
    scales: dict[Any, float] = field(default_factory=dict)

    @property
    def whole(self) -> set[tuple[int | None, str]]:
        """The parts, fused ones by what they are made of."""
        found = set()
        for block, part in self.tensors:
            stem, _, leaf = part.rpartition(".")
            found |= {(block, f"{piece}.{leaf}") for piece in _SPLIT.get(stem, (stem,))}
        return found

    def without_place_in(self, other: Parts) -> str:
        """A part of this model that the other class has no tensor for; empty where there is none."""
        lost = self.whole - other.whole
        tied = {part for part in lost if part == (None, "head.weight")}
        biases = {part for part in lost if "norm" in part[1] and part[1].endswith("bias")}
        named = sorted({part for _, part in lost - tied - biases} or {part for _, part in lost - tied})
        return ", ".join(f"`{part}`" for part in named[:2])

    def structure(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Config keys that say which blocks have experts, as this model has them."""
        count = block_count(self.config)
        sparse = [(block, "router.weight") in self.tensors for block in range(count)]
        first = sparse.index(True) if any(sparse) else count
        keys = {
            "first_k_dense_replace": first,
            "num_dense_layers": first,
            "mlp_layer_types": ["sparse" if each else "dense" for each in sparse],
            "mlp_only_layers": [block for block, each in enumerate(sparse) if not each],
            "moe_layer_start_index": first,
            "moe_layer_end_index": count - 1,
            "moe_layer_interval": 1,
            "use_parallel_residual": getattr(self.config, "use_parallel_residual", False),
        }
        if (times := getattr(self.config, "intermediate_multiple_size", None)) is not None:
            keys["intermediate_size"] = int(self.config.hidden_size * times)
        shared = any(part.startswith("shared") for _, part in self.tensors)
        if not shared:
            keys |= dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 0)
        return {key: value for key, value in keys.items() if key in values}

    def variants(self, other: Parts) -> Iterator[Variant]:
        """Ways to lay the tensors out: the rotary order of rows, how fused ones are stacked, centred or not."""
        rotary = ("rows as they are", "pairs to halves", "halves to pairs")
        fused = any(part.startswith("qkv.") for _, part in (*self.tensors, *other.tensors))
        stacked = ("stacked", "by head") if fused else ("",)
        takes_mean = bool(self.layer_norms) and not other.layer_norms
        for variant in itertools.product(rotary, stacked, ("centred",) if takes_mean else ("",)):
            yield tuple(word for word in variant if word)

    def write_to(self, other: Parts, variant: Variant) -> None:
        """Give the other class's tensors what these parts hold; zeros (norms: ones) where there is nothing."""
        pieces = self._pieces(variant)
        with torch.no_grad():
            for key, tensor in other.tensors.items():
                block, part = key
                stem, _, leaf = part.rpartition(".")
                names = [f"{piece}.{leaf}" for piece in _SPLIT.get(stem, (stem,))]
                found = [pieces.get((block, name)) for name in names]
                if key == (None, "head.weight") and found[0] is None:
                    found = [pieces[None, "embedding.weight"]]
                if all(piece is None for piece in found):
                    blank = 1.0 if "norm" in stem and leaf == "weight" and key not in other.offset else 0.0
                    tensor.fill_(-1e30 if "sink" in stem else blank)
                    continue
                if any(piece is None for piece in found):
                    raise LookupError(f"only a part of {part}")
                value = _joined(found, stem, variant, other.config)
                value = self._rescaled(value, block, part, other)
                if value.shape != tensor.shape and value.ndim >= 2 and value.transpose(-1, -2).shape == tensor.shape:
                    value = value.transpose(-1, -2)
                tensor.copy_(value.reshape(tensor.shape) if value.numel() == tensor.numel() else value)

    def _pieces(self, variant: Variant) -> dict[tuple[int | None, str], torch.Tensor]:
        pieces: dict[tuple[int | None, str], torch.Tensor] = {}
        for (block, part), tensor in self.tensors.items():
            stem, _, leaf = part.rpartition(".")
            value = tensor.detach()
            if (block, part) in self.offset:
                value = value + 1.0
            split = _split(value, stem, variant, self.config)
            for name, piece in zip(_SPLIT.get(stem, (stem,)), split, strict=True):
                if name in ("q", "k", "q_norm", "k_norm"):
                    piece = _rotary(piece, variant, self.config)
                if "centred" in variant and name in ("o", "down", "experts_down", "shared_down", "embedding"):
                    dim = -1 if name == "embedding" or piece.ndim == 1 else -2
                    piece = piece - piece.mean(dim, keepdim=True)
                pieces[block, f"{name}.{leaf}"] = piece
        return pieces

    def _rescaled(self, value: torch.Tensor, block: int | None, part: str, other: Parts) -> torch.Tensor:
        """What the two classes multiply by otherwise goes into the tensors; the head keeps what it is."""
        if (block, part) in other.offset:
            return value - 1.0
        stem = part.rpartition(".")[0]
        normed = (block, "q_norm.weight") in other.tensors
        if stem == ("q_norm" if normed else "q") and block in self.scales and other.scales.get(block):
            return value * (self.scales[block] / other.scales[block])
        if stem == "embedding" and other.scales.get("embedding"):
            return value * (self.scales.get("embedding", 1.0) / other.scales["embedding"])
        if stem in ("o", "down", "experts_down", "shared_down"):
            factors = [float(getattr(each.config, "residual_multiplier", 1.0) or 1.0) for each in (self, other)]
            return value * (factors[0] / factors[1])
        return value


def parts_of(model: nn.Module, blocks: str, ids: torch.Tensor) -> Parts:
    """Take a tiny model apart; norms are told apart by the order in which they run."""
    order, seen = _norm_order(model, ids, blocks)
    tensors: dict[tuple[int | None, str], torch.Tensor] = {}
    kinds: dict[tuple[int | None, str], nn.Module] = {}
    known: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if known.setdefault(id(tensor), name) != name:
            continue
        block, inner = None, name
        if name.startswith(blocks + "."):
            number, _, inner = name.removeprefix(blocks + ".").partition(".")
            block = int(number)
        owner, _, leaf = name.rpartition(".")
        stem = inner.rpartition(".")[0]
        if owner in order:
            part = f"norm {order[owner]}"
        elif tensor.ndim == 3 and leaf not in ("weight", "bias"):
            part, leaf = _role(inner), "weight"
        elif re.search(r"correction|expert_bias", inner):
            part, leaf = "router_correction", "bias"
        else:
            part = _role(stem) if block is not None else next((to for to, ex in _TOP if re.search(ex, stem)), stem)
        if not part:
            part, leaf = inner, "itself"
        if inner.endswith("attention.dense_bias"):
            part, leaf = "o", "bias"
        key = (block, f"{part}.{leaf}")
        tensors[key if key not in tensors else (block, f"{inner}.itself")] = tensor
        if leaf == "weight" and ("norm" in part):
            kinds[key] = model.get_submodule(owner)
    parts = Parts(model.config, tensors, scales=seen)
    parts.offset = {key for key, module in kinds.items() if _adds_one(module)}
    width = int(model.config.hidden_size)
    takes_mean = {key for key, module in kinds.items() if key[1].startswith("norm") and _takes_mean(module, width)}
    bare = [each for each in model.modules() if "norm" in type(each).__name__.lower() and not list(each.parameters())]
    parts.layer_norms = takes_mean | {(None, "bare norms") for each in bare if _takes_mean(each, width)}
    return parts


def _role(stem: str) -> str:
    return next((role for role, pattern in _ROLES if re.search(pattern, stem)), stem)


def _norm_order(model: nn.Module, ids: torch.Tensor, blocks: str) -> tuple[dict[str, int], dict[Any, float]]:
    """Norm modules by their turn in their block (outside: of the model), and the factors that can be seen."""
    order: dict[str, int] = {}
    turns: dict[str, int] = {}
    handles = []
    scales: dict[Any, float] = {}
    for name, module in model.named_modules():
        prefix = re.match(re.escape(blocks) + r"\.(\d+)\.", name)
        scaling = getattr(module, "scaling", None)
        if prefix and isinstance(scaling, float):
            scales[int(prefix[1])] = scaling
        own = [each for each, _ in module.named_parameters(recurse=False)]
        of_heads = re.search(r"(^|[._])(q|k|query|key|q_a|kv_a|kv)_?(layer)?norm|norm_(q|k)$", name)
        if "weight" in own and "norm" in type(module).__name__.lower() and not of_heads:

            def turn(_module: nn.Module, *_: Any, name: str = name, place: str = prefix[0] if prefix else "") -> None:
                if name not in order:
                    order[name] = turns.get(place, 0)
                    turns[place] = order[name] + 1

            handles.append(module.register_forward_hook(turn))
    table = model.get_input_embeddings().weight

    def entering(_module: nn.Module, inputs: Any, keywords: Mapping[str, Any]) -> None:
        hidden = inputs[0] if inputs else keywords["hidden_states"]
        rows_ = table[ids].float()
        if hidden.shape == rows_.shape:
            scales["embedding"] = float((hidden * rows_).sum() / (rows_ * rows_).sum())

    handles.append(model.get_submodule(f"{blocks}.0").register_forward_pre_hook(entering, with_kwargs=True))
    try:
        with torch.no_grad(), quiet_transformers():
            model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return order, scales


def _adds_one(module: nn.Module) -> bool:
    """Whether a norm multiplies by 1 + weight: what it gives for a weight of zero is not zero."""
    weight = module.weight
    kept = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.zero_()
            bias = getattr(module, "bias", None)
            seen = module(torch.randn(1, 2, weight.shape[-1], generator=torch.Generator().manual_seed(1)))
            return bool(((seen if bias is None else seen - bias).abs() > 1e-6).any())
    except (RuntimeError, TypeError, IndexError):
        return False
    finally:
        weight.data.copy_(kept)


def _takes_mean(module: nn.Module, width: int) -> bool:
    try:
        with torch.no_grad():
            given = torch.randn(1, 2, width, generator=torch.Generator().manual_seed(1))
            return bool((module(given) - module(given + 3.0)).abs().max() < 1e-3)
    except (RuntimeError, TypeError, IndexError):
        return False


def _heads(config: Any) -> tuple[int, int, int]:
    heads = int(next(v for n in ("num_attention_heads", "n_head") if (v := getattr(config, n, None))))
    keys = int(getattr(config, "num_key_value_heads", None) or heads)
    return heads, keys, int(getattr(config, "head_dim", None) or config.hidden_size // heads)


def _split(value: torch.Tensor, stem: str, variant: Variant, config: Any) -> list[torch.Tensor]:
    if stem == "qkv":
        heads, keys, width = _heads(config)
        if "by head" in variant and heads == keys:
            return [piece.flatten(0, 1) for piece in value.unflatten(0, (heads, 3, width)).unbind(1)]
        return list(value.split([heads * width, keys * width, keys * width]))
    return list(value.chunk(2)) if stem in _SPLIT else [value]


def _joined(pieces: list[Any], stem: str, variant: Variant, config: Any) -> torch.Tensor:
    if stem == "qkv" and "by head" in variant:
        heads, keys, width = _heads(config)
        if heads == keys:
            return torch.stack([piece.unflatten(0, (heads, width)) for piece in pieces], 1).flatten(0, 2)
    return torch.cat(pieces) if len(pieces) > 1 else pieces[0]


def _rotary(piece: torch.Tensor, variant: Variant, config: Any) -> torch.Tensor:
    if "rows as they are" in variant:
        return piece
    width = _heads(config)[2]
    if piece.shape[0] % width:
        return piece
    share = (getattr(config, "rope_parameters", None) or {}).get("partial_rotary_factor", 1.0)
    turned = int(width * share)
    order = [*range(0, turned, 2), *range(1, turned, 2)]
    if "halves to pairs" in variant:
        order = [order.index(each) for each in range(turned)]
    index = torch.tensor([*order, *range(turned, width)])
    return piece.unflatten(0, (-1, width)).index_select(1, index).flatten(0, 1)


@functools.cache
def slot_flags(model_type: str) -> dict[str, Any]:
    """The config keys that create the slot in this type; none where the class always has it."""
    row = rows().get(model_type)
    flags = dict(row.flags) if row is not None else {}
    recorded = Path(__file__).parents[2] / "patcher" / "routes" / "relabel" / "relabels.json"
    targets = json.loads(recorded.read_text(encoding="utf-8"))["targets"]
    own = targets.get(model_type, {}).get("config", {})
    return {**{key: value for key, value in own.items() if key == "mlp_bias"}, **flags}
