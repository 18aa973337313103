"""Files that hold steering vectors: safetensors, torch, GGUF and PEFT. A new format is one reader and one entry."""

from __future__ import annotations

import difflib
import pickle
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from patcher.checkpoint.bin_files import require_uncompressed
from patcher.checkpoint.gguf.file import read_bytes, read_floats, read_gguf
from patcher.checkpoint.gguf.format import F32
from patcher.checkpoint.safetensors_writer import write_tensors
from patcher.checkpoint.steering_files import ORIGINAL_PREFIX, RIGHT_PREFIX, SPREAD_PREFIX
from patcher.disk.whole_files import whole_file
from patcher.errors import InputError, MissingExtraError, OutsideError, first_line
from patcher.vectors.peft_files import is_adapter, read_adapter


@dataclass(frozen=True)
class _Contents:
    """The tensors of a file: their names, and how to read one; ``vague`` where only a person can say what they are."""

    names: list[str]
    read: Callable[[str], Tensor]
    vague: bool = False


def load_vector_file(path: Path, *, layer: int, hidden: int, tensor: str | None = None) -> Tensor:
    """Read the vector for one layer.

    The file is one of these:

    - ``.safetensors``, also the ``steering.safetensors`` of a patched folder;
    - ``.pt``, ``.pth`` or ``.bin``: a tensor, as CAA saves it, or a dict of tensors; read with ``weights_only=True``;
    - a ``.gguf`` control vector, whose ``direction.N`` is added after 0-based block N;
    - the folder of a PEFT adapter that adds a constant.

    The tensor is the one named ``tensor``, else the only one, else ``layer.N``, ``direction.N``, ``layers.N`` or ``N``
    for this layer, else the only ``NAME.layer.N``. It may be [hidden], [1, hidden], [1, 1, hidden], or
    [layers, hidden], which is indexed by layer.

    Args:
        path: the file.
        layer: 0-based block after which the vector will be added; -1 is the embedding.
        hidden: the model's hidden size.
        tensor: the name of the tensor, where the file holds several.

    Returns:
        fp32 [hidden], whatever floating dtype the file has.

    Raises:
        InputError: if the file is not there, broken, holds code, or holds no such vector.
        MissingExtraError: for ``.gguf`` without the ``gguf`` package.
    """
    adapter = is_adapter(path)
    reader = _read_peft if adapter else _READERS.get(path.suffix.lower())
    if reader is None:
        remedy = "use one of: " + ", ".join(_READERS) + ", or a PEFT adapter's folder"
        raise InputError("vectors are not read from this kind of file", where=str(path), remedy=remedy)
    if not (adapter or path.is_file()):
        remedy = "check the spelling; paths are relative to the recipe's folder"
        raise InputError("there is no such vector file", where=str(path), remedy=remedy)
    contents = reader(path)
    if contents.vague and tensor is None:
        raise InputError(
            "what a module's output gains is not in every model what the residual stream gains",
            where=str(path),
            found="an adapter of another tool: " + _listed(contents.names),
            remedy="to use it as it is, name one with `tensor:`",
        )
    name = _choose(contents.names, layer, tensor, str(path))
    where = f"{path}: {name}" if name else str(path)
    return _as_vector(contents.read(name), layer, hidden, where)


