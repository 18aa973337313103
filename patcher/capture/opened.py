"""The base, opened to be read: in memory, spread over devices and disk, or streamed block by block."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from patcher.architectures.analysis import Architecture
from patcher.architectures.model_class import embedding_rows
from patcher.capture.forward import position_limit
from patcher.capture.freed_memory import give_back_freed_memory, keep_freed_memory
from patcher.capture.layout import Layout
from patcher.capture.logits import LogitsSource
from patcher.capture.memory import FOR_WEIGHTS, available_memory
from patcher.capture.meter import Meter
from patcher.capture.model import free_on_accelerators, load_causal_lm, load_tokenizer
from patcher.capture.reader import ResidualReader, reader_in_memory, token_budget
from patcher.capture.resuming import ResumingModel
from patcher.capture.shared_prefixes import exactness
from patcher.capture.streaming.model import StreamedModel
from patcher.checkpoint.folder import CheckpointFolder
from patcher.errors import InputError

Mode = Literal["memory", "stream", "spread"]
_ACTIVATIONS = 0.25
"""Of the free memory, for activations: of a streamed model (more of them go to the disk), or to resume passes from."""


@dataclass
class OpenedBase:
    """The base model, ready to be read.

    Attributes:
        reader: its residual activations.
        logits: its logits under vectors.
        model: the model itself, where it is loaded.
        tokenizer: its tokenizer, or None.
        positions: how many positions it has, if it has a table of them.
        embeddings: how many token ids it has embeddings for, or None where its class does not say.
    """

    reader: ResidualReader
    logits: LogitsSource
    model: nn.Module | None
    tokenizer: Any
    positions: int | None
    embeddings: int | None = None

    @property
    def blocks(self) -> str:
        """The path of its list of decoder blocks."""
        return self.reader.architecture.blocks


def choose_mode(
    asked: Literal["auto", "memory", "stream"], *, size: int, device: str, quantised: bool, whole: str | None
) -> Mode:
    """Where the weights will lie.

    Args:
        asked: the recipe's ``capture.mode``.
        size: bytes of the weights in the dtype of the capture.
        device: ``auto``: all accelerators, then the memory.
        quantised: such weights are not streamed.
        whole: what needs the model whole, for errors; or None.

    Raises:
        InputError: streaming is asked for together with what it cannot do.
    """
    if asked == "stream":
        if whole is not None or quantised:
            raise InputError(
                f"{whole or 'a quantised base'} needs the whole model, which `stream` never has",
                where="capture.mode: stream",
                remedy="capture.mode: auto",
                code="stream",
            )
        return "stream"
    if asked == "memory" or size <= FOR_WEIGHTS * _room(device):
        return "memory"
    return "spread" if whole is not None or quantised else "stream"


def _room(device: str) -> int:
    """Bytes for weights: on the named device, or with ``auto`` on all accelerators and in main memory."""
    if device == "cpu" or not torch.cuda.is_available():
        return available_memory()
    if device == "auto":
        return sum(free_on_accelerators()) + available_memory()
    return int(torch.cuda.mem_get_info(device)[0]) if device.startswith("cuda") else available_memory()


@contextmanager
def open_base(
    folder: Path,
    checkpoint: CheckpointFolder,
    architecture: Architecture,
    mode: Mode,
    *,
    dtype: torch.dtype,
    device: str,
    scratch: Path,
    batch_size: int | None = None,
    note: Callable[[str], None] | None = None,
    towers: bool = False,
) -> Iterator[OpenedBase]:
    """Open the base; after it, its memory is free again.

    Args:
        folder: what stock software loads.
        checkpoint: the same as safetensors.
        architecture: of the base.
        mode: from :func:`choose_mode`.
        dtype: of the capture.
        device: of the capture.
        scratch: a folder on a disk with room, for what does not fit in memory.
        batch_size: most rows in a batch, or None.
        note: told what a user may want to know.
        towers: load what images go through as well; such a model is not streamed.

    Raises:
        InputError: the model or its tokenizer cannot be loaded, or (code ``stream``) not be streamed exactly.
        OutsideError: not enough memory.
    """
    trusted = architecture.trust_remote_code
    if mode == "stream":
        place = torch.device("cuda" if device == "auto" else device)
        streamed = StreamedModel(
            checkpoint,
            architecture.config,
            architecture.blocks,
            dtype=dtype,
            device=place,
            memory=int(_ACTIVATIONS * available_memory()),
            scratch=scratch,
            trust_remote_code=trusted,
        )
        tokens, positions = token_budget(architecture.config, place, dtype), position_limit(streamed.model)
        reader = ResidualReader(streamed, architecture, tokens, batch_size, positions, one_pass=True, note=note)
        tokenizer = load_tokenizer(folder, trust_remote_code=trusted)
        yield OpenedBase(reader, streamed, None, tokenizer, positions, embedding_rows(streamed.model))
        return
    model, tokenizer = load_causal_lm(
        folder,
        dtype=dtype,
        device="auto" if mode == "spread" else device,
        offload=scratch if mode == "spread" else None,
        trust_remote_code=trusted,
        towers=towers,
    )
    if mode == "memory":
        # Where weights come and go, what is kept of them would fill the memory that they lack.
        keep_freed_memory()
    meter = Meter(architecture.block_count)
    reader = reader_in_memory(model, architecture, batch_size=batch_size, note=note, meter=meter)
    memory = int(_ACTIVATIONS * available_memory())
    layout = Layout(reader.tokens, lambda: exactness(architecture, architecture.block_count - 1), reader.positions)
    logits = ResumingModel(
        model, architecture.blocks, tokens=reader.tokens, memory=memory, note=note, layout=layout, meter=meter
    )
    try:
        yield OpenedBase(reader, logits, model, tokenizer, reader.positions, embedding_rows(model))
    finally:
        # The verification loads the base again in processes of its own; both at once might not fit.
        del model, reader, logits
        gc.collect()
        give_back_freed_memory()
