"""``steering.json`` as it is read: a file from elsewhere, whose shape is checked before anything in it is used.

Only what some module of the package relies on is named here; every other key is let through as it is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from patcher.errors import InputError

_LONGEST = 200
_MOST_BLOCKS = 1 << 20
_DEEPEST = 100


def _inside(name: str) -> str:
    """Refuse a name that leads out of the folder that it is looked for in, or that no file can have."""
    path = PurePosixPath(name)
    if not path.parts or path.is_absolute() or ".." in path.parts or "\0" in name or len(name) > _LONGEST:
        raise ValueError("not the name of a file inside of a folder")
    return name


class _Shape(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)


FileName = Annotated[str, AfterValidator(_inside)]
Layer = Annotated[int, Field(ge=-1, lt=_MOST_BLOCKS)]
LayerKey = Annotated[str, Field(pattern=r"^(-1|[0-9]{1,7})$")]
Number = Annotated[float, Field(allow_inf_nan=False)]


class _File(_Shape):
    name: FileName
    size: Annotated[int, Field(ge=0)]
    sha256: str | None


class _Adapter(_Shape):
    name: str
    given: str
    sha256: str


def _distinct(files: list[_File]) -> list[_File]:
    """Refuse a list that names a file twice: it could not be two things."""
    if len({PurePosixPath(file.name) for file in files}) < len(files):
        raise ValueError("a file is named twice")
    return files


class _Base(_Shape):
    model: str
    hub: bool | None = None
    revision: str | None = None
    path: str | None = None
    adapter: _Adapter | None = None
    files: Annotated[list[_File], AfterValidator(_distinct)] | None = None


class _Edit(_Shape):
    name: str
    layer: Layer
    tensor: str
    coefficient: Number | None = None


class _Tensor(_Shape):
    name: str
    layer: Layer
    kind: str
    factor: Number
    parameter: str | None = None
    shape: list[int] | None = None
    offset: Number | None = None
    index: Annotated[int, Field(ge=0, lt=_MOST_BLOCKS)] | None = None
    original: str | None = None


class _Zeros(_Shape):
    names: list[str] = []
    count: int | None = None


class _Fit(_Shape):
    error_mean: Number | None = None


class _Route(_Shape):
    name: str
    exact: bool
    architecture: str
    tensors: list[_Tensor]
    blocks: str | None = None
    residual: str | None = None
    zeros: _Zeros | None = None
    fit: _Fit | None = None
    derived: dict[str, Any] = {}
    renamed: dict[str, str] = {}
    copy_layers: dict[LayerKey, Layer] = {}
    config_changes: dict[str, Any] | None = None
    config_before: dict[str, Any] | None = None


class _Recipe(_Shape):
    text: str | None = None
    resolved: dict[str, Any] | None = None
    folder: str | None = None


class _Undo(_Shape):
    lost: list[str] | None = None


class _Check(_Shape):
    stack: str | None = None
    status: str | None = None
    version: str | None = None
    detail: str | None = None


class _Patch(_Shape):
    base: _Base
    edits: list[_Edit]
    route: _Route
    verification: list[_Check] | None = None
    recipe: _Recipe | None = None
    tool_version: str | None = None
    undo: _Undo | None = None


class _Manifest(_Patch):
    history: list[_Patch] | None = None


def check_manifest(manifest: Mapping[str, Any], path: Path) -> None:
    """Refuse a manifest that is not built as this version builds them.

    Args:
        manifest: the content of ``steering.json``, of a format that this version knows.
        path: where it was read.

    Raises:
        InputError: with the first key that is missing, or holds something else than it should.
    """
    if _is_deeper(manifest, _DEEPEST):
        raise _damaged(str(path), f"nested more than {_DEEPEST} levels deep")
    try:
        json.dumps(manifest, ensure_ascii=False, allow_nan=False).encode()
    except ValueError:
        raise _damaged(str(path), "a number or a text that cannot be written down") from None
    try:
        _Manifest.model_validate(manifest)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        raise _damaged(f"{path}: {key[:_LONGEST]}", first["msg"].removeprefix("Value error, ")) from None


def _is_deeper(value: Any, levels: int) -> bool:
    """Whether containers lie in each other more than ``levels`` deep; recursive readers of them have limits."""
    layer = [value]
    for _ in range(levels):
        layer = [
            item
            for part in layer
            for item in (part.values() if isinstance(part, dict) else part)
            if isinstance(item, (dict, list))
        ]
    return bool(layer)


def _damaged(where: str, found: str) -> InputError:
    return InputError(
        "the manifest is incomplete or damaged", where=where, found=found[:_LONGEST], remedy="build the folder again"
    )
