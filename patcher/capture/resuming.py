"""Passes that begin after the first steered block: what lies before it is computed once for many vectors."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from patcher.architectures.decoder import decoder_config
from patcher.architectures.residual import block_input, gained
from patcher.capture.batches import make_batches, padded, plain_rows
from patcher.capture.forward import OF_TEXT, replaced_forwards, row_vectors, run_blocks, steering_hooks
from patcher.capture.layout import Layout, Text
from patcher.capture.logits import LoadedModel, LogitsJob, job_logits
from patcher.capture.meter import Meter
from patcher.errors.causes import cause_of

_EXACT = 1e-4
"""Largest difference of a resumed pass from a whole one in fp32, relative to the largest logit."""
_CLOSE = 0.02
"""The same in half precision, of the means: there the order of the sums alone moves every logit."""
_CLOSE_PACKED = 0.1
"""The same of a text in another one's row, whose products have other shapes; the stand-in's proof is the sharp one."""
_MOST_LOGITS = 2**28
"""In a stacked batch; a GPU has room for the activations of far more tokens than for the logits of all of them."""
_PROOF_TOKENS = 8
"""Of the row that is computed whole as well; what a block hands on shows in a few tokens."""


@dataclass
class _Kept:
    layer: int
    residual: torch.Tensor


class ResumingModel(LoadedModel):
    """A model in memory whose steered passes start after the first steered block, from a residual that is kept.

    The residual stream up to the output of block k does not depend on what is added there, so one pass serves every
    coefficient at k, and its continuation every layer after k. Vectors are stacked into one batch up to the token
    budget.
    Whether a pass of the class can be resumed is not assumed: at every layer one row is computed whole as well, and if
    the two disagree, everything at that layer is computed whole.

    Args:
        model: a causal LM in eval mode, under any device map.
        blocks: path of its list of decoder blocks.
        tokens: the most tokens in a batch of stacked vectors.
        memory: bytes that may be kept for residuals.
        note: told when passes cannot be resumed.
        layout: how its rows may be made.
        meter: counts what the model is run for.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: str,
        *,
        tokens: int,
        memory: int,
        note: Callable[[str], None] | None = None,
        layout: Layout | None = None,
        meter: Meter | None = None,
    ) -> None:
        super().__init__(model, blocks, layout, meter)
        self.tokens, self.memory, self.note = tokens, memory, note
        self._vocabulary = int(decoder_config(model.config).vocab_size)
        self.whole: set[int] = set()
        """Layers at which a pass cannot be resumed."""
        self._proven: set[int] = set()
        self._proven_with_images: set[int] = set()
        self._packing_proven = False
        self._kept: dict[str, _Kept] = {}
        self._tuples: dict[int, int | None] = {}

    def logits(self, jobs: Sequence[LogitsJob], use: Callable[[int, torch.Tensor], None]) -> None:
        for numbers, layer in _together(jobs):
            first = next((jobs[number] for number in numbers if jobs[number].vectors), jobs[numbers[0]])
            if layer is None or layer < 0 or layer in self.whole or not self._resumable(first, layer):
                for number in numbers:
                    use(number, self.whole_pass(jobs[number]))
                continue
            tokens, kept = first.inputs["input_ids"].numel(), len(first.columns)
            logits = self._vocabulary * (kept if first.rows is not None else len(first.inputs["input_ids"]) * kept)
            each = max(1, min(self.tokens // tokens, _MOST_LOGITS // logits))
            for start in range(0, len(numbers), each):
                part = numbers[start : start + each]
                for number, found in zip(part, self._stacked([jobs[number] for number in part], layer), strict=True):
                    use(number, found)

    def cost(self, tokens: int, variants: Sequence[Mapping[int, torch.Tensor]], *, again: bool = False) -> float:
        layer = min((min(vectors) for vectors in variants if vectors), default=None)
        if layer is None or layer < 0 or layer in self.whole:
            return super().cost(tokens, variants)
        before = 0 if again and self.memory else layer + 1
        return tokens * (before + len(variants) * (self.meter.blocks - layer - 1)) / self.meter.blocks

    def prove(self, ids: Sequence[int], vectors: Mapping[int, torch.Tensor]) -> None:
        """Find out, on a few of these tokens, whether texts may share rows and whether passes can be resumed."""
        if self.layout.packs and not self._packing_proven:
            self._packing_proven = self._packable(ids[:_PROOF_TOKENS])
            if not self._packing_proven:
                self.layout.give_up_packing()
                if self.note is not None:
                    self.note("texts that share rows are not exact on these weights: every one has a row of its own")
        inputs, _ = padded([ids[:_PROOF_TOKENS]], "right", 0)
        layer = min(vectors, default=None)
        if layer is not None and layer >= 0 and layer not in self.whole:
            self._resumable(LogitsJob(inputs, vectors, torch.tensor([inputs["input_ids"].shape[1] - 1])), layer)

    def _packable(self, ids: Sequence[int]) -> bool:
        """Whether a text gives the same logits behind another one in its row."""
        other = tuple(reversed(ids))
        rows = plain_rows([Text(other, ()), Text(ids, (len(ids) - 1,))])
        rows[0].append(rows[1])
        [together] = make_batches(rows[:1], [Text(other, ()), Text(ids, (len(ids) - 1,))], token_budget=2 * len(ids))
        alone, _ = padded([ids], "right", 0)
        expected = self.whole_pass(LogitsJob(alone, {}, torch.tensor([len(ids) - 1])))
        try:
            found = self.whole_pass(LogitsJob(together.inputs_in(self.dtype), {}, torch.tensor([2 * len(ids) - 1])))
        except (RuntimeError, TypeError, AttributeError, KeyError, IndexError, ValueError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            return False
        return _same(found, expected, _CLOSE_PACKED)

    def _stacked(self, jobs: Sequence[LogitsJob], layer: int) -> Sequence[torch.Tensor]:
        """The logits of jobs that share inputs and their first steered layer, from one resumed pass.

        One that adds nothing may be among them.
        """
        first, count = jobs[0], len(jobs)
        residual = self._residual(first.inputs, layer)
        steered = torch.cat(
            [gained(residual, job.vectors[layer]) if layer in job.vectors else residual for job in jobs]
        )
        inputs = {name: value.repeat(count, *[1] * (value.dim() - 1)) for name, value in first.inputs.items()}
        height, columns, rows = len(residual), first.columns, first.rows
        if rows is not None:
            rows = torch.cat([rows + number * height for number in range(count)])
            columns = columns.repeat(count)
        self.meter.add(inputs["input_ids"].numel(), self.meter.blocks - layer - 1)
        with self._resumed(layer, steered), self._later(jobs, layer, height):
            logits = job_logits(self.model, inputs, columns, rows)
        return torch.split(logits, len(logits) // count)

    def _later(self, jobs: Sequence[LogitsJob], layer: int, rows: int) -> contextlib.AbstractContextManager[None]:
        later = row_vectors([{place: job.vectors[place] for place in job.vectors if place != layer} for job in jobs])
        added = {place: vectors.repeat_interleave(rows, dim=0) for place, vectors in later.items()}
        return steering_hooks(self.model, self.blocks, added)

    def _residual(self, inputs: Mapping[str, torch.Tensor], layer: int) -> torch.Tensor:
        """What ``layer`` hands on unsteered, [rows, width, hidden] of one stream, from the nearest that is kept."""
        key = _key(inputs)
        kept = self._kept.get(key)
        if kept is not None and kept.layer == layer:
            return kept.residual
        start = self._resumed(kept.layer, kept.residual) if kept and kept.layer < layer else contextlib.nullcontext()
        with start, self._shapes_seen(layer):
            found = run_blocks(self.model, self.blocks, [layer], inputs)[layer]
        self.meter.add(inputs["input_ids"].numel(), layer - (kept.layer if kept and kept.layer < layer else -1))
        self._kept.pop(key, None)
        if found.nbytes + sum(other.residual.nbytes for other in self._kept.values()) <= self.memory:
            self._kept[key] = _Kept(layer, found)
        return found

    @contextlib.contextmanager
    def _shapes_seen(self, last: int) -> Iterator[None]:
        """Remember what each block returns: a tensor, or a tuple of how many."""

        def see(layer: int) -> Callable[..., None]:
            def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
                if not isinstance(output, torch.Tensor) and any(part is not None for part in output[1:]):
                    # What it hands on beside the residual stream would have to be kept as well.
                    self.whole.update(range(layer, last + 1))
                self._tuples[layer] = None if isinstance(output, torch.Tensor) else len(output)

            return hook

        unseen = [layer for layer in range(last + 1) if layer not in self._tuples]
        with contextlib.ExitStack() as stack:
            for layer in unseen:
                block = self.model.get_submodule(f"{self.blocks}.{layer}")
                stack.enter_context(block.register_forward_hook(see(layer)))
            yield

    def _resumed(self, layer: int, residual: torch.Tensor) -> contextlib.AbstractContextManager[None]:
        """While open, blocks before ``layer`` pass on what they get, and ``layer`` itself gives ``residual``."""

        def gives(place: int) -> Callable[..., Any]:
            length = self._tuples.get(place)

            def forward(*inputs: Any, **keywords: Any) -> Any:
                hidden = residual if place == layer else block_input(inputs, keywords)
                return hidden if length is None else (hidden, *[None] * (length - 1))

            return forward

        replaced = [self.model.get_submodule(f"{self.blocks}.{place}") for place in range(layer + 1)]
        return replaced_forwards(replaced, map(gives, range(layer + 1)))

    def _resumable(self, job: LogitsJob, layer: int) -> bool:
        seen = any(name not in OF_TEXT for name in job.inputs)
        proven = self._proven_with_images if seen else self._proven
        if layer in proven:
            return True
        # An image cannot be cut off; the other pass, of another prompt, is one of the proof over text.
        one = LogitsJob(job.inputs, job.vectors, job.columns) if seen else _short(job)
        whole = self.whole_pass(one)
        try:
            self._residual(one.inputs, layer)
            # What a class may keep of its last pass must not be of this very prompt when it is resumed.
            if not seen:
                other = {**one.inputs, "input_ids": one.inputs["input_ids"].roll(1, dims=1)}
                self.whole_pass(LogitsJob(other, {}, one.columns))
            # Stacked with itself, as the vectors will be.
            resumed = self._stacked([one, one], layer)[1]
        except (RuntimeError, TypeError, AttributeError, KeyError, IndexError, ValueError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            self._give_up(layer, f"{type(error).__name__}: {cause_of(error)}")
            return False
        finally:
            self._kept.pop(_key(one.inputs), None)
        if layer in self.whole or not _same(resumed, whole):
            self._give_up(layer, "a block hands on more than the residual stream")
            return False
        proven.add(layer)
        return True

    def _give_up(self, layer: int, why: str) -> None:
        self.whole.add(layer)
        if self.note is not None:
            self.note(f"passes steered at block {layer} are computed whole: {why}")


def _same(found: torch.Tensor, expected: torch.Tensor, close: float = _CLOSE) -> bool:
    difference, size = (found.float() - expected.float()).abs(), expected.float().abs()
    if found.dtype == torch.float32:
        return bool(difference.max() <= _EXACT * size.max().clamp(min=1))
    return bool(difference.mean() <= close * size.mean())


def _first(job: LogitsJob) -> int | None:
    return min(job.vectors, default=None)


def _short(job: LogitsJob) -> LogitsJob:
    """The first tokens of the first row: a row of its own, of one text."""
    ids, depths = job.inputs["input_ids"][0], job.inputs["position_ids"][0].tolist()
    attended = job.inputs["attention_mask"][0]
    length = sum(1 for _ in itertools.takewhile(lambda place: depths[place] == place, range(len(depths))))
    if attended.dim() == 1:
        length = min(length, max(1, int(attended.sum())))
    length = min(length, _PROOF_TOKENS)
    inputs, _ = padded([ids[:length].tolist()], "right", 0)
    return LogitsJob(inputs, job.vectors, torch.arange(length))


def _together(jobs: Sequence[LogitsJob]) -> Iterator[tuple[list[int], int | None]]:
    """Runs of consecutive jobs with the same inputs, columns and first steered layer, and that layer.

    A job that adds nothing goes with whatever stands beside it.
    """
    run: list[int] = []
    layer: int | None = None
    for number, job in enumerate(jobs):
        own = _first(job)
        if run and not (_alike(jobs[run[0]], job) and (layer is None or own is None or own == layer)):
            yield run, layer
            run, layer = [], None
        run.append(number)
        layer = own if layer is None else layer
    if run:
        yield run, layer


def _alike(first: LogitsJob, second: LogitsJob) -> bool:
    if first.inputs is not second.inputs or (first.rows is None) != (second.rows is None):
        return False
    same_rows = first.rows is None or second.rows is None or torch.equal(first.rows, second.rows)
    return torch.equal(first.columns, second.columns) and same_rows


def _key(inputs: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(inputs):
        digest.update(f"{name}{tuple(inputs[name].shape)}".encode())
        digest.update(inputs[name].cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
