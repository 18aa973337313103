"""Residual activations: what the decoder blocks put out, at the tokens that contrast pairs read."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Protocol

import torch
from torch import nn

from patcher.architectures.decoder import decoder_config
from patcher.capture.batches import (
    Batch,
    Padding,
    Place,
    PromptRow,
    Readable,
    image_batches,
    image_in,
    make_batches,
    plain_rows,
    shared_rows,
    side_by_side,
)
from patcher.capture.forward import read_blocks
from patcher.capture.meter import Meter
from patcher.capture.shared_prefixes import Exactness, displaced_prompt
from patcher.errors import InputError, no_memory

Progress = Callable[[int], None] | None
"""Told how many are done."""

CONTROL_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}
"""By how much a prompt read in a shared row may differ from the same prompt alone, relative to its residual's norm.

Rounding makes 1e-6 of it. Half precision makes so much more that only gross errors show; there the proof on the
stand-in (:mod:`patcher.capture.shared_prefixes`) has to do.
"""
CONTROL_TOLERANCE_HALF = 0.1


@dataclass(frozen=True, eq=False)
class Residuals:
    """What was captured at one layer.

    Attributes:
        read: [prompts, hidden], fp32; each row the mean over the prompt's read positions, taken in fp64.
        norm_sums: [prompts], fp64: the sum of the residual's L2 norm over the prompt's tokens but the first (attention
            sinks live there).
        tokens: [prompts], int64: how many tokens each of those sums is taken over.
    """

    read: torch.Tensor
    norm_sums: torch.Tensor
    tokens: torch.Tensor

    @property
    def mean_norm(self) -> float:
        """The mean residual norm a token."""
        return float(self.norm_sums.sum() / self.tokens.sum().clamp(min=1))

    def part(self, start: int, end: int) -> Residuals:
        """Those of the prompts from ``start`` to before ``end``."""
        return Residuals(self.read[start:end], self.norm_sums[start:end], self.tokens[start:end])

    @classmethod
    def together(cls, parts: Sequence[Residuals]) -> Residuals:
        """Those of all parts, in their order."""
        return cls(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)))


class Collector:
    """Keeps the rows that are read, and sums of norms; nothing else of a residual stream outlives its batch."""

    def __init__(self, batches: Sequence[Batch], prompts: int, hidden: int, layers: Sequence[int]) -> None:
        self.batches = batches
        self.rows = {layer: torch.zeros(prompts, hidden, dtype=torch.float64) for layer in layers}
        self.norms = {layer: torch.zeros(prompts, dtype=torch.float64) for layer in layers}
        self.tokens = torch.zeros(prompts, dtype=torch.long)
        for place in (place for batch in batches for place in batch.places):
            self.tokens[place.prompt] = len(place.counted)

    def __call__(self, layer: int, number: int, hidden: torch.Tensor) -> None:
        """Take what is read from the residual stream [rows, width, hidden] of a batch."""
        batch, device = self.batches[number], hidden.device
        places = batch.places
        if batch.images and tuple(hidden.shape[:2]) != batch.shape:
            raise InputError(
                "the model does not give the tokens of an image the places that its processor gives them",
                where=f"layer {layer}",
                found=f"{tuple(hidden.shape[:2])} places of {batch.shape}",
                remedy="leave the images out of the pairs",
            )
        prompts = [place.prompt for place in places]
        # Apple's GPUs have no fp64.
        exact = torch.float32 if device.type == "mps" else torch.float64
        owner, rows, columns = _indices(places, [place.columns for place in places], device)
        sums = torch.zeros(len(places), hidden.shape[-1], dtype=exact, device=device)
        sums.index_add_(0, owner, hidden[rows, columns].to(exact))
        counts = torch.tensor([[len(place.columns)] for place in places])
        norms = torch.linalg.vector_norm(hidden, dim=-1, dtype=torch.float32).to(exact)
        owner, rows, columns = _indices(places, [place.counted for place in places], device)
        totals = torch.zeros(len(places), dtype=exact, device=device).index_add_(0, owner, norms[rows, columns])
        self.put(layer, prompts, sums.cpu().double() / counts, totals.cpu().double())

    def put(self, layer: int, prompts: Sequence[int], rows: torch.Tensor, norms: torch.Tensor) -> None:
        """Take what was read for some prompts: fp64 [prompts, hidden], and the sums of norms [prompts]."""
        self.rows[layer][list(prompts)] = rows
        self.norms[layer][list(prompts)] = norms

    def take(self, other: Collector) -> None:
        """Take all that another has read, in place of what was read of those prompts before."""
        prompts = [place.prompt for batch in other.batches for place in batch.places]
        self.tokens[prompts] = other.tokens[prompts]
        for layer in self.rows:
            self.put(layer, prompts, other.rows[layer][prompts], other.norms[layer][prompts])

    def residuals(self, layer: int, prompts: int) -> Residuals:
        """What was collected at a layer, for the first ``prompts`` of them.

        Raises:
            InputError: it is not finite.
        """
        read = self.rows[layer][:prompts].float()
        if not torch.isfinite(read).all():
            raise InputError(
                "the model computes residuals that are not finite",
                where=f"layer {layer}",
                remedy="capture in a wider dtype: dtype: float32 (or bfloat16 instead of float16); if it "
                "was, the weights hold numbers that are not finite: get the checkpoint again",
            )
        return Residuals(read, self.norms[layer][:prompts].clone(), self.tokens[:prompts].clone())


def _indices(
    places: Sequence[Place], columns: Sequence[tuple[int, ...]], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For every column of every place: the place's number, its row, the column."""
    counts = torch.tensor([len(one) for one in columns])
    owner = torch.repeat_interleave(torch.arange(len(places)), counts)
    rows = torch.tensor([place.row for place in places])[owner]
    return owner.to(device), rows.to(device), torch.tensor([c for one in columns for c in one]).to(device)


