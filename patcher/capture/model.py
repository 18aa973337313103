"""The base model in memory, for capture and evaluation."""

from __future__ import annotations

import contextlib
import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from patcher.architectures.model_class import CAUSAL_LM, auto_class_of, on_meta, quiet_transformers
from patcher.architectures.quantised import quantisation_of
from patcher.architectures.towers import can_stay_on_meta, left_on_meta, places_without, towers_of
from patcher.capture.memory import FOR_WEIGHTS, available_memory
from patcher.checkpoint.folder import PROCESSOR_FILES
from patcher.disk.json_files import read_json_object
from patcher.errors import InputError, no_memory
from patcher.errors.causes import cause_of

_MEND = "correct the files, or download them again"
_SENTENCEPIECE = 'pip install "patch-model[sentencepiece]"'


def pick_device(device: str) -> str:
    """``auto`` becomes the first accelerator that is there, else the CPU.

    Raises:
        InputError: the named device is not there.
    """
    if device == "auto":
        return "auto" if torch.cuda.is_available() else ("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            "this device cannot be used",
            where=f"device: {device}",
            found=cause_of(error),
            remedy="device: auto",
        ) from None
    return device


def pick_dtype(dtype: str, parameter_count: int, stored: torch.dtype, device: str) -> torch.dtype:
    """The capture's dtype: as asked, or fp32 if the model then fits in half of the free memory of a CPU."""
    if dtype != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]
    fits = device == "cpu" and parameter_count * 4 <= available_memory() // 2
    return torch.float32 if fits else stored


def load_causal_lm(
    folder: Path,
    *,
    dtype: torch.dtype,
    device: str = "cpu",
    offload: Path | None = None,
    trust_remote_code: bool = False,
    towers: bool = False,
) -> tuple[nn.Module, Any]:
    """The model (in eval mode) and its tokenizer (None where the folder has none).

    Of a multimodal wrapper it is the whole class. What no text passes through stays on meta, without weights, where
    one device holds the rest.

    Args:
        device: ``auto`` spreads the model over all devices (accelerate).
        offload: with ``auto``, a folder for what does not fit in memory either and does not lie on the disk as it is.
        towers: load a wrapper's towers as well, for prompts with images.

    Raises:
        InputError: the folder's model or tokenizer cannot be loaded.
        OutsideError: not enough memory.
    """
    import transformers

    quantisation = quantisation_of(read_json_object(folder / "config.json"))
    options: dict[str, Any] = {"device_map": device}
    if offload is not None:
        kept = int(FOR_WEIGHTS * available_memory())
        sizes: dict[int | str, int] = dict(enumerate(free_on_accelerators()))
        free = {index: int(FOR_WEIGHTS * size) for index, size in sizes.items()}
        options |= {"offload_folder": offload / "offload", "max_memory": {**free, "cpu": kept}}
    auto = CAUSAL_LM
    try:
        if quantisation is not None and device == "cpu" and quantisation.dequantise not in (None, "method"):
            # The kernels of these formats are for accelerators. Some configs ask for their package when they are made.
            options["quantization_config"] = getattr(transformers, str(quantisation.dequantise))(dequantize=True)
        # GPTQModel prints what it does, and stdout is for results.
        with quiet_transformers(), contextlib.redirect_stdout(sys.stderr), contextlib.ExitStack() as stack:
            config = transformers.AutoConfig.from_pretrained(
                folder, trust_remote_code=trust_remote_code, local_files_only=True
            )
            auto = auto_class_of(config)
            if auto != CAUSAL_LM and quantisation is None and device != "auto" and not towers and can_stay_on_meta():
                empty = on_meta(config, trust_remote_code=trust_remote_code)
                options["device_map"] = places_without(empty, towers_of(empty), device)
                stack.enter_context(left_on_meta())
            loader = getattr(transformers, auto)
            model: Any = loader.from_pretrained(
                folder, dtype=dtype, trust_remote_code=trust_remote_code, local_files_only=True, **options
            ).eval()
    except (torch.OutOfMemoryError, MemoryError) as error:
        remedy = "dtype: bfloat16, or a machine with more memory"
        raise no_memory("the model does not fit in memory", str(folder), error, remedy) from None
    except ImportError as error:
        remedy = f"pip install {' '.join(quantisation.packages)}" if quantisation else "install it and try again"
        message = "the model needs a package that is not installed"
        raise _unloadable(message, folder, error, remedy, code="missing_extra") from None
    except Exception as error:
        # Damaged files surface as errors of any type.
        remedy = f"stock {auto}.from_pretrained fails on it in the same way; {_MEND}"
        raise _unloadable("the model cannot be loaded", folder, error, remedy) from None
    if quantisation is not None and dtype == torch.float32:
        # What such a checkpoint keeps in half precision stays so, whatever dtype is asked for.
        for parameter in model.parameters():
            if parameter.dtype in (torch.bfloat16, torch.float16):
                parameter.data = parameter.data.float()
    return model, load_tokenizer(folder, trust_remote_code=trust_remote_code)


