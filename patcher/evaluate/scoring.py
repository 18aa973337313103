"""What a model makes of texts under each of several steering vectors, batched."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from patcher.capture.batches import RowImage, padded, with_images
from patcher.capture.layout import PLAIN_TOKENS, Layout, Text
from patcher.capture.logits import LogitsJob, LogitsSource

Vectors = Mapping[int, torch.Tensor]
"""Layer -> what the residual stream gains after it, [hidden]."""

Rows = Iterator[tuple[int, torch.Tensor]]
"""Of one batch: the index of a text, and what there is at the places that are read of it, [read, vocabulary]."""

MOST_READ = 512
"""At most so many places of a batch are read: each of them has the logits of a whole vocabulary."""
_READ_SHARE = 16
"""On a device that computes large batches well, this part of a batch may be read."""

_Place = tuple[int, Callable[[torch.Tensor], torch.Tensor]]
"""The index of a text, and how its logits are taken from those of its batch."""


def run_texts(
    source: LogitsSource,
    texts: Sequence[Text],
    variants: Sequence[Vectors],
    batch_size: int,
    use: Callable[[int, Rows], None],
) -> None:
    """Run every text under every variant; logits are computed only where texts are read.

    All variants of a batch follow one another in the order given, and share one ``inputs`` object; then comes the next
    batch. So whoever compares variants with the first one need keep no more than one batch of it.

    Args:
        source: the base model; it must hand out logits in the order of its jobs.
        texts: one that is read nowhere is left out.
        variants: layer -> [hidden] each.
        batch_size: most rows in a batch.
        use: called with the index of a variant, and the rows of the batch: logits in the model's dtype, where it is.
    """
    jobs: list[LogitsJob] = []
    origins: list[tuple[int, list[_Place]]] = []
    for job, places in _batches(source, texts, batch_size):
        jobs += [LogitsJob(job.inputs, vectors, job.columns, job.rows) for vectors in variants]
        origins += [(variant, places) for variant in range(len(variants))]

    def use_logits(number: int, logits: torch.Tensor) -> None:
        variant, places = origins[number]
        use(variant, ((index, take(logits)) for index, take in places))

    source.logits(jobs, use_logits)


def tokens_run(source: LogitsSource, texts: Sequence[Text], batch_size: int) -> int:
    """How many tokens the batches of these texts hold, those that fill them up included."""
    # To count them, no image has to be opened.
    with_image = sum(len(text.ids) for text in texts if text.image is not None and len(text.read))
    plain = [text for text in texts if text.image is None]
    return with_image + sum(job.inputs["input_ids"].numel() for job, _places in _batches(source, plain, batch_size))


def _batches(source: LogitsSource, texts: Sequence[Text], batch_size: int) -> Iterator[tuple[LogitsJob, list[_Place]]]:
    for index, text in enumerate(texts):
        if text.image is not None and len(text.read):
            inputs = with_images(torch.tensor([list(text.ids)]), [text.image], source.dtype)
            columns = torch.tensor(list(text.read))
            yield LogitsJob(inputs, {}, columns), [(index, _in_row(0, torch.arange(len(columns))))]
    read = [index for index, text in enumerate(texts) if len(text.read) and text.image is None]
    layout: Layout | None = getattr(source, "layout", None)
    if layout is None or not layout.packs:
        yield from _plain(texts, read, batch_size)
        return
    # In this order a text stands beside the one that it shares most with.
    most = max(MOST_READ, layout.tokens // _READ_SHARE)
    for chosen in _chunks(texts, sorted(read, key=lambda index: tuple(texts[index].ids)), most):
        for batch in layout.batches([texts[index] for index in chosen], batch_size):
            counts = [len(place.columns) for place in batch.places]
            columns = torch.tensor([column for place in batch.places for column in place.columns])
            rows = torch.tensor([place.row for place in batch.places]).repeat_interleave(torch.tensor(counts))
            ends = torch.tensor(counts).cumsum(0).tolist()
            places = [
                (chosen[place.prompt], _part(end - count, end))
                for place, count, end in zip(batch.places, counts, ends, strict=True)
            ]
            yield LogitsJob(batch.inputs_in(source.dtype), {}, columns, rows), places


def _chunks(texts: Sequence[Text], order: Sequence[int], most: int) -> Iterator[list[int]]:
    chosen: list[int] = []
    places = 0
    for index in order:
        if chosen and places + len(texts[index].read) > most:
            yield chosen
            chosen, places = [], 0
        chosen.append(index)
        places += len(texts[index].read)
    if chosen:
        yield chosen


def _plain(texts: Sequence[Text], read: Sequence[int], batch_size: int) -> Iterator[tuple[LogitsJob, list[_Place]]]:
    """Every text in a row of its own, texts of like length together, the shortest first."""
    chosen: list[int] = []
    for index in [*sorted(read, key=lambda index: len(texts[index].ids)), None]:
        full = len(chosen) == batch_size
        if chosen and (index is None or full or (len(chosen) + 1) * len(texts[index].ids) > PLAIN_TOKENS):
            inputs, _ = padded([texts[one].ids for one in chosen], "right", 0)
            columns = torch.tensor(sorted({place for one in chosen for place in texts[one].read}))
            picked = [torch.searchsorted(columns, torch.tensor(list(texts[one].read))) for one in chosen]
            places = [(one, _in_row(row, where)) for row, (one, where) in enumerate(zip(chosen, picked, strict=True))]
            yield LogitsJob(inputs, {}, columns), places
            chosen = []
        if index is not None:
            chosen.append(index)


def _part(start: int, end: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda logits: logits[start:end]


def _in_row(row: int, where: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda logits: logits[row, where.to(logits.device)]


def ending(ids: Sequence[int], image: RowImage | None = None) -> Text:
    """A text that is read after its last token."""
    return Text(ids, (len(ids) - 1,) if ids else (), image)


def scored_from(ids: Sequence[int], start: int, image: RowImage | None = None) -> Text:
    """A text whose tokens are scored from ``start`` on; its first token has nothing before it and never is."""
    return Text(ids, range(max(1, start) - 1, len(ids) - 1), image)


def token_log_probs(logits: torch.Tensor, text: Text) -> torch.Tensor:
    """Log-probabilities of the tokens that follow where a text is read, [read], fp64, from [read, vocabulary]."""
    following = torch.tensor([text.ids[place + 1] for place in text.read], device=logits.device)
    logits = logits.float()
    return (logits.gather(-1, following[:, None])[:, 0] - torch.logsumexp(logits, dim=-1)).cpu().double()


def mean_log_probs(
    source: LogitsSource,
    sequences: Sequence[Sequence[int]],
    starts: Sequence[int],
    variants: Sequence[Vectors],
    batch_size: int,
) -> torch.Tensor:
    """Mean log-probability (nats a token) of a sequence's tokens from ``starts`` on: [variants, sequences], fp64.

    The first token of a sequence has no context and is never scored; a sequence with nothing to score gives 0.
    """
    texts = [scored_from(ids, start) for ids, start in zip(sequences, starts, strict=True)]
    return mean_log_probs_of(source, texts, variants, batch_size)


def mean_log_probs_of(
    source: LogitsSource, texts: Sequence[Text], variants: Sequence[Vectors], batch_size: int
) -> torch.Tensor:
    """The same of texts whose tokens are scored where they are read."""
    result = torch.zeros(len(variants), len(texts), dtype=torch.float64)

    def use(variant: int, rows: Rows) -> None:
        for index, logits in rows:
            result[variant, index] = token_log_probs(logits, texts[index]).mean()

    run_texts(source, texts, variants, batch_size, use)
    return result


def perplexities(
    source: LogitsSource, texts: Sequence[Sequence[int]], variants: Sequence[Vectors], batch_size: int
) -> list[float]:
    """exp of the mean negative log-probability a token, averaged over all tokens of all passages, for each variant."""
    means = mean_log_probs(source, texts, [1] * len(texts), variants, batch_size)
    lengths = torch.tensor([len(ids) - 1 for ids in texts], dtype=torch.float64)
    return torch.exp(-(means * lengths).sum(dim=1) / lengths.sum()).tolist()