class Runner(Protocol):
    """Runs batches through a model and hands over the residual stream.

    Attributes:
        hidden: width of the residual stream.
    """

    hidden: int

    @property
    def dtype(self) -> torch.dtype:
        """That blocks compute in."""
        ...

    def run(self, batches: Sequence[Batch], layers: Sequence[int], collect: Collector, progress: Progress) -> None:
        """Call ``collect`` for every layer of every batch, and ``progress`` with the number of batches done."""
        ...


class InMemory:
    """A model that is loaded, on one device or spread over several by accelerate.

    A batch that does not fit on an accelerator is run in halves.
    """

    def __init__(self, model: nn.Module, blocks: str, meter: Meter | None = None) -> None:
        self.model, self.blocks = model, blocks
        self.hidden = int(decoder_config(model.config).hidden_size)
        self.meter = meter or Meter(len(model.get_submodule(blocks)))  # type: ignore[arg-type]

    @property
    def dtype(self) -> torch.dtype:
        """That blocks compute in; it may be changed between two captures."""
        return next(parameter.dtype for parameter in self.model.parameters() if parameter.is_floating_point())

    def run(self, batches: Sequence[Batch], layers: Sequence[int], collect: Collector, progress: Progress) -> None:
        def taken(number: int) -> Callable[[int, torch.Tensor], None]:
            return lambda layer, hidden: collect(layer, number, hidden)

        for number, batch in enumerate(batches):
            self._run(batch, layers, taken(number))
            if progress is not None:
                progress(number + 1)

    def _run(self, batch: Batch, layers: Sequence[int], use: Callable[[int, torch.Tensor], None]) -> None:
        try:
            read_blocks(self.model, self.blocks, layers, batch.inputs_in(self.dtype), use)
            self.meter.add(batch.inputs["input_ids"].numel(), max(layers) + 1)
            return
        except torch.OutOfMemoryError as error:
            if batch.shape[0] == 1:
                message, where = "a single prompt does not fit into the device's memory", f"{batch.shape[1]} tokens"
                raise no_memory(message, where, error, "capture.mode: stream, or device: cpu") from None
        halves: list[dict[int, torch.Tensor]] = []
        for half in batch.halves():
            seen: dict[int, torch.Tensor] = {}
            self._run(half, layers, seen.__setitem__)
            halves.append(seen)
        for layer in layers:
            use(layer, torch.cat([seen[layer] for seen in halves]))