def free_on_accelerators() -> list[int]:
    """Bytes that are free on each CUDA device."""
    return [torch.cuda.mem_get_info(index)[0] for index in range(torch.cuda.device_count())]


def has_tokenizer(folder: Path) -> bool:
    """Whether the folder holds the files of a tokenizer."""
    marks = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "spiece.model", "vocab.txt")
    return any((folder / name).exists() for name in marks)


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The folder's tokenizer, or None where it has none; without a chat template, it has that of the processor.

    Raises:
        InputError: it is there and cannot be loaded.
    """
    from transformers import AutoTokenizer

    if not has_tokenizer(folder):
        return None
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(
                folder, trust_remote_code=trust_remote_code, local_files_only=True
            )
    except ImportError as error:
        message = "the tokenizer needs a package that is not installed"
        pieces = re.search("sentencepiece|protobuf", str(error), re.IGNORECASE)
        raise _unloadable(message, folder, error, _SENTENCEPIECE if pieces else "install it and try again") from None
    except MemoryError:
        raise
    except Exception as error:
        # The library behind fast tokenizers raises bare Exceptions.
        remedy = f"stock AutoTokenizer.from_pretrained fails on it in the same way; {_MEND}"
        if "sentencepiece" in str(error) and importlib.util.find_spec("sentencepiece") is None:
            remedy = _SENTENCEPIECE
        raise _unloadable("the tokenizer cannot be loaded", folder, error, remedy) from None
    return _with_template(tokenizer, folder)


def _with_template(tokenizer: Any, folder: Path) -> Any:
    """With the chat template of the processor beside it, where it has none; ``template_file`` then says which."""
    if getattr(tokenizer, "chat_template", None) or not any((folder / name).is_file() for name in PROCESSOR_FILES):
        return tokenizer
    for name in ("chat_template.json", PROCESSOR_FILES[0]):
        held = read_json_object(folder / name).get("chat_template") if (folder / name).is_file() else None
        if isinstance(held, list):
            held = {entry.get("name"): entry.get("template") for entry in held if isinstance(entry, dict)}
        if isinstance(held, dict):
            held = held.get("default")
        if isinstance(held, str) and held:
            tokenizer.chat_template, tokenizer.template_file = held, name
            break
    return tokenizer


def require_tokenizer(tokenizer: Any, needed_for: str, where: str, otherwise: str = "") -> Any:
    """The tokenizer, where there is one.

    Raises:
        InputError: there is none, and ``needed_for`` says what it is needed for.
    """
    if tokenizer is None:
        message = f"the model folder has no tokenizer, and {needed_for}"
        remedy = f"put the tokenizer's files into the model folder{otherwise}"
        raise InputError(message, where=where, remedy=remedy)
    return tokenizer


def _unloadable(message: str, folder: Path, error: Exception, remedy: str, code: str | None = None) -> InputError:
    return InputError(message, where=str(folder), found=cause_of(error), remedy=remedy, code=code)
