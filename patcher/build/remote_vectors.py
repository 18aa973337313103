"""The steering vectors of a remote build: from files alone, or from the first blocks of the base, streamed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from patcher.vectors import SteeringVector
from patcher.vectors.files import load_vector_file
from patcher.vectors.finding import Direction, PreparedVector, steering_vector


def vectors_from_files(prepared: Sequence[PreparedVector], hidden: int, recipe_folder: Path) -> list[SteeringVector]:
    """Vectors of method ``file``, without a model: the residual norm beside them is not known.

    Raises:
        InputError: a file does not fit, or its direction is zero or not finite.
    """
    found = []
    for entry in prepared:
        path = Path(str(entry.spec.file)).expanduser()
        path = path if path.is_absolute() else recipe_folder / path
        for layer in entry.layers:
            values = load_vector_file(path, layer=layer, hidden=hidden, tensor=entry.spec.tensor)
            found.append(steering_vector(entry.spec, Direction(layer, None, values, None, None)))
    return found
