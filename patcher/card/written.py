"""What the model card has to find out of a manifest: which tensors came, went and moved, and what is to be cited."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from patcher.card.markdown import code
from patcher.checkpoint.folder import PROCESSOR_FILES
from patcher.patched.route import RecordedRoute
from patcher.patched.schema import Patch


@dataclass(frozen=True)
class OtherTensors:
    """Tensors of a copy that hold no vector.

    Attributes:
        inside: how many lie in inserted blocks; ``zeros_inside`` of them are zeros.
        zeros: how many tensors of zeros lie elsewhere.
        zeros_named: whether any of those is named in the manifest.
        derived: how many elsewhere are made of the base's.
        ways: of those that are made in the same way: the first one's name, what it holds, and how many there are.
        replaced: tensors of the base that others were made of, and that are not in the copy.
        left_out: tensors of the base that are not in the copy for another reason.
    """

    inside: int
    zeros_inside: int
    zeros: int
    zeros_named: bool
    derived: int
    ways: list[tuple[str, str, int]]
    replaced: list[str]
    left_out: list[str]


def other_tensors(route: RecordedRoute) -> OtherTensors:
    prefixes = _inserted_prefixes(route)
    names, count = (route.zeros.names, route.zeros.count or 0) if route.zeros else ([], 0)
    zeros_inside = sum(name.startswith(prefixes) for name in names)
    derived = {name: holds for name, holds in route.derived.items() if not name.startswith(prefixes)}
    ways: dict[str, list[tuple[str, str]]] = {}
    for name, holds in derived.items():
        ways.setdefault(re.sub(r"`[^`]*`", "", holds), []).append((name, holds))
    sources = " ".join(route.derived.values())
    replaced = [name for name in route.dropped if f"`{name}`" in sources]
    return OtherTensors(
        inside=zeros_inside + len(route.derived) - len(derived),
        zeros_inside=zeros_inside,
        zeros=count - zeros_inside,
        zeros_named=zeros_inside < len(names),
        derived=len(derived),
        ways=[(*group[0], len(group)) for group in ways.values()],
        replaced=replaced,
        left_out=[name for name in route.dropped if name not in replaced],
    )


def _inserted_prefixes(route: RecordedRoute) -> tuple[str, ...]:
    """How the names of the inserted blocks' tensors begin in the files."""
    blocks, found = route.inserted_blocks, set()
    for tensor in route.tensors:
        front, middle, _ = tensor.name.partition(f".{blocks.get(tensor.layer)}.")
        if middle:
            found |= {f"{front}.{block}." for block in route.new_blocks}
    return tuple(found)


def loading_lines(patch: Patch, place: str) -> list[str]:
    """Python that loads the whole copy.

    Args:
        patch: with the list of the base's files, which is not published of a local base.
        place: a folder, or a repository's name.
    """
    loader, code = patch.route.loader, ", trust_remote_code=True" if patch.remote_code else ""
    names = {file.name for file in patch.base.files or []}
    reader = "AutoProcessor" if names & {*PROCESSOR_FILES} else "AutoTokenizer"
    lines = [
        f"from transformers import {f'{loader}, {reader}' if patch.route.wraps else loader}",
        f'model = {loader}.from_pretrained("{place}"{code})',
    ]
    if patch.route.wraps:
        name = reader.removeprefix("Auto").lower()
        lines.append(f'{name} = {reader}.from_pretrained("{place}"{code})')
    return lines


def base_class(route: RecordedRoute) -> str:
    """The class of the base, of a route that writes ``config.json`` anew."""
    named = route.config_before.get("architectures")
    if isinstance(named, list) and named:
        return f"`{named[0]}`"
    return f"the model type `{route.config_before.get('model_type')}`"


def is_broadcast(patch: Patch) -> bool:
    """Whether a vector is ActAdd's, which adds the differences of one aligned pair at the positions of the prompt."""
    return any(_is_single_pair(vector) and vector.get("align", "auto") != "none" for vector in _vectors(patch))


def cited(patch: Patch) -> list[str]:
    """The papers whose methods made the vectors, each once."""
    found = []
    for vector in _vectors(patch) or [edit.as_json() for edit in patch.edits]:
        method = "lists" if vector.get("positives") is not None else vector.get("method", "mean_difference")
        found.append("actadd" if method == "mean_difference" and _is_single_pair(vector) else str(method))
    return list(dict.fromkeys(found))


def said_of_templates(patch: Patch) -> list[str]:
    """With which switches and on which day prompts went through the chat template, a line a vector."""
    said = []
    for vector in _vectors(patch):
        switches, day = vector.get("chat_template_kwargs"), vector.get("template_date")
        words = [code(json.dumps(switches, ensure_ascii=False))] if switches else []
        words += [f"{code(day)} as the date"] if day else []
        if words:
            name = code(vector.get("name", "steering"))
            said.append(f"Prompts of {name} went through the chat template with {' and '.join(words)}")
    return said


def _vectors(patch: Patch) -> list[Mapping[str, Any]]:
    """The vectors as the recipe describes them; a recipe is kept as it came."""
    found = patch.resolved.get("vectors")
    return [vector for vector in found if isinstance(vector, Mapping)] if isinstance(found, list) else []


def _is_single_pair(vector: Mapping[str, Any]) -> bool:
    """Whether this is ActAdd's case: the difference of one pair of whole texts."""
    pairs = vector.get("pairs")
    if not isinstance(pairs, list) or len(pairs) != 1 or not isinstance(pairs[0], Mapping):
        return False
    return vector.get("method", "mean_difference") == "mean_difference" and not pairs[0].get("prompt")
