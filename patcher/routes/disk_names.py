"""What a class's parameter is called in a given checkpoint, and whether it can be added to there.

The class's own name is not always the stored one. Checkpoints of the bare model leave its prefix out. A few classes are
stored under the names of their first release. A tied tensor is stored under another's name.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from patcher.architectures.analysis import Architecture
from patcher.checkpoint.folder import CheckpointFolder
from patcher.checkpoint.names import name_for_new, spellings, stored_name
from patcher.checkpoint.safetensors_file import FLOATS, TensorInfo
from patcher.errors import InputError
from patcher.routes.plan import NotApplicable


def stored_tensors(checkpoint: CheckpointFolder | None) -> Mapping[str, TensorInfo] | None:
    """What the checkpoint stores; None where a plan goes by the class's names: without one, or with pickled files."""
    return None if checkpoint is None or checkpoint.is_bin else checkpoint.tensors


def existing_name(parameter: str, architecture: Architecture, stored: Collection[str]) -> str | None:
    """The key under which ``parameter`` is stored, or None."""
    spellings = (parameter, architecture.saved_names([parameter])[parameter])
    found = (stored_name(spelling, stored, architecture.base_prefix) for spelling in spellings)
    return next((name for name in found if name is not None), None)


def place_to_add(
    parameter: str, shape: tuple[int, ...], architecture: Architecture, stored: Mapping[str, TensorInfo] | None
) -> tuple[str, str]:
    """The key and the dtype of a parameter that is added to; without a checkpoint, the class's own name and F32.

    Raises:
        NotApplicable: it is not stored, or not as floating-point numbers of this shape.
    """
    if stored is None:
        return architecture.saved_names([parameter])[parameter], "F32"
    name = existing_name(parameter, architecture, stored)
    if name is None:
        raise NotApplicable(f"the checkpoint does not store `{parameter}`")
    return name, dtype_to_add_to(stored[name], shape)


def dtype_to_add_to(info: TensorInfo, shape: tuple[int, ...]) -> str:
    """The dtype of a stored tensor that is added to.

    Raises:
        NotApplicable: it has another shape, or no floating-point numbers.
    """
    if info.dtype not in FLOATS or info.shape != shape:
        raise NotApplicable(f"`{info.name}` is stored as {info.dtype} {list(info.shape)}")
    return info.dtype


def new_names(
    parameters: Iterable[str], architecture: Architecture, stored: Collection[str] | None
) -> Mapping[str, tuple[str, str | None]]:
    """For each parameter that the checkpoint lacks: its key in the style of its neighbours, and one of those.

    Without a checkpoint, the key under which the class is saved, and None.

    Raises:
        InputError: the checkpoint names its tensors in a way that gives no place for one of them.
    """
    saved = architecture.saved_names(parameters)
    if stored is None:
        return {parameter: (name, None) for parameter, name in saved.items()}
    return {name: _new_name(name, spelling, architecture, stored) for name, spelling in saved.items()}


def _new_name(
    parameter: str, spelling: str, architecture: Architecture, stored: Collection[str]
) -> tuple[str, str | None]:
    prefix = architecture.base_prefix
    tied_to = architecture.aliases.get(parameter.rpartition(".")[0] + ".weight")
    if tied_to is not None:
        # An output head that is the embedding: only its bias is stored under its own name.
        return spelling, existing_name(tied_to, architecture, stored)
    try:
        return name_for_new(parameter, stored, prefix)
    except InputError:
        if spelling == parameter:
            if (found := _beside_fused(parameter, architecture, stored)) is not None:
                return found
            raise
    return name_for_new(spelling, stored, prefix)


def _beside_fused(parameter: str, architecture: Architecture, stored: Collection[str]) -> tuple[str, str] | None:
    """The class's own name for a bias whose weight it stores as a part of another (HRM's ``gate_up_proj``)."""
    module = parameter.rpartition(".")[0]
    beside = architecture.saved_beside(module)
    if f"{module}.weight" in beside:
        return None
    found = next((name for name in beside if stored_name(name, stored, architecture.base_prefix)), None)
    if found is None:
        return None
    name = stored_name(found, stored, architecture.base_prefix) or found
    own = dict(zip(*(spellings(each, architecture.base_prefix) for each in (found, parameter)), strict=True))
    return own[name], name
