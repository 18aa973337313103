"""How the names on disk become those that stock software reads: what stands before them, or between, is left out.

Training wraps a model in others, and a state dict that is saved from the outermost has their names in its own:
``_orig_mod.`` of torch.compile, ``module.`` of data parallel training, ``model.`` of a training framework.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from patcher.checkpoint.bin_files import load_bin
from patcher.checkpoint.copying import place_file
from patcher.checkpoint.folder import INDEX, SINGLE, CheckpointFolder
from patcher.checkpoint.names import WRAPPERS
from patcher.checkpoint.writer import copy_tensors


def without(name: str, stripped: Sequence[str]) -> str:
    """A name on disk without what is left out: wrappers wherever they stand, another text where the name begins."""
    for text in stripped:
        if text in WRAPPERS:
            parts = name.split(".")
            name = ".".join(part for part in parts if part != text[:-1])
        else:
            name = name.removeprefix(text)
    return name


def renamed(names: Iterable[str], stripped: Sequence[str]) -> dict[str, str] | None:
    """Name on disk -> without what is left out; None where two would be one."""
    found = {name: without(name, stripped) for name in names}
    return found if len(set(found.values())) == len(found) else None


def candidates(names: Collection[str], expected: Collection[str]) -> list[tuple[str, ...]]:
    """What could be left out of the names so that they become the expected ones; the most names first."""
    wrappers = tuple(text for text in WRAPPERS if any(f".{text}" in f".{name}" for name in names))
    prefixes: Counter[str] = Counter()
    for name in (without(name, wrappers) for name in names):
        parts = name.split(".")
        tails = ((".".join(parts[:index]), ".".join(parts[index:])) for index in range(len(parts)))
        head = next((head for head, tail in tails if tail in expected), None)
        if head is not None:
            prefixes[head + "." if head else ""] += 1
    ways = [(*wrappers, *([prefix] if prefix else [])) for prefix, _count in prefixes.most_common(4)]
    return [way for way in ways if way]


def write_renamed(base: CheckpointFolder, target: Path, stripped: Sequence[str]) -> CheckpointFolder:
    """Write ``base`` (safetensors) into ``target`` under the names that stock software reads.

    Bytes of tensors are copied or shared; only headers and the index are new.
    """
    target.mkdir(parents=True, exist_ok=True)
    names = {name: without(name, stripped) for name in base.tensors}
    for file in base.weight_files:
        copy_tensors(base.path / file, target / file, names)
    if base.weight_files != [SINGLE]:
        weight_map = {names[name]: info.file.name for name, info in base.tensors.items()}
        index = {**base.index, "weight_map": dict(sorted(weight_map.items()))}
        (target / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    for side in (Path("config.json"), *base.side_files(remote_code=True)):
        place_file(base.path / side, target / side)
    return CheckpointFolder(target)


def renamed_further(base: CheckpointFolder, stripped: Sequence[str], later: Mapping[str, str]) -> dict[str, str]:
    """Name in the base -> in its copy, where names were stripped first, and a route gave new ones after that."""
    if not stripped:
        return {}
    # A pickle has no header; its names are those of its tensors.
    names = [name for file in base.weight_files for name in load_bin(base.path / file)] if base.is_bin else base.tensors
    short = {name: without(name, stripped) for name in names}
    return {name: later.get(new, new) for name, new in short.items() if new != name}
