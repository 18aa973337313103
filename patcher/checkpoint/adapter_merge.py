"""What PEFT does with an adapter: its names, its config and its merge, in memory."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from patcher.architectures.model_class import auto_class_of, quiet_transformers
from patcher.checkpoint.adapter_embeddings import Embeddings, TiedEnds, require_filled
from patcher.checkpoint.adapter_folder import BY_HAND, CONFIG, PREFIX, WEIGHTS, AdapterFolder, refusal
from patcher.checkpoint.folder import CheckpointFolder
from patcher.checkpoint.safetensors_file import DTYPES, FLOATS, read_tensor
from patcher.checkpoint.safetensors_writer import write_tensors
from patcher.errors import InputError
from patcher.errors.causes import cause_of

_ITS_BASE = "use the base that the adapter was trained on"
_MISMATCH = re.compile(r"size mismatch for (\S+): .*?Size\((\[[\d, ]*\])\).*?Size\((\[[\d, ]*\])\)", re.DOTALL)


def unknown_keys(adapter: AdapterFolder) -> list[str]:
    """A note on keys of the config that this PEFT leaves out of account, as an older one does with a newer's.

    Raises:
        InputError: it does not know this type of adapter.
    """
    import peft

    known = peft.PEFT_TYPE_TO_CONFIG_MAPPING.get(adapter.config["peft_type"])
    if known is None or adapter.config["peft_type"] not in peft.PEFT_TYPE_TO_TUNER_MAPPING:
        raise refusal(
            f"the adapter does not fit PEFT {peft.__version__}, which does not know its type",
            adapter.folder,
            found=f"peft_type: {adapter.config['peft_type']}",
        )
    fields = {key.name for key in dataclasses.fields(known)}
    unknown = [f"{key}: {value}" for key, value in adapter.config.items() if key not in fields and value]
    named = ", ".join(unknown)[:200]
    said = f"PEFT {peft.__version__} does not know these keys of the adapter's config, and they have no effect: {named}"
    return [said] if unknown else []


def load_base(base: CheckpointFolder, trust_remote_code: bool) -> Any:
    import transformers

    # Not by config.json: a float32 file under `dtype: bfloat16` would be rounded before the merge.
    stored = {info.dtype for info in base.tensors.values() if info.dtype in FLOATS and len(info.shape) > 1}
    dtype = DTYPES[stored.pop()] if len(stored) == 1 else torch.float32
    message = "the base model cannot be loaded, so no adapter can be merged into it"
    with _errors_in_words(message, base.path, "check that AutoModelForCausalLM.from_pretrained loads it"):
        config = transformers.AutoConfig.from_pretrained(
            base.path, trust_remote_code=trust_remote_code, local_files_only=True
        )
    auto = auto_class_of(config)
    with _errors_in_words(message, base.path, f"check that {auto}.from_pretrained loads it"):
        return getattr(transformers, auto).from_pretrained(
            base.path, dtype=dtype, trust_remote_code=trust_remote_code, local_files_only=True
        )


def merged_tensors(model: Any, adapter: AdapterFolder, embeddings: Embeddings, rows: int) -> dict[str, torch.Tensor]:
    """The model's tensors after the merge; the layers that were touched are in fp32.

    Args:
        model: the base in memory, with ``rows`` embeddings; it is changed.
        embeddings: of the base, before it was resized.

    Raises:
        InputError: the adapter does not fit, or PEFT cannot merge it.
    """
    with _plainly_named(adapter) as folder:
        return _merge(model, adapter, str(folder), embeddings, rows)


def _merge(
    model: Any, adapter: AdapterFolder, folder: str, embeddings: Embeddings, rows: int
) -> dict[str, torch.Tensor]:
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    with (
        _errors_in_words("the adapter does not fit this base model", adapter.folder, _ITS_BASE),
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always")
        mapping = getattr(model, "_checkpoint_conversion_mapping", None)
        tuned: Any = PeftModel.from_pretrained(model, folder, torch_device="cpu")
        # Only this call says which tensors of the file found no place; the first one drops them silently.
        unused = tuned.load_adapter(
            folder, tuned.active_adapter, torch_device="cpu", key_mapping=mapping
        ).unexpected_keys
        for module in tuned.modules():
            if isinstance(module, BaseTunerLayer):
                module.float()
        ends = TiedEnds.of(tuned.get_base_model(), adapter, embeddings, rows)
    unused = [name for name in unused if not _is_second_copy(name.removeprefix(PREFIX), adapter, embeddings)]
    missing = [str(item.message) for item in caught if "missing adapter keys" in str(item.message)]
    if missing and not unused:
        message = "the adapter file lacks tensors that its config names"
        raise refusal(message, adapter.folder, found=missing[0][:200], remedy="save the adapter again")
    if unused:
        message = "the adapter file holds tensors for which this base model has no layer"
        raise refusal(message, adapter.folder, found=f"{len(unused)}, the first is {unused[0]}", remedy=_ITS_BASE)
    message = "the adapter does not fit this base model: PEFT cannot merge the one into the other"
    remedy = "use an adapter that PEFT's `merge_and_unload` merges"
    factors = [info for name, info in adapter.tensors.items() if "lora_B.weight" in name]
    if adapter.config.get("lora_bias") and not any(read_tensor(info).any() for info in factors):
        remedy = f"it only adds a constant: give it as a vector, `method: file` with `file: {adapter.folder}`"
    with _errors_in_words(message, adapter.folder, remedy):
        head = tuned.get_base_model().get_output_embeddings()
        if ends is not None and adapter.config.get("ensure_weight_tying") and isinstance(head, BaseTunerLayer):
            # Into one matrix, PEFT would merge the same change twice.
            layer = head.get_base_layer()
            layer.weight = torch.nn.Parameter(layer.weight.detach().clone())
        merged: Any = tuned.merge_and_unload(safe_merge=True)
    state = dict(merged.state_dict())
    require_filled(state, embeddings, rows, adapter)
    if ends is not None and not ends.same(merged):
        # PEFT merges such a change into both ends, though it trained one of them.
        raise tied_refusal(*embeddings.ends)
    return state


def _is_second_copy(name: str, adapter: AdapterFolder, embeddings: Embeddings) -> bool:
    """Whether the file holds the same under the module's own name, or for tied embeddings, which is what is loaded."""
    own = name.replace(".modules_to_save.", ".")
    if embeddings.tied:
        own = own.replace(f"{embeddings.outputs}.token_adapter.", f"{embeddings.inputs}.token_adapter.")
    info, other = adapter.tensors.get(name), adapter.tensors.get(own)
    return (
        info is not None
        and other is not None
        and other.name != info.name
        and (info.dtype, info.shape) == (other.dtype, other.shape)
        and digest_of(read_tensor(info)) == digest_of(read_tensor(other))
    )


