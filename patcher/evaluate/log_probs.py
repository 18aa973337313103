"""The next-token distributions of texts under each of several steering vectors, a batch at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from patcher.capture.logits import LogitsSource
from patcher.evaluate.scoring import Vectors, jobs_of

Rows = Iterator[tuple[int, torch.Tensor]]
"""Of one batch: the index of a text, and its log-probabilities [positions, vocabulary], fp32, where the model is."""

_POSITIONS = 512
"""At most so many positions are in a batch: each of them has the logits of a whole vocabulary."""


def next_token_log_probs(
    source: LogitsSource,
    texts: Sequence[Sequence[int]],
    variants: Sequence[Vectors],
    batch_size: int,
    use: Callable[[int, Rows], None],
    *,
    last_only: bool = False,
) -> None:
    """Run every text under every variant.

    All variants of a batch follow one another in the order given, and share one ``inputs`` object; then comes the next
    batch. So whoever compares variants with the first one need keep no more than one batch of it.

    Args:
        source: the base model; it must hand out logits in the order of its jobs.
        texts: token ids; a text without any is left out.
        variants: layer -> [hidden] each.
        batch_size: most rows in a batch.
        use: called with the index of a variant, and the rows of the batch.
        last_only: only the distribution after each text's last token, [1, vocabulary].
    """
    jobs, origins = jobs_of(texts, _batches(texts, batch_size), variants, last_only=last_only)

    def rows(chosen: list[int], last: torch.Tensor, logits: torch.Tensor) -> Rows:
        for row, (index, end) in enumerate(zip(chosen, last.tolist(), strict=True)):
            kept = logits[row, end if last_only else 0 : end + 1]
            yield index, torch.log_softmax(kept.float(), dim=-1)

    def use_logits(number: int, logits: torch.Tensor) -> None:
        variant, chosen, last = origins[number]
        use(variant, rows(chosen, last, logits))

    source.logits(jobs, use_logits)


def wide(values: torch.Tensor) -> torch.Tensor:
    """As fp64, on the device that has it."""
    return (values.cpu() if values.device.type == "mps" else values).double()


def _batches(texts: Sequence[Sequence[int]], batch_size: int) -> Iterator[list[int]]:
    """Indices of texts of like length."""
    chosen: list[int] = []
    for index in sorted((index for index, ids in enumerate(texts) if ids), key=lambda index: len(texts[index])):
        if chosen and (len(chosen) == batch_size or (len(chosen) + 1) * len(texts[index]) > _POSITIONS):
            yield chosen
            chosen = []
        chosen.append(index)
    if chosen:
        yield chosen
