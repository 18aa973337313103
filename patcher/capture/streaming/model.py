"""One pass over the weights for all batches.

The stock forward of each batch is run once, with blocks that only write down what they are called with. Then block
after block is read from the disk, run over all batches with those arguments, and given up. So no class's forward is
written a second time, and nothing but the embedding's rows and the blocks that are needed is ever read.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import nn

from patcher.architectures.config_keys import stated
from patcher.architectures.model_class import quiet_transformers
from patcher.architectures.residual import gained, in_rows, mean_stream
from patcher.capture.batches import Batch
from patcher.capture.layout import Layout
from patcher.capture.logits import LogitsJob
from patcher.capture.meter import Meter
from patcher.capture.products import fast_products
from patcher.capture.streaming.activation_store import ActivationStore
from patcher.capture.streaming.block_calls import BatchOnItsWay
from patcher.capture.streaming.rehearsal import Inputs, Rehearsal
from patcher.capture.streaming.shell import Shell, Weights
from patcher.capture.streaming.stand_ins import NotStreamable
from patcher.capture.streaming.stored_tensors import StoredTensors
from patcher.checkpoint.folder import CheckpointFolder
from patcher.errors import InputError, no_memory


class StreamedModel:
    """A causal LM of which one block is in memory at a time (and the next, while it is read).

    Args:
        folder: a safetensors checkpoint.
        config: its transformers config.
        blocks: path of the list of decoder blocks, such as ``model.layers``.
        dtype: what is computed in.
        device: where it is computed.
        memory: bytes of main memory for the activations of the batches; more go to the disk.
        scratch: the folder for those.
        ahead: read the next block while one computes, where there is memory for two.

    Attributes:
        stored: the checkpoint, with what was read of it.
        hidden: width of the residual stream.
        dtype: that blocks compute in.
        meter: counts what it is run for.
        layout: how the rows of what is measured may be made: one text each.
        model: the stock class, for its config and structure; its weights are on the disk.

    Raises:
        InputError: the checkpoint is no safetensors or is quantised, or transformers has no class for it.
    """

    def __init__(
        self,
        folder: CheckpointFolder,
        config: Any,
        blocks: str,
        *,
        dtype: torch.dtype,
        device: str | torch.device = "cpu",
        memory: int,
        scratch: Path,
        trust_remote_code: bool = False,
        ahead: bool = True,
    ) -> None:
        if stated(config, "quantization_config"):
            raise InputError(
                "a quantised checkpoint cannot be streamed",
                where=str(folder.path),
                remedy="capture.mode: memory, or stream the unquantised version of this model",
                code="stream",
            )
        self.dtype, self.hidden = dtype, int(config.hidden_size)
        self._memory, self._scratch, self._ahead = memory, scratch, ahead
        self.stored = StoredTensors(folder)
        self._shell = Shell(
            self.stored, config, blocks, dtype=dtype, device=torch.device(device), trust_remote_code=trust_remote_code
        )
        self.model: Any = self._shell.model
        self.meter, self.layout = Meter(len(self._shell)), Layout()
        self._rehearsal = Rehearsal(self._shell)

    @property
    def bytes_read(self) -> int:
        """Bytes of tensors read from the checkpoint so far."""
        return self.stored.bytes_read

    def run(
        self,
        batches: Sequence[Batch],
        layers: Sequence[int],
        collect: Callable[[int, int, torch.Tensor], None],
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Run all batches through blocks 0 to the last of ``layers``; nothing after that one is read.

        Args:
            batches: what is run.
            layers: 0-based block indices; -1 is the residual stream that enters block 0.
            collect: called with a layer, the index of a batch and its residual stream [rows, width, hidden], layer by
                layer.
            progress: called with the number of batches done; one block of all is its part of all.

        Raises:
            InputError: the checkpoint lacks a tensor, or (code ``stream``) this class cannot be streamed exactly.
            OutsideError: a block and a batch do not fit in memory, or the activations do not fit on the disk.
        """
        if not batches or not layers:
            return
        wanted = frozenset(layers)

        def after(index: int, layer: int, hidden: torch.Tensor) -> torch.Tensor:
            def read(streams: torch.Tensor) -> None:
                collect(layer, index, mean_stream(streams.detach(), self.hidden))

            if layer in wanted:
                in_rows(read, self.model.config.get_text_config())(hidden)
            return hidden

        inputs = [batch.inputs_in(self.dtype) for batch in batches]
        with self._computing() as store:
            self._through_blocks(inputs, max(layers), after, store, progress)
        for batch in batches:
            self.meter.add(batch.inputs["input_ids"].numel(), max(layers) + 1)

    def logits(self, jobs: Sequence[LogitsJob], use: Callable[[int, torch.Tensor], None]) -> None:
        """Run all jobs through the whole model, in one pass over its weights.

        Args:
            jobs: forward passes, each with what is added to its residual stream.
            use: called with the index of a job and its logits, as it asks for them.

        Raises:
            InputError, OutsideError: as in :meth:`run`.
        """
        if not jobs:
            return

        def after(index: int, layer: int, hidden: torch.Tensor) -> torch.Tensor:
            vector = jobs[index].vectors.get(layer)
            changed = (
                None
                if vector is None
                else in_rows(lambda streams: gained(streams, vector), self.model.config.get_text_config())(hidden)
            )
            return hidden if changed is None else changed

        inputs, last = [job.inputs for job in jobs], len(self._shell) - 1
        with self._computing() as store:
            ways = self._through_blocks(inputs, last, after, store, None, to_the_end=True)
            for index, (job, way) in enumerate(zip(jobs, ways, strict=True)):
                self.meter.add(job.inputs["input_ids"].numel())
                use(index, self._rehearsal.logits(job, way))
            self._shell.forget()

    def cost(self, tokens: int, variants: Sequence[Mapping[int, torch.Tensor]], *, again: bool = False) -> float:
        """See :meth:`patcher.capture.logits.LogitsSource.cost`: every variant is run through all blocks."""
        return float(tokens * len(variants))

    def _through_blocks(
        self,
        inputs: Sequence[Inputs],
        last: int,
        after: Callable[[int, int, torch.Tensor], torch.Tensor],
        store: ActivationStore,
        progress: Callable[[int], None] | None,
        *,
        to_the_end: bool = False,
    ) -> list[BatchOnItsWay]:
        """Run block after block over all inputs; the residual streams that are left, where they go on to the end."""
        self._shell.look_ahead(torch.unique(torch.cat([torch.unique(given["input_ids"]) for given in inputs])))
        first: Weights = {}
        if last >= 0:
            first = self._shell.load(0)
            self._rehearsal.find_out({name: value[:1] for name, value in inputs[0].items()}, first)
        afters = [functools.partial(after, index) for index in range(len(inputs))]
        ways: list[BatchOnItsWay] = []
        for given, shift in zip(inputs, afters, strict=True):
            recording = self._rehearsal.calls(given, last, shift, all_of_them=to_the_end)
            kept = [(len(recording.calls) - 1, 0)] if to_the_end else []
            ways.append(BatchOnItsWay(recording, store, kept))
            if ways[-1].layers != ways[0].layers:
                raise NotStreamable("which blocks it runs depends on the batch")
        self._shell.forget()
        sequence = ways[0].layers
        if sequence[:1] != [0]:
            first.clear()
        with contextlib.closing(self._loaded(sequence, first)) as loaded:
            for number, block in enumerate(loaded):
                for way, shift in zip(ways, afters, strict=True):
                    way.step(number, block, self._rehearsal.returns, shift)
                if progress is not None:
                    progress((number + 1) * len(inputs) // len(sequence))
        return ways

    def _loaded(self, sequence: Sequence[int], first: Weights) -> Generator[nn.Module, None, None]:
        """The blocks with their weights, one after the other; the next is read meanwhile. ``first`` is block 0's."""
        with contextlib.ExitStack() as stack:
            reader: ThreadPoolExecutor | None = None
            coming: Future[Weights] | None = None
            for number, layer in enumerate(sequence):
                weights = first
                if coming is not None:
                    # What did not fit beside another block may fit alone.
                    with contextlib.suppress(torch.OutOfMemoryError, MemoryError):
                        weights = coming.result()
                    coming = None
                following = sequence[number + 1 : number + 2]
                if self._ahead and following and self._shell.has_room_for(following[0]):
                    reader = reader or stack.enter_context(ThreadPoolExecutor(1))
                    coming = reader.submit(self._shell.load, following[0])
                with self._shell.holding(weights or self._shell.load(layer)):
                    yield self._shell.blocks[layer]
                self._shell.forget()

    @contextlib.contextmanager
    def _computing(self) -> Iterator[ActivationStore]:
        """Where activations are while blocks compute; what goes wrong is said in words."""
        store = ActivationStore(self._memory, self._scratch, self._shell.buffer_addresses())
        try:
            with torch.no_grad(), quiet_transformers(), fast_products(self.model), store:
                yield store
        except NotStreamable as error:
            raise InputError(
                f"`{self.model.config.model_type}` cannot be streamed exactly: {error}",
                where="capture.mode: stream",
                remedy="capture.mode: memory",
                code="stream",
            ) from None
        except (RuntimeError, MemoryError) as error:
            known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
            if not known and not any(words in str(error) for words in ("allocate memory", "start new thread")):
                raise
            remedy = "dtype: bfloat16, or a smaller capture.batch_size"
            raise no_memory(
                "a block and one batch do not fit in memory", "capture.mode: stream", error, remedy
            ) from None
