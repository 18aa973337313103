"""A tiny stand-in for a released config: every structural choice kept, every size made small.

What a slot does to the residual stream depends on flags, norms and multipliers, not on widths, so a probe on the
stand-in answers for the real model in milliseconds.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable
from typing import Any

from patcher.architectures.config_keys import (
    BLOCK_COUNTS,
    EXPERTS,
    EXPERTS_PER_TOKEN,
    IDLE_EXPERTS,
    block_count,
    stated,
    whole_number,
)

HIDDEN = 64
WIDE, NARROW = 160, 96
"""Inner widths of the stand-in's MLPs: with two neurons a coordinate and some to spare, and with fewer."""
LAYERS = 4
VOCABULARY = 256

_HEAD_COUNTS = ("num_attention_heads", "n_head", "num_heads", "encoder_attention_heads", "decoder_attention_heads")
_KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads", "num_key_value_groups")
_HIDDEN = ("hidden_size", "n_embd", "d_model", "embedding_dim", "word_embed_proj_dim", "dim", "embedding_size")
_INTERMEDIATE = (
    "intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "decoder_ffn_dim", "encoder_ffn_dim",
    "moe_intermediate_size", "shared_expert_intermediate_size", "moe_shared_expert_intermediate_size",
    "shared_intermediate_size", "dff", "lru_width", "dim_ff",
)  # fmt: skip
_LAYERS = (*BLOCK_COUNTS, "encoder_layers", "num_encoder_layers", "num_layers_per_stack")
_HEAD_WIDTHS = ("head_dim", "attention_head_dim", "kv_channels", "dim_head", "d_head")
_TOKEN_IDS = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id", "sep_token_id")
_EXPERTS = (*EXPERTS, *IDLE_EXPERTS)
_AT_MOST = {
    **dict.fromkeys(_EXPERTS, 4), **dict.fromkeys(EXPERTS_PER_TOKEN, 2),
    "q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
    "mamba_d_state": 8, "ssm_state_size": 8, "state_size": 8, "time_step_rank": 8,
    "n_shared_experts": 1, "moe_num_shared_experts": 1, "index_topk": 4, "adapter_rank": 8,
    "n_group": 1, "topk_group": 1, "n_groups": 1, "mamba_n_groups": 1, "mamba_ngroups": 1,
    "chunk_size": 16, "mamba_chunk_size": 16, "linear_head_dim": 16, "linear_num_heads": 4,
    "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 16, "unpadded_vocab_size": VOCABULARY,
}  # fmt: skip
_LAYER_INDICES = ("attn_layer_indices", "hybrid_layer_ids", "mlp_only_layers", "moe_layers")
_HEADS = 4