def tied_refusal(parameter: str, other: str) -> InputError:
    message = f"the adapter changes `{parameter}`, which this model ties to `{other}`"
    return refusal(message, remedy=BY_HAND + ", untied (`tie_word_embeddings: false`)")


@contextmanager
def _errors_in_words(message: str, folder: object, remedy: str) -> Iterator[None]:
    """Say what transformers or PEFT refuses: damaged files and configs from elsewhere surface as errors of any type."""
    try:
        with quiet_transformers():
            yield
    except MemoryError:
        raise
    except Exception as error:
        raise refusal(message, folder, found=_cause(error), remedy=remedy) from None


def _cause(error: Exception) -> str:
    """Which sizes do not fit, where that is it; PEFT names them behind its first line."""
    wrong = _MISMATCH.findall(str(error))
    if not wrong:
        return f"no tensor {error}" if isinstance(error, KeyError) and "." in str(error) else cause_of(error)
    name, held, taken = wrong[0]
    more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
    return f"`{name}` is {held} in the adapter and {taken} for this base{more}"


@contextmanager
def _plainly_named(adapter: AdapterFolder) -> Iterator[Path]:
    """A folder that PEFT reads the adapter from: its own, or one whose tensors have the names that PEFT gives."""
    names = {info.name: PREFIX + name for name, info in adapter.tensors.items()}
    if all(name == plain for name, plain in names.items()):
        yield adapter.folder
        return
    with tempfile.TemporaryDirectory(prefix="patch-model-adapter-") as place:
        tensors = {names[info.name]: read_tensor(info).reshape(info.shape) for info in adapter.tensors.values()}
        write_tensors(Path(place) / WEIGHTS, tensors)
        shutil.copyfile(adapter.folder / CONFIG, Path(place) / CONFIG)
        yield Path(place)


def digest_of(value: torch.Tensor) -> bytes:
    """SHA-256 of a tensor's bytes."""
    flat = value.detach().contiguous().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().data).digest()
