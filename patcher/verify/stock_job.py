"""The job of a verification in stock transformers: what :mod:`patcher.verify.programs.stock_run` is told."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from patcher.architectures.config_keys import stated_positions, windows
from patcher.architectures.decoder import decoder_part
from patcher.architectures.quantised import quantisation_of
from patcher.capture.model import has_tokenizer
from patcher.checkpoint.folder import CheckpointFolder
from patcher.patched.schema import Patch
from patcher.patched.stored import StoredLayer
from patcher.verify.offload import Offload
from patcher.verify.probes import PROBE_TOKENS, PROBES
from patcher.verify.terms import VerifyTerms

MAX_TOKENS = 32
"""Of a probe that a recipe names, or that other stacks run as well."""
GREEDY_TOKENS = 12
"""Where other stacks decode them as well."""
GREEDY_ALONE = 3
GREEDY_FROM_DISK = 2
"""Each token after the first is one more reading of a model that does not fit in memory."""
START_LIMIT = 1e-4
"""How far a log-probability may be off where a pass starts from the base's residual stream, before none does."""


def stock_job(
    base: Path,
    patch: Patch,
    stored: Mapping[int, StoredLayer],
    scratch: Path,
    terms: VerifyTerms,
    offload: Offload | None,
    *,
    others: bool,
) -> tuple[dict[str, Any], str]:
    """What the base and the copy are run under, and why no long prompt is among it (empty where one is).

    Args:
        base: the base as it is given; ``offload`` may name another form of it.
        scratch: takes the vectors.
        others: whether other stacks are held to the result: probes are longer then, and more tokens are decoded.
    """
    config = decoder_part(CheckpointFolder(base).config)
    vectors = {f"layer.{layer}": held.stored.clone() for layer, held in stored.items()}
    save_file(vectors, scratch / "vectors.safetensors")
    slots = [slot for held in stored.values() for slot in held.slots]
    held_by = {
        f"{key}/{number}": tensor.clone()
        for number, slot in enumerate(slots)
        for key, tensor in (("delta", slot.delta), ("right", slot.right), ("original", slot.original))
        if tensor is not None
    }
    save_file(held_by, scratch / "slots.safetensors")
    long_tokens, long_note = long_prompt(config, terms.spec.long_prompt_limit)
    positions = stated_positions(config)
    quantisation = quantisation_of(config)
    texts = list(terms.spec.probes or PROBES)
    most = MAX_TOKENS if terms.spec.probes or others else PROBE_TOKENS
    job = {
        "base": str(base if offload is None else offload.base),
        "dequantise": None if quantisation is None else quantisation.dequantise,
        "texts": texts,
        "ids": None if has_tokenizer(base) else ids_without_tokenizer(config),
        "max_tokens": min(most, positions - GREEDY_TOKENS) if positions else most,
        "greedy_tokens": GREEDY_TOKENS if others else GREEDY_ALONE if offload is None else GREEDY_FROM_DISK,
        "start_limit": START_LIMIT,
        "config_changes": list(patch.route.config_changes),
        "device": "cpu",
        "long_tokens": long_tokens,
        "own_dtype": not _is_fp32(base, CheckpointFolder(base).config),
        "vectors": str(scratch / "vectors.safetensors"),
        "slot_file": str(scratch / "slots.safetensors"),
        "slots": [
            {
                "parameter": slot.parameter,
                "index": slot.index,
                "outer": slot.right is not None,
                "transposed": slot.transposed,
            }
            for slot in slots
        ],
        "layers": {
            f"layer.{layer}": {"reference": layer, "candidate": held.copy_layer} for layer, held in stored.items()
        },
        "blocks": patch.route.blocks,
        "amplify": 1.0,
        "offload": None
        if offload is None
        else {"folder": str(offload.folder), "bytes": offload.memory, "all": offload.all},
        "trust_remote_code": terms.trust_remote_code,
    }
    return job, long_note


def ids_without_tokenizer(config: Mapping[str, Any]) -> list[list[int]]:
    """Random token ids, in the place of texts that no tokenizer can read."""
    vocabulary = int(config.get("vocab_size") or 100)
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(0, vocabulary, (length,), generator=generator).tolist() for length in (17, 9, 24, 5)]


def _is_fp32(base: Path, config: Mapping[str, Any]) -> bool:
    dtype = config.get("dtype") or config.get("torch_dtype")
    if dtype is not None:
        return str(dtype).endswith("float32")
    checkpoint = CheckpointFolder(base)
    return not checkpoint.is_bin and all(info.dtype == "F32" for info in checkpoint.tensors.values())


def long_prompt(config: Mapping[str, Any], limit: int) -> tuple[int, str]:
    """A length that passes any sliding window, or why none is run."""
    window = max(windows(config).values(), default=0)
    if config.get("use_sliding_window") is False or not window:
        return 0, "no sliding window"
    positions = stated_positions(config)
    length = window + 16
    if positions is not None and positions < length:
        return 0, f"the window ({window}) is as long as the model's positions"
    if length > limit:
        return 0, f"the window ({window}) is longer than verify.long_prompt_limit ({limit})"
    return length, ""
