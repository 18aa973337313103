"""When a relabel holds: what a tiny stand-in cannot show, because it depends on sizes, or what is better said in words.

Each guard looks at a source config and says why the relabel does not hold, or None.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from patcher.architectures.config_keys import EXPERTS, block_count, stated

Guard = Callable[[Any], "str | None"]


def has_window(config: Any) -> bool:
    """Whether a sliding window cuts something off at a position that the model can reach."""
    window = stated(config, "sliding_window")
    if not window or window >= config.max_position_embeddings:
        return False
    types = stated(config, "layer_types")
    return types is None or "sliding_attention" in types


def rotary_fraction(config: Any) -> float:
    """Which part of a head's dimensions is rotated."""
    return float(rope(config).get("partial_rotary_factor", 1.0))


def rope(config: Any) -> Mapping[str, Any]:
    """The config's rotary parameters; empty where it has none."""
    return stated(config, "rope_parameters") or {}


def _no_window(config: Any) -> str | None:
    return "its sliding window is shorter than its position range" if has_window(config) else None


def _window(config: Any) -> str | None:
    return None if has_window(config) else "no sliding window of it cuts anything off"


def _no_position_scaling(config: Any) -> str | None:
    parameters = rope(config)
    beta, original = parameters.get("llama_4_scaling_beta"), parameters.get("original_max_position_embeddings")
    if not beta or (original is not None and config.max_position_embeddings <= original):
        return None
    return f"its queries are scaled by position from {original} on, and the target knows no such scaling"


def _full_rotary(config: Any) -> str | None:
    return None if rotary_fraction(config) == 1.0 else "only a part of each head is rotated"


def _partial_rotary(config: Any) -> str | None:
    return None if rotary_fraction(config) < 1.0 else "all of each head is rotated"


def _fixed_frequencies(config: Any) -> str | None:
    # A list of factors can state any frequencies, but not ones that follow the length of the text.
    kind = rope(config).get("rope_type", "default")
    return f"its rotary frequencies change with the text's length (rope type `{kind}`)" if kind == "dynamic" else None


def _plain_frequencies(config: Any) -> str | None:
    kind = rope(config).get("rope_type", "default")
    return None if kind == "default" else f"its rotary frequencies are scaled (rope type `{kind}`)"


def _no_experts(config: Any) -> str | None:
    experts = next((value for name in EXPERTS if isinstance(value := stated(config, name), int)), 0)
    dense = stated(config, "first_k_dense_replace")
    if not experts or (isinstance(dense, int) and dense >= block_count(config)):
        return None
    return f"it routes tokens to {experts} experts"


def _routed_alike(config: Any) -> str | None:
    if stated(config, "n_group") not in (None, 1):
        return f"its experts are chosen in groups (n_group {config.n_group})"
    return None if config.norm_topk_prob else "its experts' weights are not made to add up to one (norm_topk_prob)"


def _head_norms(config: Any) -> str | None:
    return None if config.use_qk_norm else "its queries and keys have no norm, and the target's have (use_qk_norm)"


def _norm_used_twice(config: Any) -> str | None:
    if config.pre_norm:
        return "the norm stands before the block's parts (pre_norm)"
    if config.adapter_layer_norm or not config.adapter_reuse_layer_norm:
        return "its adapters do not read the block's last norm (adapter_reuse_layer_norm)"
    return None


def _shared_width(config: Any) -> str | None:
    shared, expert = int(stated(config, "shared_intermediate_size", 0) or 0), int(config.intermediate_size)
    return f"its shared expert is {shared} wide, which {expert} does not divide" if shared % expert else None


def _shared(config: Any) -> str | None:
    return None if stated(config, "shared_intermediate_size", 0) else "it has no shared expert"


def _not_shared(config: Any) -> str | None:
    return "it has a shared expert" if stated(config, "shared_intermediate_size", 0) else None


def _all_attention(config: Any) -> str | None:
    other = set(stated(config, "layer_types") or []) - {"full_attention", "attention"}
    return f"some of its blocks are {', '.join(sorted(other))}" if other else None


def _rotary(config: Any) -> str | None:
    kind = stated(config, "position_embedding_type")
    return None if kind == "rope" else "it has no rotary position embedding"


def _no_rotary(config: Any) -> str | None:
    kind = stated(config, "position_embedding_type")
    return None if kind in (None, "nope") else f"its positions are embedded (position_embedding_type `{kind}`)"


def even_heads(config: Any) -> bool:
    """Whether the heads' widths add up to the hidden size."""
    width, heads = stated(config, "head_dim"), stated(config, "num_attention_heads")
    return width is None or (heads is not None and width * heads == config.hidden_size)


def _even_heads(config: Any) -> str | None:
    return (
        None if even_heads(config) else "its heads are wider or narrower than the hidden size has room for (head_dim)"
    )


def _silu(config: Any) -> str | None:
    return None if config.hidden_act == "silu" else f"its activation is `{config.hidden_act}`"


def _no_clipping(config: Any) -> str | None:
    clip = stated(config, "clip_qkv")
    return None if clip is None else f"it clips queries, keys and values at {clip} (clip_qkv)"


def _no_soft_caps(config: Any) -> str | None:
    caps = ("attn_logit_softcapping", "final_logit_softcapping")
    capped = [name for name in caps if stated(config, name) is not None]
    return f"it squashes logits ({', '.join(capped)})" if capped else None


def _interleaved(config: Any) -> str | None:
    return None if config.rope_interleave else "its rotary dimensions are not interleaved (rope_interleave)"


def _causal(config: Any) -> str | None:
    looks_ahead = stated(config, "use_bidirectional_attention")
    return "it attends to later tokens (use_bidirectional_attention)" if looks_ahead else None


GUARDS: Mapping[str, Guard] = {
    "no_window": _no_window,
    "window": _window,
    "no_position_scaling": _no_position_scaling,
    "full_rotary": _full_rotary,
    "partial_rotary": _partial_rotary,
    "fixed_frequencies": _fixed_frequencies,
    "plain_frequencies": _plain_frequencies,
    "no_experts": _no_experts,
    "routed_alike": _routed_alike,
    "head_norms": _head_norms,
    "norm_used_twice": _norm_used_twice,
    "shared_width": _shared_width,
    "shared": _shared,
    "not_shared": _not_shared,
    "all_attention": _all_attention,
    "rotary": _rotary,
    "no_rotary": _no_rotary,
    "even_heads": _even_heads,
    "silu": _silu,
    "no_clipping": _no_clipping,
    "no_soft_caps": _no_soft_caps,
    "interleaved": _interleaved,
    "causal": _causal,
}
"""Every guard by the name that relabels.json uses."""
