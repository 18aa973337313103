"""Models larger than memory: one pass over the weights, block after block, all batches through each."""

from patcher.capture.streaming.model import StreamedModel

__all__ = ["StreamedModel"]
