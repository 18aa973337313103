"""GGUF files under another architecture's name: whole rows move, and no byte of them changes."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from support.gguf_files import BIAS, QUANTISATIONS, patch, raw_entries
from support.gguf_models import FORWARD, HEADS, KEY_HEADS, WIDTH, write_model

from patcher.checkpoint.gguf.file import read_gguf


def to_pairs(values: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's own converter does with the rows of a head."""
    return (
        values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
    )


@pytest.mark.parametrize("quantisation", QUANTISATIONS)
def test_qwen2_becomes_llama_by_whole_rows(tmp_path: Path, quantisation: str) -> None:
    source, output = tmp_path / "base.gguf", tmp_path / "steered.gguf"
    write_model(source, "qwen2", quantisation)
    result = patch(source, output)
    assert (result.plan.relabelled, result.plan.architecture) == ("qwen2", "llama")
    old = {t.name: t for t in gguf.GGUFReader(source).tensors}
    new = {t.name: t for t in gguf.GGUFReader(output).tensors}
    assert set(new) == {*old, BIAS}
    for name, tensor in old.items():
        heads = {"attn_q": HEADS, "attn_k": KEY_HEADS}.get(name.split(".")[-2])
        expected = to_pairs(tensor.data, heads) if heads else tensor.data
        assert (new[name].data == expected).all(), name
        assert new[name].tensor_type == tensor.tensor_type
    file = read_gguf(output)
    assert file.scalar("general.architecture") == "llama"
    assert file.scalar("steering.base_architecture") == "qwen2"
    renamed = {key.replace("qwen2.", "llama."): raw for key, raw in raw_entries(source).items()}
    kept = {key: raw for key, raw in raw_entries(output).items() if not key.startswith("steering.")}
    assert kept == {**renamed, "general.architecture": struct.pack("<IQ", 8, 5) + b"llama"}


def test_phi3_becomes_llama_by_parts(tmp_path: Path) -> None:
    source, output = tmp_path / "base.gguf", tmp_path / "steered.gguf"
    write_model(source, "phi3", "Q4_K_M")
    result = patch(source, output)
    old = {t.name: t.data for t in gguf.GGUFReader(source).tensors}
    new = {t.name: t.data for t in gguf.GGUFReader(output).tensors}
    queries, keys = HEADS * WIDTH, KEY_HEADS * WIDTH
    fused, both = old["blk.0.attn_qkv.weight"], old["blk.0.ffn_up.weight"]
    assert (new["blk.0.attn_q.weight"] == to_pairs(fused[:queries], HEADS)).all()
    assert (new["blk.0.attn_k.weight"] == to_pairs(fused[queries : queries + keys], KEY_HEADS)).all()
    assert (new["blk.0.attn_v.weight"] == fused[queries + keys :]).all()
    assert (new["blk.0.ffn_gate.weight"] == both[:FORWARD]).all()
    assert (new["blk.0.ffn_up.weight"] == both[FORWARD:]).all()
    file = read_gguf(output)
    assert file.scalar("llama.rope.scaling.type") == "longrope"
    assert "llama.attention.sliding_window" not in file.entries
    assert any("sliding window" in note for note in result.plan.notes)