def save_vectors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors as fp32 safetensors, mode 0644; the file appears complete or not at all.

    Equal arguments give equal bytes. (The stock writer puts the keys of the metadata in another order each time.)

    Raises:
        OutsideError: if the disk fails.
    """
    plain = {name: tensor.detach().to("cpu", torch.float32).contiguous().clone() for name, tensor in tensors.items()}
    try:
        with whole_file(path) as partial:
            write_tensors(partial, plain, metadata)
    except OSError as error:
        remedy = "check the free space and the folder's permissions"
        raise OutsideError("the vectors cannot be written", where=str(path), found=error, remedy=remedy) from error


def _choose(names: list[str], layer: int, tensor: str | None, where: str) -> str:
    vectors = [name for name in names if not name.startswith((ORIGINAL_PREFIX, RIGHT_PREFIX, SPREAD_PREFIX))]
    if tensor is not None:
        if tensor in names:
            return tensor
        match = difflib.get_close_matches(tensor, vectors, n=1)
        remedy = f"did you mean `{match[0]}`?" if match else "leave `tensor` out to have it chosen by layer"
        found = _listed(vectors)
        raise InputError(f"there is no tensor `{tensor}` in this file", where=where, found=found, remedy=remedy)
    if len(vectors) == 1:
        return vectors[0]
    wanted = [f"layer.{layer}", f"direction.{layer}", f"layers.{layer}", str(layer)]
    there = [name for name in wanted if name in vectors]
    there = there or [name for name in vectors if name.endswith(f".{wanted[0]}")]
    if len(there) == 1:
        return there[0]
    if there:
        message = f"several tensors of this file may be meant for layer {layer}"
        raise InputError(message, where=where, found=_listed(there), remedy="name one with `tensor:`")
    raise InputError(
        f"there is no vector for layer {layer} in this file",
        where=where,
        found=_listed(vectors),
        remedy=f"name one with `tensor:`, or call it `{wanted[0]}`",
    )


def _as_vector(values: Tensor, layer: int, hidden: int, where: str) -> Tensor:
    shape = list(values.shape)
    if not values.is_floating_point():
        raise InputError("this is not a vector of floating-point numbers", where=where, found=str(values.dtype))
    while values.ndim > 1 and values.shape[0] == 1:
        values = values[0]
    if values.ndim not in (1, 2):
        remedy = f"a vector is [{hidden}], [1, {hidden}] or [layers, {hidden}]"
        raise InputError("this is not a vector", where=where, found=f"shape {shape}", remedy=remedy)
    if values.shape[-1] != hidden:
        raise InputError(
            f"the vector does not fit this model, whose hidden size is {hidden}",
            where=where,
            found=f"shape {shape}",
            remedy="use a vector that was made for this model",
        )
    if values.ndim == 2:
        if not 0 <= layer < len(values):
            found = f"shape {shape}: layers 0 to {len(values) - 1}"
            raise InputError(f"there is no row for layer {layer} in this tensor", where=where, found=found)
        values = values[layer]
    return values.detach().to(torch.float32).clone()


def _read_safetensors(path: Path) -> _Contents:
    def read(name: str) -> Tensor:
        with safe_open(path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor

    try:
        with safe_open(path, framework="pt") as file:
            return _Contents(sorted(file.keys()), read)
    except (SafetensorError, OSError) as error:
        raise _broken(path, "safetensors", error) from None


def _read_torch(path: Path) -> _Contents:
    try:
        require_uncompressed(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code is None:
            raise _broken(path, "torch", "not a file that torch.save wrote") from None
        raise InputError(
            "this file holds more than tensors, and reading it could run code",
            where=str(path),
            found=code[1],
            remedy="save the bare tensor, or a dict of tensors by layer, preferably as safetensors",
        ) from None
    except Exception as error:
        # Damaged files surface as RuntimeError, EOFError, KeyError, ValueError ... from inside the unpickler.
        raise _broken(path, "torch", error) from None
    if isinstance(loaded, Tensor):
        return _Contents([""], lambda name: loaded)
    if isinstance(loaded, Mapping):
        tensors = {str(key): value for key, value in loaded.items() if isinstance(value, Tensor)}
        if tensors:
            return _Contents(list(tensors), tensors.__getitem__)
    raise InputError(
        "this file holds no tensor",
        where=str(path),
        found=type(loaded).__name__,
        remedy="save a tensor, or a dict of tensors by layer",
    )


def _read_gguf(path: Path) -> _Contents:
    try:
        import gguf
    except ImportError:
        raise MissingExtraError("gguf", "gguf", "reading a GGUF control vector") from None
    # Not gguf.GGUFReader, which believes every count: a few bytes keep it busy until the memory is full.
    try:
        file = read_gguf(path)
    except InputError as error:
        raise _broken(path, "GGUF", error.problems[0].message) from None
    architecture = file.scalar("general.architecture")
    if architecture != "controlvector":
        raise InputError(
            "this GGUF file is not a control vector",
            where=str(path),
            found=f"general.architecture: {architecture}",
            remedy="use a file whose general.architecture is `controlvector`",
        )

    def read(name: str) -> Tensor:
        tensor = file.tensors[name]
        if tensor.type == F32:
            return read_floats(tensor)
        try:
            rows = read_bytes(tensor).reshape(*tensor.shape[:0:-1], tensor.row_bytes)
            values = gguf.dequantize(rows.numpy(), gguf.GGMLQuantizationType(tensor.type))
        except (NotImplementedError, ValueError) as error:
            raise _broken(path, "GGUF", error) from None
        return torch.tensor(values)

    return _Contents(list(file.tensors), read)


def _read_peft(path: Path) -> _Contents:
    tensors = read_adapter(path)
    return _Contents(list(tensors), tensors.__getitem__, vague=not all(name.startswith("layer.") for name in tensors))


def _broken(path: Path, kind: str, error: object) -> InputError:
    found = first_line(error)
    remedy = "the file may be truncated: fetch or save it again"
    return InputError(f"this cannot be read as a {kind} file", where=str(path), found=found, remedy=remedy)


def _listed(names: list[str], limit: int = 12) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return (", ".join(names[:limit]) + more) or "no tensors"


_READERS: dict[str, Callable[[Path], _Contents]] = {
    ".safetensors": _read_safetensors,
    ".pt": _read_torch,
    ".pth": _read_torch,
    ".bin": _read_torch,
    ".gguf": _read_gguf,
}
