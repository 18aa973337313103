"""A PEFT adapter, merged into a copy of its base before anything else happens."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from patcher.checkpoint.folder import CheckpointFolder
from patcher.checkpoint.names import stored_name
from patcher.checkpoint.safetensors_file import DTYPES, FLOATS, TensorInfo, read_header, read_tensor
from patcher.checkpoint.writer import write_copy
from patcher.errors import InputError, first_line

_BY_HAND = "merge it with PEFT, save the merged model, and use that as `model` without `adapter`"
_ITS_BASE = "use the base that the adapter was trained on"


def merge_adapter(
    base: CheckpointFolder, adapter: Path, target: Path, *, trust_remote_code: bool = False
) -> CheckpointFolder:
    """Write a copy of ``base`` with the adapter merged into its weights.

    The layers that the adapter touches are merged in fp32 and rounded once to the stored dtype; all other bytes
    are copied. Tensor names, dtypes and shapes stay.

    Args:
        base: a safetensors checkpoint.
        adapter: a folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
        target: an empty folder for the copy.

    Raises:
        InputError: not an adapter, not for this base, without effect, or touching what the base does not store.
    """
    require_adapter(adapter)
    model = _load_base(base, trust_remote_code)
    prefix = str(getattr(model, "base_model_prefix", ""))
    before = {name: _Held.of(value) for name, value in model.state_dict().items()}
    merged = _merge(model, adapter)
    replaced: dict[str, torch.Tensor] = {}
    for parameter, value in merged.items():
        held = before.get(parameter)
        if held is not None and held.digest == _digest(value.to(held.dtype)):
            continue
        info = _place(base, parameter, prefix, before, value)
        replaced[info.name] = value.detach().to(DTYPES[info.dtype])
    if not replaced:
        raise _refusal(
            "merging the adapter changes nothing in the base",
            adapter,
            remedy="check that the adapter was trained for this model and is not empty",
        )
    target.mkdir(parents=True, exist_ok=True)
    write_copy(base, target, created={}, replaced=replaced, config_changes={}, remote_code=trust_remote_code)
    return CheckpointFolder(target)


@dataclass(frozen=True)
class _Held:
    """A parameter as the base had it in memory, without keeping it."""

    dtype: torch.dtype
    digest: bytes
    storage: int

    @classmethod
    def of(cls, value: torch.Tensor) -> _Held:
        return cls(value.dtype, _digest(value), value.data_ptr())


def _digest(value: torch.Tensor) -> bytes:
    flat = value.detach().contiguous().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().data).digest()


def _place(
    base: CheckpointFolder, parameter: str, prefix: str, before: Mapping[str, _Held], value: torch.Tensor
) -> TensorInfo:
    """Where the copy stores a parameter that the adapter changed.

    Raises:
        InputError: nowhere, or not there alone; left out of the copy, the change would be lost without a word.
    """
    held = before.get(parameter)
    if held is None:
        raise _refusal(f"the adapter adds a tensor that the base does not have: `{parameter}`")
    tied = [name for name, other in before.items() if name != parameter and other.storage == held.storage]
    if tied and held.storage:
        # PEFT merges such a change into both ends, though it trained one of them.
        message = f"the adapter changes `{parameter}`, which this model ties to `{tied[0]}`"
        raise _refusal(message, remedy=_BY_HAND + ", untied (`tie_word_embeddings: false`)")
    name = stored_name(parameter, base.tensors, prefix)
    if name is None:
        raise _refusal(f"the adapter changes `{parameter}`, for which the base checkpoint has no place")
    info = base.tensors[name]
    exact = info.dtype in FLOATS and held.dtype in (DTYPES[info.dtype], torch.float32)
    if (
        not exact
        or tuple(value.shape) != info.shape
        or held.digest != _digest(read_tensor(info).reshape(info.shape).to(held.dtype))
    ):
        raise _refusal(
            f"the adapter changes `{parameter}`, which the base checkpoint stores in another form",
            name,
            found=f"{info.dtype} {list(info.shape)} on disk, {held.dtype} {list(value.shape)} in the model",
        )
    return info


def require_adapter(adapter: Path) -> None:
    """Refuse a folder that is no adapter, or one that cannot be merged into weights.

    Raises:
        InputError: with what is missing.
    """
    if not (adapter / "adapter_config.json").is_file():
        raise _refusal(
            "this is not a PEFT adapter: it has no adapter_config.json",
            adapter,
            remedy="give the folder that `save_pretrained` of a PEFT model wrote",
        )
    if not (adapter / "adapter_model.safetensors").is_file():
        remedy = "save it again with safetensors; pickled adapters are not loaded"
        raise _refusal("the adapter has no adapter_model.safetensors", adapter, remedy=remedy)
    try:
        kind = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8")).get("peft_type")
    except (OSError, ValueError, RecursionError, AttributeError) as error:
        raise _refusal("adapter_config.json cannot be read", adapter, found=error, remedy=None) from None
    if kind in ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "MULTITASK_PROMPT_TUNING"):
        message = f"an adapter of type {kind} cannot be merged into weights"
        raise _refusal(message, adapter, remedy="use an adapter that changes weights, such as LoRA")
    read_header(adapter / "adapter_model.safetensors")


def _load_base(base: CheckpointFolder, trust_remote_code: bool) -> Any:
    from transformers import AutoModelForCausalLM

    # Not by config.json: a float32 file under `dtype: bfloat16` would be rounded before the merge.
    stored = {info.dtype for info in base.tensors.values() if info.dtype in FLOATS and len(info.shape) > 1}
    dtype = DTYPES[stored.pop()] if len(stored) == 1 else torch.float32
    message = "the base model cannot be loaded, so no adapter can be merged into it"
    with _errors_in_words(message, base.path, "check that AutoModelForCausalLM.from_pretrained loads it"):
        return AutoModelForCausalLM.from_pretrained(
            base.path, dtype=dtype, trust_remote_code=trust_remote_code, local_files_only=True
        )


def _merge(model: Any, adapter: Path) -> dict[str, torch.Tensor]:
    """The model's tensors after the merge; the layers that were touched are in fp32."""
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    with (
        _errors_in_words("the adapter does not fit this base model", adapter, _ITS_BASE),
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always")
        mapping = getattr(model, "_checkpoint_conversion_mapping", None)
        tuned: Any = PeftModel.from_pretrained(model, str(adapter), torch_device="cpu")
        # Only this call says which tensors of the file found no place; the first one drops them silently.
        unused = tuned.load_adapter(
            str(adapter), tuned.active_adapter, torch_device="cpu", key_mapping=mapping
        ).unexpected_keys
        for module in tuned.modules():
            if isinstance(module, BaseTunerLayer):
                module.float()
        merged: Any = tuned.merge_and_unload(safe_merge=True)
    missing = [str(item.message) for item in caught if "missing adapter keys" in str(item.message)]
    if missing:
        message = "the adapter file lacks tensors that its config names"
        raise _refusal(message, adapter, found=missing[0][:200], remedy="save the adapter again")
    if unused:
        message = "the adapter file holds tensors for which this base model has no layer"
        raise _refusal(message, adapter, found=f"{len(unused)}, the first is {unused[0]}", remedy=_ITS_BASE)
    return dict(merged.state_dict())


@contextmanager
def _errors_in_words(message: str, folder: Path, remedy: str) -> Iterator[None]:
    """Say what transformers or PEFT refuses: damaged files and configs from elsewhere surface as errors of any type."""
    from patcher.architectures.model_class import quiet_transformers

    try:
        with quiet_transformers():
            yield
    except MemoryError:
        raise
    except Exception as error:
        raise _refusal(message, folder, found=first_line(error), remedy=remedy) from None


def _refusal(message: str, place: object = None, *, found: object = None, remedy: str | None = _BY_HAND) -> InputError:
    where = "adapter" if place is None else f"adapter: {place}"
    return InputError(message, where=where, found=found, remedy=remedy)
