"""What a build was made of besides the base, as hashes: so that a second build can say why it is another one."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from patcher.checkpoint.copying import sha256_of
from patcher.pairs.pair import TokenisedSide
from patcher.patched.schema import Patch
from patcher.vectors.prepared import PreparedVector

_PACKAGES = ("torch", "transformers", "tokenizers")


def input_records(prepared: Sequence[PreparedVector]) -> list[dict[str, Any]]:
    """Of each vector the SHA-256 of its file, of its pairs as texts and as tokens, and of its images."""
    return [
        {
            "vector": entry.spec.name,
            "file": None if entry.file is None else _content(entry.file.path),
            "pairs": _hash(_texts(entry)),
            "tokens": _hash([[side.ids, side.read] for side in _sides(entry)]),
            **({} if not entry.image_count else {"images": _hash(_images(entry))}),
        }
        for entry in prepared
    ]


def _texts(entry: PreparedVector) -> list[Any]:
    if entry.lists is not None:
        parts = (entry.lists.used, entry.lists.rest) if entry.lists.rest else (entry.lists.used,)
        lists = [texts for part in parts for texts in (part.positive, part.negative)]
        return [[[_plain(item.prompt), item.text] for item in texts] for texts in lists]
    # With `refit` the final vector is made of the held-out pairs as well.
    pairs = (*entry.used, *entry.held_out) if entry.rest else entry.used
    return [[_plain(pair.prompt), pair.positive, pair.negative] for pair in pairs]


def _images(entry: PreparedVector) -> list[str | None]:
    pairs = (*entry.used, *entry.held_out) if entry.rest else entry.used
    return [None if pair.image is None else pair.image.digest for pair in pairs]


def _sides(entry: PreparedVector) -> list[TokenisedSide]:
    if entry.lists is not None:
        return [*entry.lists.sides, *entry.rest_sides]
    return [side for pair in (*entry.pairs, *entry.rest) for side in (pair.positive, pair.negative)]


def environment(device: str | None = None, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """What computed the vectors.

    Args:
        device, dtype: of the capture, where there was one.
    """
    return {
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in _PACKAGES},
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "device": device,
        "dtype": None if dtype is None else str(dtype).removeprefix("torch."),
    }


def reasons(before: Patch, after: Patch) -> Iterator[str]:
    """Why two builds of one recipe are not the same, from what each says that it was made of."""
    known = {record.vector: record for record in before.inputs}
    days = [spec.get("template_date") for spec in before.resolved.get("vectors") or []]
    found = False
    for place, now in enumerate(after.inputs):
        then, name = known.get(now.vector), f"vector `{now.vector}`"
        day = after.resolved["vectors"][place].get("template_date")
        said = None
        if place < len(days) and days[place] is None and day is not None:
            said = f"the chat template writes the date, and the folder does not say on which day it was made: now {day}"
        elif then is None:
            continue
        elif then.file != now.file:
            said = "its file is not the one that it was made of"
        elif then.pairs != now.pairs:
            said = f"its {_what(after, place)} are not those that it was made of"
            if after.resolved["vectors"][place].get("method") == "persona":
                said = "the model wrote other responses"
        elif then.images != now.images:
            said = "its images are not those that it was made of"
        elif then.tokens != now.tokens:
            said = (
                f"the same {_what(after, place)} became other tokens: the tokenizer, its chat template or its library "
                "has changed"
            )
        if said is not None:
            found = True
            yield f"{name}: {said}"
    for name, value in after.environment.items():
        if before.environment and before.environment.get(name) != value:
            found = True
            yield f"{name}: {before.environment.get(name)} when the folder was made, {value} now"
    if known and not found:
        yield "pairs, tokens and versions are the same: the machine computes otherwise, or the folder has been changed"


def _what(patch: Patch, place: int) -> str:
    return "pairs" if patch.resolved["vectors"][place].get("positives") is None else "texts"


def _content(path: Path) -> str | None:
    """Of a file, or of the files in a folder."""
    if not path.is_dir():
        return sha256_of(path)
    return _hash([[file.name, sha256_of(file)] for file in sorted(path.iterdir()) if file.is_file()])


def _plain(prompt: Any) -> Any:
    return prompt if prompt is None or isinstance(prompt, str) else [[turn.role, turn.content] for turn in prompt]


def _hash(content: list[Any]) -> str | None:
    if not content:
        return None
    return hashlib.sha256(json.dumps(content, separators=(",", ":")).encode("ascii")).hexdigest()
