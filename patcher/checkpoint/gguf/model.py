"""A model in one GGUF file or in several that llama.cpp loads together."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from patcher.checkpoint.gguf.file import read_gguf
from patcher.checkpoint.gguf.format import GgufFile, GgufTensor, Scalar, gguf_error
from patcher.errors import InputError

SPLIT_NO, SPLIT_COUNT, SPLIT_TENSORS = "split.no", "split.count", "split.tensors.count"
_TOWER = "clip"
_SPLIT_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


@dataclass(frozen=True)
class GgufModel:
    """All files of a model.

    Attributes:
        files: in their order; the metadata that counts is the first one's.
        tensors: of all files, by name.
        architecture: llama.cpp's name of it.
    """

    files: tuple[GgufFile, ...]
    tensors: Mapping[str, GgufTensor]
    architecture: str

    @property
    def first(self) -> GgufFile:
        return self.files[0]

    def scalar(self, key: str) -> Scalar | None:
        """The value of the architecture's entry ``key``, such as ``block_count``; None where there is none."""
        return self.first.scalar(f"{self.architecture}.{key}")

    def number(self, key: str) -> int:
        """The same, where it must be a whole number above zero.

        Raises:
            InputError: it is not.
        """
        value = self.scalar(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            message = "a metadata entry that every model has is missing, or is no number"
            raise gguf_error(message, self.first.path, f"{self.architecture}.{key}", value)
        return value


def read_model(path: Path) -> GgufModel:
    """The headers of a model's files; ``path`` is the only one or the first.

    Raises:
        InputError: a file is missing or broken, they do not belong together, or this is no model.
    """
    first = read_gguf(path)
    files = (first, *_others(first))
    tensors: dict[str, GgufTensor] = {}
    for file in files:
        for name, tensor in file.tensors.items():
            if name in tensors:
                raise _apart("a tensor is in two files of this model", file, name, tensors[name].file.name)
            tensors[name] = tensor
    counted = first.scalar(SPLIT_TENSORS)
    if len(files) > 1 and counted != len(tensors):
        found = f"{counted}, has {len(tensors)}"
        raise _apart("the files of this model do not belong together", first, SPLIT_TENSORS, found)
    architecture = first.scalar("general.architecture")
    if not isinstance(architecture, str) or not architecture:
        raise gguf_error("the file does not say its architecture", path, "general.architecture")
    if architecture == _TOWER:
        raise InputError(
            "this GGUF file holds the tower of a multimodal model (mmproj), and no text decoder",
            where=str(path),
            found=f"general.architecture: {architecture}",
            remedy="give the GGUF file of the text model, which is published beside it",
            code="gguf_architecture",
        )
    return GgufModel(files, tensors, architecture)


def split_name(path: Path, number: int, count: int) -> Path:
    """Where part ``number`` (from 0) of the model named ``path`` lies; ``path`` may name one of its parts itself."""
    match = _SPLIT_NAME.fullmatch(path.name)
    stem = match.group(1) if match else path.name.removesuffix(".gguf")
    return path.with_name(f"{stem}-{number + 1:05d}-of-{count:05d}.gguf")


def split_parts(path: Path) -> list[Path]:
    """All files of the split model that ``path`` names a part of; none if its name is not such a one."""
    match = _SPLIT_NAME.fullmatch(path.name)
    count = int(match.group(3)) if match else 0
    return [split_name(path, number, count) for number in range(count)]


def _others(first: GgufFile) -> list[GgufFile]:
    count = first.scalar(SPLIT_COUNT)
    if not isinstance(count, int) or count < 2:
        return []
    match = _SPLIT_NAME.fullmatch(first.path.name)
    if match is None or int(match.group(3)) != count:
        found = f"{first.path.name}, {SPLIT_COUNT} {count}"
        raise _apart("the name of a file of a split model does not fit its content", first, None, found)
    if first.scalar(SPLIT_NO) != 0:
        found, remedy = f"{SPLIT_NO} {first.scalar(SPLIT_NO)}", f"give {split_name(first.path, 0, count).name}"
        raise gguf_error("this is not the first file of a split model", first.path, found=found, remedy=remedy)
    others = []
    for number in range(1, count):
        other = read_gguf(split_name(first.path, number, count))
        if other.scalar(SPLIT_NO) != number:
            message = "a file of a split model is not the one it is named"
            raise _apart(message, other, SPLIT_NO, str(other.scalar(SPLIT_NO)))
        others.append(other)
    return others


def _apart(what: str, file: GgufFile, where: str | None, found: str) -> InputError:
    return gguf_error(
        what, file.path, where, found, remedy="download the files of the model again, with their own names"
    )
