"""Tiny random GGUF models, tensor by tensor, in any quantisation: neither a converter nor a quantiser is needed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

HIDDEN, FORWARD, HEADS, KEY_HEADS, WIDTH, VOCABULARY, CONTEXT, BLOCKS, EXPERTS = 256, 512, 4, 2, 64, 288, 128, 3, 4
KEYS = KEY_HEADS * WIDTH

NORM = {"weight": (HIDDEN,)}
LAYER_NORM = {"weight": (HIDDEN,), "bias": (HIDDEN,)}
ATTENTION = {"attn_q": (HIDDEN, HIDDEN), "attn_k": (HIDDEN, KEYS), "attn_v": (HIDDEN, KEYS)}
FUSED = {"attn_qkv": (HIDDEN, HIDDEN + 2 * KEYS)}
OUTPUT = {"attn_output": (HIDDEN, HIDDEN)}
GATED = {"ffn_gate": (HIDDEN, FORWARD), "ffn_up": (HIDDEN, FORWARD), "ffn_down": (FORWARD, HIDDEN)}
PLAIN = {"ffn_up": (HIDDEN, FORWARD), "ffn_down": (FORWARD, HIDDEN)}
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Kind:
    """An architecture: its blocks' matrices, which of them have biases, its norms, and what else it has.

    A name with a dot is the whole name of a tensor; ``each`` holds the blocks where they differ.
    """

    blocks: Shapes
    each: tuple[Shapes, ...] = ()
    biases: tuple[str, ...] = ()
    norms: tuple[str, ...] = ("attn_norm", "ffn_norm")
    norm_bias: bool = False
    extra: Shapes = field(default_factory=dict)
    keys: Mapping[str, Any] = field(default_factory=dict)
    rope: bool = True


ALL = ("attn_qkv", "attn_output", "ffn_up", "ffn_down")
LLAMA = {**ATTENTION, **OUTPUT, **GATED}
GPT = {**FUSED, **OUTPUT, **PLAIN}
SCALED = {"logit_scale": 2.0, "residual_scale": 0.3, "embedding_scale": 3.0, "attention.scale": 0.125}
POSITIONS = {"position_embd.weight": (HIDDEN, CONTEXT)}
INNER, STATE, SCANS = 2 * HIDDEN, 16, 8
MIXER = {
    "ssm_in": (HIDDEN, 2 * INNER + 2 * STATE + SCANS),
    "ssm_conv1d.weight": (4, INNER + 2 * STATE),
    "ssm_conv1d.bias": (INNER + 2 * STATE,),
    "ssm_dt.bias": (SCANS,),
    "ssm_a.": (1, SCANS),
    "ssm_d.": (1, SCANS),
    "ssm_norm.weight": (INNER, 1),
    "ssm_out": (INNER, HIDDEN),
}
MIXING = {
    "ssm.conv_kernel": 4,
    "ssm.inner_size": INNER,
    "ssm.state_size": STATE,
    "ssm.time_step_rank": SCANS,
    "ssm.group_count": 1,
}
KINDS: Mapping[str, Kind] = {
    "llama": Kind(LLAMA),
    "mistral3": Kind(LLAMA),
    "deci": Kind(LLAMA),
    "granite": Kind(LLAMA, keys=SCALED),
    "granitemoe": Kind(LLAMA, keys=SCALED),
    "minicpm": Kind(LLAMA, keys={"residual_scale": 0.4}),
    "qwen2": Kind(LLAMA, biases=("attn_q", "attn_k", "attn_v")),
    "granite_swa": Kind(
        {**LLAMA, "attn_sinks": (HEADS,)},
        keys={**SCALED, "attention.sliding_window": 4, "attention.sliding_window_pattern": [True, False, True]},
    ),
    "granitehybrid": Kind(
        {},
        each=(LLAMA, {**MIXER, **GATED}, LLAMA),
        keys={**SCALED, **MIXING, "attention.head_count_kv": [KEY_HEADS, 0, KEY_HEADS]},
    ),
    "falcon-h1": Kind({**LLAMA, **MIXER, "ffn_norm.": (HIDDEN,)}, norms=("attn_norm",), keys=MIXING),
    "nemotron_h": Kind(
        {},
        each=({**ATTENTION, **OUTPUT}, PLAIN, MIXER, PLAIN),
        norms=("attn_norm",),
        keys={
            **MIXING, "block_count": 4, "attention.head_count_kv": [KEY_HEADS, 0, 0, 0],
            "feed_forward_length": [0, FORWARD, 0, FORWARD], "attention.layer_norm_epsilon": 1e-5,
        },
        rope=False,
    ),
    "nemotron_h_moe": Kind(
        {},
        each=({**ATTENTION, **OUTPUT}, PLAIN, MIXER, PLAIN),
        norms=("attn_norm",),
        keys={
            **MIXING, "block_count": 4, "attention.head_count_kv": [KEY_HEADS, 0, 0, 0],
            "feed_forward_length": [0, FORWARD, 0, FORWARD], "attention.layer_norm_epsilon": 1e-5,
        },
        rope=False,
    ),
    "arcee": Kind({**ATTENTION, **OUTPUT, **PLAIN}),
    "exaone": Kind(LLAMA, extra={"rope_freqs.weight": (WIDTH // 2,)}),
    "internlm2": Kind(LLAMA),
    "xverse": Kind(LLAMA),
    "seed_oss": Kind(LLAMA, biases=("attn_q", "attn_k", "attn_v"), norms=("attn_norm", "post_attention_norm")),
    "phi3": Kind(
        {**FUSED, **OUTPUT, "ffn_up": (HIDDEN, 2 * FORWARD), "ffn_down": (FORWARD, HIDDEN)},
        extra={"rope_factors_long.weight": (WIDTH // 2,), "rope_factors_short.weight": (WIDTH // 2,)},
        keys={
            "rope.scaling.original_context_length": 64, "rope.scaling.attn_factor": 1.1, "attention.sliding_window": 32,
        },
    ),
    "nemotron": Kind({**ATTENTION, **OUTPUT, **PLAIN}, norm_bias=True),
    "mpt": Kind(GPT, norm_bias=True, keys={"attention.max_alibi_bias": 8.0}, rope=False),
    "gpt2": Kind(GPT, biases=ALL, norm_bias=True, extra=POSITIONS, rope=False),
    "starcoder": Kind(GPT, biases=ALL, norm_bias=True, extra=POSITIONS, rope=False),
    "bloom": Kind(
        GPT,
        biases=ALL,
        norm_bias=True,
        extra={"token_embd_norm.weight": (HIDDEN,), "token_embd_norm.bias": (HIDDEN,)},
        rope=False,
    ),
    "gptneox": Kind(GPT, biases=ALL, norm_bias=True, keys={"use_parallel_residual": True}),
    "phi2": Kind(GPT, biases=ALL, norms=("attn_norm",), norm_bias=True, extra={"output.bias": (VOCABULARY,)}),
    "codeshell": Kind(GPT, biases=ALL, norm_bias=True),
    "starcoder2": Kind(
        {**ATTENTION, **OUTPUT, **PLAIN},
        biases=("attn_q", "attn_k", "attn_v", "attn_output", "ffn_up", "ffn_down"),
        norm_bias=True,
    ),
    "jais": Kind({**FUSED, **OUTPUT, **GATED}, biases=(*ALL, "ffn_gate"), norm_bias=True, rope=False),
    "jais2": Kind({**FUSED, **OUTPUT, **PLAIN}, biases=ALL, norm_bias=True),
    "gpt-oss": Kind(
        {
            **ATTENTION,
            **OUTPUT,
            "attn_sinks": (HEADS,),
            "ffn_gate_inp": (HIDDEN, EXPERTS),
            "ffn_gate_exps": (HIDDEN, FORWARD, EXPERTS),
            "ffn_up_exps": (HIDDEN, FORWARD, EXPERTS),
            "ffn_down_exps": (FORWARD, HIDDEN, EXPERTS),
        },
        biases=(
            "attn_q", "attn_k", "attn_v", "attn_output",
            "ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps",
        ),
        norms=("attn_norm", "post_attention_norm"),
        keys={
            "expert_count": EXPERTS, "expert_used_count": 2, "expert_feed_forward_length": FORWARD,
            "attention.sliding_window": 8,
        },
    ),
    "llada": Kind(LLAMA),
}  # fmt: skip

K_QUANTS = {"Q4_K", "Q6_K"}
MIXED = {"Q4_K_M": ("Q4_K", "Q6_K")}
"""Types that a file mixes: the second one for the matrices that llama.cpp keeps better."""


def write_model(
    path: Path,
    architecture: str,
    quantisation: str = "F32",
    *,
    seed: int = 0,
    blocks: int = BLOCKS,
    idle_first: bool = False,
    alignment: int | None = None,
    **changes: Any,
) -> None:
    """Write a model of random numbers.

    Args:
        path: the file.
        architecture: a key of ``KINDS``.
        quantisation: F32, F16, BF16, Q8_0, Q4_0, Q4_K, Q6_K or Q4_K_M.
        seed: of the numbers, which are the same in every quantisation of one kind.
        blocks: how many.
        idle_first: put a block in front that adds nothing, so that block K becomes block K + 1.
        alignment: of the tensors.
        changes: metadata of the architecture, by key with ``__`` for dots; None leaves one out.
    """
    import gguf

    kind = KINDS[architecture]
    writer = gguf.GGUFWriter(path, architecture)
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    keys = _keys(kind, blocks + idle_first) | {key.replace("__", "."): value for key, value in changes.items()}
    for key, value in keys.items():
        if value is not None:
            _add(writer, f"{architecture}.{key}", value)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<{number}>".encode() for number in range(VOCABULARY)])
    writer.add_token_scores([0.0] * VOCABULARY)
    writer.add_token_types([1] * VOCABULARY)
    for name, shape in _shapes(kind, blocks).items():
        better = name.startswith(("output", "token_embd")) or "ffn_down" in name or "attn_v" in name
        mixed = MIXED.get(quantisation, (quantisation, quantisation))
        stored = _numbers(name, shape, mixed[better], seed)
        if not idle_first:
            _tensor(writer, name, *stored)
            continue
        parts = name.split(".")
        if parts[0] != "blk":
            _tensor(writer, name, *stored)
            continue
        _tensor(writer, ".".join(["blk", str(int(parts[1]) + 1), *parts[2:]]), *stored)
        if parts[1] == "0":
            idle = "output" in name or "ffn_down" in name
            _tensor(writer, name, np.zeros_like(stored[0]) if idle else stored[0], stored[1])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _keys(kind: Kind, blocks: int) -> dict[str, Any]:
    keys: dict[str, Any] = {
        "context_length": CONTEXT,
        "embedding_length": HIDDEN,
        "block_count": blocks,
        "feed_forward_length": FORWARD,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KEY_HEADS,
        "attention.layer_norm_epsilon" if kind.norm_bias else "attention.layer_norm_rms_epsilon": 1e-5,
        "vocab_size": VOCABULARY,
    }
    if kind.rope:
        keys |= {"rope.dimension_count": WIDTH, "rope.freq_base": 10000.0}
    return keys | dict(kind.keys)


def _shapes(kind: Kind, blocks: int) -> dict[str, tuple[int, ...]]:
    norm = LAYER_NORM if kind.norm_bias else NORM
    shapes = {"token_embd.weight": (HIDDEN, VOCABULARY), "output.weight": (HIDDEN, VOCABULARY)}
    shapes |= {f"output_norm.{part}": shape for part, shape in norm.items()}
    shapes |= dict(kind.extra)
    for block, matrices in enumerate(kind.each or [kind.blocks] * blocks):
        for name in kind.norms:
            shapes |= {f"blk.{block}.{name}.{part}": shape for part, shape in norm.items()}
        for name, shape in matrices.items():
            whole = name.rstrip(".") if "." in name else f"{name}.weight"
            shapes[f"blk.{block}.{whole}"] = shape
            if name in kind.biases:
                shapes[f"blk.{block}.{name}.bias"] = shape[1:]
    return shapes


def _numbers(name: str, shape: tuple[int, ...], quantisation: str, seed: int) -> tuple[np.ndarray, Any]:
    import gguf

    generator = np.random.default_rng([seed, *name.encode()])
    types = gguf.GGMLQuantizationType
    size = shape[::-1]
    scan = ".ssm_" in name and not name.endswith(("in.weight", "out.weight"))
    matrix = len(shape) > 1 and not name.endswith(".bias") and not scan
    if matrix and quantisation in K_QUANTS and "gate_inp" not in name:
        return _blocks(generator, size, quantisation), types[quantisation]
    values = generator.standard_normal(size).astype(np.float32)
    values *= 0.1 if matrix or name.endswith(".bias") else 0.2
    if "norm" in name and name.endswith("weight"):
        values += 1
    if name.endswith("ssm_a"):
        values = -1 - np.abs(values)
    if name.startswith("rope"):
        values = 1 + np.abs(values)
    if name.startswith("token_embd.weight"):
        values *= 10
    if not matrix or quantisation == "F32" or "gate_inp" in name:
        return values, types.F32
    return gguf.quants.quantize(values, types[quantisation]), types[quantisation]


def _blocks(generator: np.random.Generator, size: tuple[int, ...], quantisation: str) -> np.ndarray:
    """Random bytes, with scales that make the numbers about as large as in the other quantisations."""
    import gguf

    _elements, width = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[quantisation]]
    raw = generator.integers(0, 256, (*size[:-1], size[-1] // 256, width), dtype=np.uint8)
    if quantisation == "Q4_K":
        step = np.float16(0.1 / (31 * 5))
        raw[..., :4] = np.array([step, step * np.float16(7.5)], np.float16).view(np.uint8)
    else:
        raw[..., -2:] = np.array([0.1 / 1370], np.float16).view(np.uint8)
    return raw.reshape(*size[:-1], -1)


def _tensor(writer: Any, name: str, values: np.ndarray, kind: Any) -> None:
    writer.add_tensor(name, values, raw_dtype=kind)


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, list):
        writer.add_array(key, value)
    else:
        writer.add_string(key, value)
