"""What earlier patches left in the folder of a later one, carried along and given back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from patcher.checkpoint.copying import place_file
from patcher.checkpoint.steering_files import GENERATIONS, MANIFEST, VECTORS, numbered
from patcher.disk.json_files import read_json_object
from patcher.disk.links import require_inside
from patcher.patched.reading import read_manifest
from patcher.patched.schema import Manifest, Patch
from patcher.patched.writing import write_manifest

CARRIED = (VECTORS, GENERATIONS)
"""Files of a patch that a later patch of the patched folder takes along, under a number."""


def history_of(folder: Path) -> list[Patch]:
    """The patches that a base went through before, the earliest first; none for one that is not a patched folder.

    Raises:
        InputError: the folder was patched by a newer version, or its ``steering.json`` is damaged.
    """
    if not (folder / MANIFEST).is_file():
        return []
    if not {"format", "edits", "route"} <= read_json_object(folder / MANIFEST).keys():
        # Another tool's file of this name.
        return []
    return read_manifest(folder).patches


def carry_history(folder: Path, stage: Path, patches: int) -> int:
    """Take the vectors (and what they were made of) of all patches of ``folder`` along; the bytes written.

    Args:
        folder: a patched folder that is patched once more, or the one that is then unpatched.
        stage: the folder that is written.
        patches: how many patches ``folder`` has: the length of its :func:`history_of`.

    Raises:
        InputError: one of them is a link out of the folder.
    """
    written = 0
    for number in range(1, patches + 1):
        for name in CARRIED:
            source = folder / (name if number == patches else numbered(name, number))
            if source.is_file():
                require_inside(source, folder)
                written += place_file(source, stage / numbered(name, number)).written
    return written


def give_back_history(folder: Path, stage: Path, history: Sequence[Patch]) -> Manifest:
    """Write what an earlier patch had written besides the model; its manifest.

    Args:
        folder: the folder of a later patch.
        stage: the folder that becomes the earlier one.
        history: of the later patch, up to and with the earlier one.

    Raises:
        InputError: a file is a link out of the folder.
    """
    count = len(history)
    for number in range(1, count + 1):
        for name in CARRIED:
            source = folder / numbered(name, number)
            if source.is_file():
                require_inside(source, folder)
                place_file(source, stage / (name if number == count else numbered(name, number)))
    manifest = Manifest.of(history[-1], history[:-1])
    write_manifest(stage, manifest)
    return manifest