def shrink_config(config: Any, layer: int) -> tuple[Any, int]:
    """A small copy of ``config`` and the block in it that stands for block ``layer``.

    Args:
        config: a transformers config of a causal LM.
        layer: 0-based block index in the real model.

    Returns:
        The shrunk config, and the index of the stand-in block (its entry in per-layer lists is ``layer``'s own).
    """
    if stated(config, "is_heterogeneous", False):
        return _shrink_layer_by_layer(config, layer)
    tiny = copy.deepcopy(config)
    count = block_count(config)
    kept = kept_layers(config, layer)
    stand_in = kept.index(layer)

    def each(names: Iterable[str], small: Callable[[int], int]) -> None:
        for name in names:
            if (real := whole_number(config, name)) is not None:
                _set(tiny, name, small(real))

    head_dim = 16
    heads = _get(config, _HEAD_COUNTS)
    each(_HIDDEN, lambda _real: HIDDEN)
    # OPT-350m projects its embeddings to another width; the difference is the structure to keep.
    if stated(config, "word_embed_proj_dim") not in (None, config.hidden_size):
        _set(tiny, "word_embed_proj_dim", HIDDEN // 2)
    each(_HEAD_COUNTS, lambda _real: _HEADS)
    if heads:
        each(_KEY_VALUE_HEADS, lambda real: _HEADS if real == heads else (1 if real == 1 else 2))
    each(_HEAD_WIDTHS, lambda _real: head_dim)
    rotary = stated(config, "rotary_dim")
    if isinstance(rotary, int) and heads:
        _set(tiny, "rotary_dim", head_dim if rotary * heads >= config.hidden_size else head_dim // 2)
    # Zero means that the module is not there.
    each(_INTERMEDIATE, lambda real: _inner(real, config) if real else 0)
    each(("lru_width",), lambda real: HIDDEN if real else 0)
    for name, most in _AT_MOST.items():
        each((name,), functools.partial(min, most))
    # Zamba2's attention reads the residual and the embedding side by side.
    if _states(config, "attention_hidden_size"):
        _set(tiny, "attention_hidden_size", HIDDEN * config.attention_hidden_size // config.hidden_size)
        _set(tiny, "attention_head_dim", tiny.attention_hidden_size // _HEADS)
    if _states(config, "qk_rope_head_dim"):
        _shrink_latent_heads(tiny, config)
    if isinstance(stated(config, "axial_pos_embds_dim"), (list, tuple)):
        _set(tiny, "axial_pos_embds_dim", [HIDDEN // 4, HIDDEN - HIDDEN // 4])
    _shrink_parts(tiny)
    _shrink_state_space(tiny, config)
    _shrink_rope(tiny, config, head_dim)

    each(_LAYERS, lambda _real: len(kept))
    for name, value in vars(config).items():
        if isinstance(value, (list, tuple)) and len(value) == count:
            small = [value[index] for index in kept]
            _set(tiny, name, [_inner(width, config) for width in small] if name in _INTERMEDIATE else small)
    for name in ("block_types", "layer_types"):
        if isinstance(stated(config, name), list) and len(getattr(tiny, name)) != len(kept):
            _set(tiny, name, [getattr(config, name)[index % len(getattr(config, name))] for index in kept])
    for name in _LAYER_INDICES:
        if isinstance(stated(config, name), list):
            _set(tiny, name, [kept.index(index) for index in getattr(config, name) if index in kept])
    if _states(config, "moe_layer_start_index"):
        _shrink_expert_range(tiny, config, layer, stand_in)
    _shrink_periods(tiny, config, kept, layer)
    # Dory's own counts are of the blocks before, in and after its loop.
    each(("first_k_dense_replace", "num_dense_layers", "n_input_layers"), lambda real: sum(i < real for i in kept))
    each(("num_kv_shared_layers", "n_output_layers"), lambda real: sum(i >= count - real for i in kept))
    each(("n_recurrent_layers",), lambda real: sum(0 <= i - config.n_input_layers < real for i in kept))

    _set(tiny, "vocab_size", VOCABULARY)
    if isinstance(names := stated(config, "vocabulary_map"), dict):
        # Chameleon and Emu3 look their image tokens up in it.
        _set(tiny, "vocabulary_map", {name: min(token, VOCABULARY - 1) for name, token in names.items()})
    for name in _TOKEN_IDS:
        value = stated(config, name)
        if (isinstance(value, int) and value >= VOCABULARY) or isinstance(value, list):
            _set(tiny, name, 2)
    return tiny, stand_in


def kept_layers(config: Any, layer: int) -> list[int]:
    """The blocks of the real model that the stand-in has: ``layer``, the next, the ends, and what they depend on."""
    count = block_count(config)
    wanted = {0, layer, min(layer + 1, count - 1), count - 1}
    types = stated(config, "layer_types")
    if isinstance(types, list) and len(types) == count:
        # The last blocks read the keys and values of the last block of their type before them.
        kinds = sharing_kinds(config)
        wanted |= {count - 1 - kinds[::-1].index(kind) for kind in kinds} | {kinds.index(kind) for kind in kinds}
        # Zamba's hybrid blocks share one transformer; one that finds no other to share it with is refused.
        for index in [index for index, kind in enumerate(types) if kind == "hybrid"]:
            if len([kept for kept in wanted if types[kept] == "hybrid"]) < 2:
                wanted.add(index)
    if _states(config, "n_recurrent_layers"):
        # Without one of the blocks that are run several times nothing would be.
        wanted.add(min(config.n_input_layers, count - 1))
    for index in range(count):
        if len(wanted) >= min(LAYERS, count):
            break
        wanted.add(index)
    return sorted(wanted)


def sharing_kinds(config: Any) -> list[tuple[str, bool]]:
    """For each block its type of attention, and whether it reads another's keys and values; empty if none does."""
    types, shared = stated(config, "layer_types"), whole_number(config, "num_kv_shared_layers")
    if not isinstance(types, list) or len(types) != block_count(config) or not shared:
        return []
    return [(kind, index >= len(types) - shared) for index, kind in enumerate(types)]


def _shrink_layer_by_layer(config: Any, layer: int) -> tuple[Any, int]:
    """The same for a config whose sizes may differ from layer to layer: each layer's own are shrunk like any."""
    uniform = copy.deepcopy(config)
    uniform.per_layer_config = None
    kept = kept_layers(uniform, layer)
    tiny, stand_in = shrink_config(uniform, layer)
    overrides = {}
    for place, index in enumerate(kept):
        own = config.per_layer_config[index]
        small, _ = shrink_config(own, layer)
        overrides[place] = {
            name: value
            for name, value in vars(small).items()
            if whole_number(small, name) is not None and value != vars(tiny).get(name)
        }
    tiny.per_layer_config = {place: values for place, values in overrides.items() if values}
    return tiny, stand_in


def _inner(real: int, config: Any) -> int:
    """An MLP's small width: the stand-in has two neurons a coordinate if the model has, as some probes need them."""
    return WIDE if real >= 2 * (_get(config, _HIDDEN) or 0) else NARROW


def _get(config: Any, names: tuple[str, ...]) -> int | None:
    for name in names:
        value = stated(config, name)
        if isinstance(value, int):
            return value
    return None


def _states(config: Any, name: str) -> bool:
    return whole_number(config, name) is not None


def _set(config: Any, name: str, value: Any) -> None:
    try:
        setattr(config, name, value)
    except (AttributeError, NotImplementedError):
        # A few classes derive the attribute; what it derives from is set as well.
        return


def _shrink_latent_heads(tiny: Any, config: Any) -> None:
    """Of multi-head latent attention: rotary factors are shares of widths, so the widths keep their ratios."""
    real, small = config.qk_rope_head_dim, tiny.qk_rope_head_dim
    for name in ("head_dim", "qk_nope_head_dim"):
        if _states(config, name):
            width = getattr(config, name)
            _set(tiny, name, small * width // real if real else min(16, width))
    if _states(config, "qk_head_dim") and _states(config, "qk_nope_head_dim"):
        _set(tiny, "qk_head_dim", tiny.qk_nope_head_dim + small)


def _shrink_parts(tiny: Any) -> None:
    """Sizes that DBRX keeps in configs of its parts."""
    most = {**dict.fromkeys(_HIDDEN, HIDDEN), **dict.fromkeys(_INTERMEDIATE, NARROW), **_AT_MOST, "kv_n_heads": 2}
    for part in (stated(tiny, "attn_config"), stated(tiny, "ffn_config")):
        for name, limit in most.items():
            if (size := whole_number(part, name)) is not None:
                _set(part, name, min(limit, size))


def _shrink_expert_range(tiny: Any, config: Any, layer: int, stand_in: int) -> None:
    start, end, interval = config.moe_layer_start_index, config.moe_layer_end_index, config.moe_layer_interval
    routed = start <= layer <= (end if end >= 0 else block_count(config) - 1) and (layer + 1) % interval == 0
    _set(tiny, "moe_layer_interval", 1)
    _set(tiny, "moe_layer_start_index", stand_in if routed else LAYERS)
    _set(tiny, "moe_layer_end_index", stand_in)


def _shrink_periods(tiny: Any, config: Any, kept: list[int], layer: int) -> None:
    """Kinds of blocks that follow from the index: the stand-in keeps its own, the block after it shows the other."""
    for name in ("attn_layer", "expert_layer"):
        if _states(config, f"{name}_period") and _states(config, f"{name}_offset"):
            own = layer % getattr(config, f"{name}_period") == getattr(config, f"{name}_offset")
            _set(tiny, f"{name}_period", len(kept))
            _set(tiny, f"{name}_offset", kept.index(layer) if own else (kept.index(layer) + 1) % len(kept))
    step, dense = stated(config, "decoder_sparse_step", 1), stated(config, "mlp_only_layers")
    if isinstance(step, int) and step > 1 and isinstance(dense, list):
        _set(tiny, "decoder_sparse_step", 1)
        _set(tiny, "mlp_only_layers", [at for at, index in enumerate(kept) if index in dense or (index + 1) % step])


def _shrink_state_space(tiny: Any, config: Any) -> None:
    inner = HIDDEN * int(stated(config, "mamba_expand") or stated(config, "expand") or 2)
    if _states(config, "mamba_d_ssm"):
        _set(tiny, "mamba_d_ssm", inner)
    for heads, width in (
        ("mamba_n_heads", "mamba_d_head"),
        ("n_mamba_heads", "mamba_headdim"),
        ("mamba_num_heads", "mamba_head_dim"),
        ("num_heads", "head_dim"),
    ):
        if _states(config, width) and _states(config, heads) and not _states(config, "rope_theta"):
            if heads == "num_heads" and "mamba" not in str(stated(config, "model_type", "")):
                continue
            _set(tiny, width, 16)
            _set(tiny, heads, inner // 16)
    if stated(config, "model_type", "") == "mamba" or _states(config, "time_step_rank"):
        _set(tiny, "intermediate_size", inner)


def _shrink_rope(tiny: Any, config: Any, head_dim: int) -> None:
    for name in ("rope_parameters", "rope_scaling"):
        # Looked up in the instance: older names are aliases that only warn.
        value = vars(config).get(name)
        if isinstance(value, dict):
            _set(tiny, name, _shrunk_rope(copy.deepcopy(value), config, head_dim))


def _shrunk_rope(rope: dict[str, Any], config: Any, head_dim: int) -> dict[str, Any]:
    width = stated(config, "qk_rope_head_dim")
    pairs = int((min(8, width) if width else head_dim * float(rope.get("partial_rotary_factor", 1.0))) / 2)
    for key, value in rope.items():
        if isinstance(value, dict):
            rope[key] = _shrunk_rope(value, config, head_dim)
        elif key in ("short_factor", "long_factor") and isinstance(value, list):
            rope[key] = (value * pairs)[:pairs]
        elif key == "mrope_section" and isinstance(value, list):
            shares = [part * pairs // sum(value) for part in value]
            rope[key] = [pairs - sum(shares[1:]), *shares[1:]]
    return rope