def capture_residuals(
    runner: Runner,
    prompts: Sequence[Readable],
    layers: Sequence[int],
    *,
    token_budget: int,
    groups: Sequence[int] | None = None,
    batch_size: int | None = None,
    exactness: Exactness | None = None,
    positions: int | None = None,
    padding: Padding = "right",
    progress: Progress = None,
    note: Callable[[str], None] | None = None,
) -> Mapping[int, Residuals]:
    """Read the residual stream after each block of ``layers``, in one pass over the prompts.

    Nothing after the last of the layers is computed. A prompt with an image is run alone, or with others of its shape.
    Of the other prompts, tokens that prompts begin with alike are computed once, where
    ``exactness`` says that this is exact for the architecture. One prompt is then also run alone; if the two disagree,
    all are run again without sharing. Batches hold rows of like length.

    Args:
        runner: the model.
        prompts: token ids and read positions.
        layers: 0-based block indices; -1 is the residual stream that enters block 0.
        token_budget: most tokens in a batch, padding included; one row is always run.
        groups: how many prompts belong together, one group after the other; None: all. A group's batches hold its own
            prompts only, so that what is read of it is, to the last bit, what is read of it alone.
        batch_size: most rows in a batch.
        exactness: what this architecture computes alike, from :func:`~.shared_prefixes.exactness`; None: only
            rows of one prompt, padded.
        positions: how many positions the model has, if it has a table of them.
        padding: the side on which rows of one prompt are filled up.
        progress: called with the number of prompts done.
        note: called with what a user may want to know.

    Returns:
        For each layer, the residuals in the order of ``prompts``.

    Raises:
        InputError: a prompt is longer than the model's positions, or its residuals are not finite.
        OutsideError: a single prompt does not fit in the device's memory.
    """
    longest = max(len(prompt.ids) for prompt in prompts)
    if positions is not None and longest > positions:
        raise InputError(
            f"a prompt of {longest} tokens is longer than the {positions} positions of the model",
            remedy="shorten the contrast pairs",
        )
    say = note or (lambda _text: None)
    limits = (token_budget, positions, exactness.window if exactness is not None else None)
    longest_row = min(limit for limit in limits if limit is not None)
    *starts, _end = itertools.accumulate(groups or [len(prompts)], initial=0)
    parts = [range(start, start + size) for start, size in zip(starts, groups or [len(prompts)], strict=True)]
    texts = [[number for number in part if image_in(prompts[number]) is None] for part in parts]
    together = exactness is None or exactness.padding
    everyone, controls = list(prompts), dict[int, tuple[int, int]]()

    def batches_of(rows: Sequence[PromptRow]) -> list[Batch]:
        most_rows = batch_size if together else 1
        return list(make_batches(rows, everyone, token_budget=token_budget, most_rows=most_rows, padding=padding))

    def plain(part: Sequence[int]) -> list[Batch]:
        return batches_of([_moved(row, part) for row in plain_rows([prompts[number] for number in part])])

    def run(batches: Sequence[Batch]) -> Collector:
        collector = Collector(batches, len(everyone), runner.hidden, layers)
        done = [0, *itertools.accumulate(len(batch.places) for batch in batches)]
        runner.run(
            batches,
            layers,
            collector,
            None if progress is None else lambda number: progress(min(len(prompts), done[number])),
        )
        return collector

    batches: list[Batch] = []
    for number, (whole, part) in enumerate(zip(parts, texts, strict=True)):
        seen = [prompt for prompt in whole if image_in(prompts[prompt]) is not None]
        batches += image_batches(prompts, seen, token_budget=token_budget, most_rows=batch_size)
        shared = None
        if exactness is not None and part:
            shared = _shared([prompts[prompt] for prompt in part], exactness, longest_row, token_budget, say)
        if shared is None:
            batches += plain(part)
            continue
        rows = [_moved(row, part) for row in shared]
        # The same prompt alone.
        controls[number] = (displaced_prompt(rows), len(everyone))
        everyone.append(prompts[controls[number][0]])
        alone = _moved(plain_rows(everyone[-1:])[0], [len(everyone) - 1])
        batches += [*batches_of(rows), *batches_of([alone])]
    collector = run(batches)
    again: list[Batch] = []
    for number, (control, alone_at) in controls.items():
        error = max(relative_error(collector.rows[layer][control], collector.rows[layer][alone_at]) for layer in layers)
        if not error <= CONTROL_TOLERANCE.get(runner.dtype, CONTROL_TOLERANCE_HALF):
            say(f"shared prefixes are not exact on these weights (off by {error:.1e}): every prompt is computed whole")
            again += plain(texts[number])
    if again:
        collector.take(run(again))
    return {layer: collector.residuals(layer, len(prompts)) for layer in layers}


def _moved(row: PromptRow, numbers: Sequence[int]) -> PromptRow:
    """The row, of prompts that have these numbers."""
    return PromptRow(row.ids, row.depths, {numbers[prompt]: path for prompt, path in row.paths.items()})


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The norm of the difference over that of ``wanted``; infinite where it is not a number."""
    error = float((found - wanted).norm() / wanted.norm().clamp(min=1e-30))
    return math.inf if math.isnan(error) else error


def _shared(
    prompts: Sequence[Readable],
    exactness: Exactness,
    longest: int,
    token_budget: int,
    say: Callable[[str], None],
) -> list[PromptRow] | None:
    """Rows that share prefixes, or None where that saves nothing or is not exact."""
    if exactness.sharing is not None:
        say(f"every prompt is computed whole: {exactness.sharing}")
        return None
    rows = shared_rows(prompts, linear_tokens=exactness.linear_tokens, longest=longest)
    whole, packed = sum(len(prompt.ids) for prompt in prompts), sum(len(row.ids) for row in rows)
    # The prompt that is run alone as well has to pay for itself.
    if packed + len(prompts[displaced_prompt(rows)].ids) >= whole or len(rows) == len(prompts):
        return None
    say(f"shared prefixes: {packed:,} of {whole:,} tokens are computed")
    return side_by_side(rows, linear_tokens=exactness.linear_tokens, longest=longest, token_budget=token_budget)
