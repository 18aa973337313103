"""Loads a folder as a stranger does, casts it to its own dtype, and changes how often it holds its vector."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch

NOT_THE_MODEL = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "auto_map")
"""Keys of a config that change no pass."""


PREPARED: dict[str, Any] = {}
"""The base in fp32 and what its loader said, by folder, where it was loaded before the job was known."""


def import_classes() -> None:
    """What every job needs; of transformers, it is what takes its time."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig  # noqa: F401


def prepare(folder: str, *, load: bool) -> None:
    """Import the class of a folder that brings no code, and load it in fp32 by one thread, without the work that waits.

    What goes wrong here goes wrong in the job as well, and is told then.
    """
    from transformers import AutoConfig

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if load:
            PREPARED[folder] = from_pretrained(folder, dtype=torch.float32)
        else:
            _ = loader_of(folder)._model_mapping[type(AutoConfig.from_pretrained(folder, local_files_only=True))]
    except Exception:
        PREPARED.pop(folder, None)
    finally:
        torch.set_num_threads(threads)


def from_pretrained(folder: str, **options: Any) -> Any:
    """The model of a folder and what the loader says of it."""
    options = {"trust_remote_code": False, **options}
    return loader_of(folder, trust_remote_code=options["trust_remote_code"]).from_pretrained(
        folder, local_files_only=True, output_loading_info=True, **options
    )


