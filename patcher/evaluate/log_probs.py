"""The next-token distributions of texts under each of several steering vectors, a batch at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from patcher.capture.layout import Text
from patcher.capture.logits import LogitsSource
from patcher.evaluate.scoring import Rows, Vectors, ending, run_texts


def next_token_log_probs(
    source: LogitsSource,
    texts: Sequence[Sequence[int]],
    variants: Sequence[Vectors],
    batch_size: int,
    use: Callable[[int, Rows], None],
    *,
    last_only: bool = False,
) -> None:
    """Run every text under every variant, as :func:`patcher.evaluate.scoring.run_texts` does.

    Args:
        source: the base model; it must hand out logits in the order of its jobs.
        texts: token ids; a text without any is left out.
        variants: layer -> [hidden] each.
        batch_size: most rows in a batch.
        use: called with the index of a variant, and the rows of the batch: log-probabilities [positions, vocabulary],
            fp32, where the model is.
        last_only: only the distribution after each text's last token, [1, vocabulary].
    """

    def use_logits(variant: int, rows: Rows) -> None:
        use(variant, ((index, torch.log_softmax(logits.float(), dim=-1)) for index, logits in rows))

    read = [ending(ids) if last_only else Text(ids, range(len(ids))) for ids in texts]
    run_texts(source, read, variants, batch_size, use_logits)


def wide(values: torch.Tensor) -> torch.Tensor:
    """As fp64, on the device that has it."""
    return (values.cpu() if values.device.type == "mps" else values).double()
