"""What a patched folder has beside a checkpoint's own files: how these files, and the tensors in them, are called."""

from __future__ import annotations

MANIFEST = "steering.json"
VECTORS = "steering.safetensors"
GENERATIONS = "steering_generations.jsonl"
CARD = "README.md"
PICTURES = "steering_*.png"

ORIGINAL_PREFIX, RIGHT_PREFIX, SPREAD_PREFIX = "original/", "right/", "spread/"
"""In :data:`VECTORS`, before the name of a tensor of the copy: what the base stores there, and the other factors of an
outer product."""


def tensor_key(name: str, layer: int) -> str:
    """The key of an edit's vector in :data:`VECTORS`."""
    return f"{name}.layer.{layer}"


def numbered(name: str, number: int | str) -> str:
    """What a file of the ``number``-th patch (from 1) is called in the folder of a later one; of any for ``*``."""
    stem, dot, ending = name.partition(".")
    return f"{stem}.{number}{dot}{ending}"