def loader_of(folder: str, *, trust_remote_code: bool = False) -> Any:
    """The stock loader of a folder: of a multimodal model the one that loads all of it, not its text part alone."""
    import transformers
    from transformers.models.auto import modeling_auto as library

    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    of_text = library.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    if of_text is not None and getattr(config, "text_config", None) is None:
        return transformers.AutoModelForCausalLM
    named = next(iter(getattr(config, "architectures", None) or ()), None)
    for loader, mapping in (
        ("AutoModelForImageTextToText", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES"),
        ("AutoModelForMultimodalLM", "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES"),
    ):
        whole = getattr(library, mapping, {}).get(config.model_type)
        if whole is not None and (of_text in (None, whole) or named != of_text):
            return getattr(transformers, loader)
    return transformers.AutoModelForCausalLM


def load(job: Mapping[str, Any], dtype: str, facts: dict[str, Any]) -> Any:
    """The folder by ``from_pretrained``; ``dtype`` is ``float32`` or ``auto``. What the loader says goes to facts."""
    options: dict[str, Any] = {}
    if job["offload"] is not None:
        options = {
            "device_map": {"": "disk"} if job["offload"]["all"] else "auto",
            "offload_folder": job["offload"]["folder"],
            "max_memory": {"cpu": job["offload"]["bytes"]},
        }
    undo = job["dequantise"] if dtype == "float32" else None
    plain = dtype == "float32" and job["role"] == "reference" and not (options or undo or job["trust_remote_code"])
    prepared = PREPARED.pop(job["folder"], None) if plain else None
    if undo not in (None, "method"):
        import transformers

        options["quantization_config"] = getattr(transformers, undo)(dequantize=True)
    model, info = prepared or from_pretrained(
        job["folder"],
        dtype=dtype if dtype == "auto" else getattr(torch, dtype),
        trust_remote_code=job["trust_remote_code"],
        **options,
    )
    facts["loads"] = facts.get("loads", 0) + 1
    if undo == "method":
        model = model.dequantize(torch.float32)
    model.eval()
    if dtype == "float32":
        # What a quantised checkpoint keeps in half precision stays so, whatever dtype is asked for.
        for parameter in model.parameters():
            if parameter.dtype in (torch.bfloat16, torch.float16):
                parameter.data = parameter.data.float()
    if job["device"] != "cpu" and job["offload"] is None:
        model.to(job["device"])
    facts.setdefault("class", type(model).__name__)
    facts.setdefault(
        "loading", {key: sorted(map(str, value)) for key, value in info.items() if isinstance(value, (list, set))}
    )
    return model


def own_dtype(job: Mapping[str, Any], model: Any, facts: dict[str, Any]) -> Any:
    """The folder in the dtype in which it is stored: cast where that is what loading gives, else loaded again.

    ``model`` is spent; the caller keeps no other reference to it.
    """
    wanted = castable(job, model)
    if wanted is None:
        model = None
        model = load(job, "auto", facts)
    else:
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.is_floating_point():
                    parameter.data = parameter.data.to(wanted)
        model.config.dtype = wanted
    floats = (parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    facts["own_dtype"] = str(next(floats)).removeprefix("torch.")
    facts["cast"] = wanted is not None
    # A loader that had to dequantise takes this out of the config.
    facts["quantised"] = getattr(model.config, "quantization_config", None) is not None
    return model


def castable(job: Mapping[str, Any], model: Any) -> torch.dtype | None:
    """The dtype to which every parameter of a model in fp32 may be cast to get what loading in it gives; None if none.

    Half precision that was widened is what it was once it is narrowed again. What a class keeps in fp32, and buffers
    that it computes in the dtype of the load, are not known from the model in fp32: it is loaded again then.
    """
    from transformers import AutoConfig

    if job["offload"] is not None or job["dequantise"] is not None or job["trust_remote_code"]:
        return None
    config = AutoConfig.from_pretrained(job["folder"], local_files_only=True)
    wanted = getattr(config, "dtype", None)
    stated = {str(part["dtype"]) for part in config.to_dict().values() if isinstance(part, dict) and part.get("dtype")}
    if wanted not in (torch.bfloat16, torch.float16) or stated - {str(wanted).removeprefix("torch."), str(wanted)}:
        return None
    if getattr(config, "quantization_config", None) is not None:
        return None
    for module in model.modules():
        if getattr(module, "_keep_in_fp32_modules", None) or getattr(module, "_keep_in_fp32_modules_strict", None):
            return None
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(wanted)
        with torch.device("meta"):
            shape = type(model)(model.config)
    except Exception:  # a class that cannot be made so is loaded again
        return None
    finally:
        torch.set_default_dtype(before)
    buffers = dict(shape.named_buffers())
    for name, buffer in model.named_buffers():
        like = buffers.get(name)
        if like is None or like.dtype != buffer.dtype:
            return None
    if any(parameter.dtype != wanted for parameter in shape.parameters() if parameter.is_floating_point()):
        return None
    return wanted  # type: ignore[no-any-return]


@contextlib.contextmanager
def held_times(
    model: Any, slots: list[dict[str, Any]], held: Mapping[str, torch.Tensor], factor: float
) -> Iterator[None]:
    """While open, the folder's own parameters hold the stored vector ``factor`` times instead of once."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    parameters |= dict(model.named_buffers(remove_duplicate=False))  # biases of GPTQ and AWQ
    before: list[tuple[Any, Any]] = []

    for number, slot in enumerate(slots):
        parameter = parameters.get(slot["parameter"])
        if parameter is None:
            continue  # dropped by the loader; its report says so
        held_here = parameter if slot["index"] is None else parameter[slot["index"]]
        before.append((held_here, held_here.detach().clone()))
        with torch.no_grad():
            set_factor(parameter, held, number, slot, factor)
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in reversed(before):
                parameter.copy_(value)


def set_factor(parameter: Any, held: Mapping[str, torch.Tensor], number: int, slot: Any, factor: float) -> None:
    """Change a parameter that holds the vector once, in place, so that it holds it ``factor`` times."""
    if slot["index"] is not None:
        parameter = parameter[slot["index"]]
    delta = held[f"delta/{number}"]
    if slot["outer"]:
        delta = held[f"right/{number}"].unsqueeze(-2) * delta.unsqueeze(-1)
        delta = delta.mT if slot["transposed"] else delta
    if factor == 0.0 and f"original/{number}" in held:
        # Half precision rounded the sum once, so taking the vector out again would not give this.
        parameter.copy_(held[f"original/{number}"])
    else:
        parameter += (factor - 1) * delta.to(parameter.device, parameter.dtype)


def blocks_in(model: Any, path: str) -> str:
    """The path of a model's decoder blocks: ``path``, or in a class that calls them otherwise its largest list."""
    modules = dict(model.named_modules())
    if path in modules:
        return path
    lists: dict[str, int] = {
        name: len(list(module.parameters())) for name, module in modules.items() if hasattr(module, "append")
    }
    if not lists:
        raise RuntimeError(f"{type(model).__name__} has no `{path}` and no list of blocks")
    return max(lists, key=lists.__getitem__)


def differing_before(base: Any, copy: Any, blocks: str, block: int, changed: list[str]) -> str:
    """Why ``copy`` may compute something else than ``base`` before a block; empty where both hold the same there.

    Everything outside the list of blocks counts as lying before it.

    Args:
        changed: keys of the config that the copy states otherwise on purpose.
    """
    if type(base) is not type(copy):
        return f"the copy is a {type(copy).__name__}, the base a {type(base).__name__}"
    stated = [{k: v for k, v in one.config.to_dict().items() if k not in NOT_THE_MODEL} for one in (base, copy)]
    keys = {key for one in stated for key in one} - set(changed)
    other = sorted(key for key in keys if stated[0].get(key) != stated[1].get(key))
    if other:
        return f"their configs differ in {other[0]}"
    held = [_before(one, blocks, block) for one in (base, copy)]
    # A bias of zeros, which a flag of the config asks for in every block, adds nothing.
    zeros = {name for name, tensor in held[1].items() if name.endswith(".bias") and not tensor.any()}
    unpaired = (held[0].keys() - held[1].keys()) | (held[1].keys() - held[0].keys() - zeros)
    if unpaired:
        return f"one of them has no {min(unpaired)}"
    for name, tensor in held[0].items():
        other_one = held[1][name]
        if tensor.data_ptr() == other_one.data_ptr() and tensor.numel():
            return f"{name} lies in the same memory in both"
        if tensor.dtype != other_one.dtype or not torch.equal(tensor, other_one):
            return f"they differ in {name}"
    return ""


def _before(model: Any, blocks: str, block: int) -> dict[str, torch.Tensor]:
    found = dict(model.named_parameters()) | dict(model.named_buffers())

    def counts(name: str) -> bool:
        number = name.removeprefix(f"{blocks}.").partition(".")[0]
        return not name.startswith(f"{blocks}.") or not number.isdigit() or int(number) < block

    return {name: tensor.detach() for name, tensor in found.items() if counts(name)}


def foreign_hooks(model: Any) -> list[str]:
    """Modules of a model that was just loaded, at which something is hooked or replaced already."""
    found = []
    for name, module in model.named_modules():
        hooks = (*module._forward_hooks, *module._forward_pre_hooks)
        if (hooks and not hasattr(module, "_hf_hook")) or (
            "forward" in vars(module) and not hasattr(module, "_hf_hook")
        ):
            found.append(name or "the model")
    places = torch.nn.modules.module
    if places._global_forward_hooks or places._global_forward_pre_hooks:
        found.append("every module")
    return found
