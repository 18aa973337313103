"""A PEFT adapter on this machine: found, downloaded, and refused where it is none that can be merged into weights."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from patcher.checkpoint.folder import TEMPLATE_FILES, TEMPLATE_FOLDERS, TOKENIZER_FILES
from patcher.checkpoint.listing import in_order
from patcher.checkpoint.names import WRAPPERS
from patcher.checkpoint.safetensors_header import TensorInfo, read_header
from patcher.checkpoint.source import download, locate, names_on_the_hub
from patcher.disk.lfs import refuse_pointer
from patcher.errors import InputError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
BY_HAND = "merge it with PEFT, save the merged model, and use that as `model` without `adapter`"
MERGE_FIRST = "merge it where it was trained: model.merge_and_unload().save_pretrained(folder) is then your `model`"
Use = Literal["tokenizer", "template", "generation"]
EVERY_USE: frozenset[Use] = frozenset(("tokenizer", "template", "generation"))

_PATTERNS = (CONFIG, "generation_config.json", *TOKENIZER_FILES, *TEMPLATE_FILES, *(f"{x}/*" for x in TEMPLATE_FOLDERS))
_NO_WEIGHTS = (
    "PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "MULTITASK_PROMPT_TUNING", "CPT", "CARTRIDGE",
    "XLORA", "POLY",
)  # fmt: skip
_OTHER_TASKS = {
    "SEQ_CLS": "a sequence classifier", "TOKEN_CLS": "a token classifier", "QUESTION_ANS": "a reader of answers",
    "SEQ_2_SEQ_LM": "an encoder-decoder",
}  # fmt: skip
_IN_A_REPOSITORY = re.compile(r"(\w[\w.-]*/[\w.-]+)/([\w.-]+(?:/[\w.-]+)*)")
_WRAPPERS = re.compile(rf"(?<![^.])(?:{'|'.join(map(re.escape, (*WRAPPERS, 'module.')))})")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class AdapterFolder:
    """An adapter on this machine.

    Attributes:
        folder: its local folder.
        given: where it is found again: a Hub id, or a path.
        revision: the commit, for one on the Hub.
        uses: for what its side files stand in the place of the base's, see :mod:`patcher.checkpoint.side_files`.
        notes: what the user should know.
    """

    folder: Path
    given: str
    revision: str | None = None
    uses: frozenset[Use] = EVERY_USE
    notes: tuple[str, ...] = ()

    @classmethod
    def at(cls, folder: Path) -> AdapterFolder:
        """A local folder, all of whose side files are used."""
        return cls(folder, str(folder.resolve()))

    def using(self, uses: frozenset[Use], *notes: str) -> AdapterFolder:
        return replace(self, uses=uses, notes=(*self.notes, *notes))

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """The content of adapter_config.json.

        Raises:
            InputError: it cannot be read, or is none of PEFT's.
        """
        try:
            config = json.loads((self.folder / CONFIG).read_text(encoding="utf-8"))
            kind = config.get("peft_type")
        except (OSError, ValueError, RecursionError, AttributeError) as error:
            raise refusal("adapter_config.json cannot be read", self.folder, found=error, remedy=None) from None
        if not isinstance(kind, str):
            message = "adapter_config.json names no `peft_type`, so this is no adapter of PEFT's"
            found = f"keys of another tool: {', '.join(sorted(map(str, config))[:8])}"
            raise refusal(message, self.folder, found=found, remedy=None)
        return config  # type: ignore[no-any-return]

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """What the adapter holds, by the names in the base's class."""
        stored = read_header(self.folder / WEIGHTS)
        found = {plain_name(name): info for name, info in stored.items()}
        if len(found) < len(stored):
            raise refusal("the adapter holds a tensor twice, under two names", self.folder / WEIGHTS)
        return found


def plain_name(name: str) -> str:
    """A tensor's name without PEFT's prefix, and without what torch.compile, DDP and FSDP put into names."""
    return _WRAPPERS.sub("", name).removeprefix(PREFIX)


def find_adapter(adapter: str, recipe_folder: Path) -> AdapterFolder:
    """The adapter as a local folder; of one on the Hub the small files are downloaded first, and checked.

    Raises:
        InputError: it is not there, or not an adapter that can be merged.
        OutsideError: the Hub failed.
    """
    if recipe_folder.joinpath(adapter).is_file():
        remedy = f"give its folder: adapter: {Path(adapter).parent}"
        raise InputError("an adapter is a folder, and this is a file", where=f"adapter: {adapter}", remedy=remedy)
    deeper = _IN_A_REPOSITORY.fullmatch(adapter)
    if deeper and not recipe_folder.joinpath(adapter).exists():
        message = "an adapter in a folder of a repository is downloaded first"
        raise refusal(message, adapter, remedy=_downloading(*deeper.groups()))
    found = locate(adapter, recipe_folder=recipe_folder, where="adapter")
    if isinstance(found, Path):
        require_adapter(found)
        return AdapterFolder(found, str(found.resolve()))
    name, revision = found
    folder = download(name, revision, _PATTERNS, what="the adapter")
    commit = folder.name if _COMMIT.fullmatch(folder.name) else revision
    if not (folder / CONFIG).is_file():
        raise _no_config(name, names_on_the_hub(name, commit))
    _require_mergeable(AdapterFolder(folder, adapter).config, folder)
    names = names_on_the_hub(name, commit)
    if names and WEIGHTS not in names:
        raise _no_weights(name, names)
    require_adapter(download(name, commit, [WEIGHTS], what="the adapter"))
    return AdapterFolder(folder, adapter, commit)


def _downloading(name: str, folder: str) -> str:
    return f'hf download {name} --include "{folder}/*" --local-dir DIR, then adapter: DIR/{folder}'


def require_adapter(adapter: Path) -> None:
    """Refuse a folder that is no adapter, or one that cannot be merged into weights.

    Raises:
        InputError: with what is missing.
    """
    for item in sorted(adapter.iterdir()) if adapter.is_dir() else ():
        refuse_pointer(item)
    if not (adapter / CONFIG).is_file():
        there = {path.relative_to(adapter).as_posix() for path in (*adapter.glob("*"), *adapter.glob(f"*/{CONFIG}"))}
        raise _no_config(adapter, there)
    if not (adapter / WEIGHTS).is_file():
        raise _no_weights(adapter, {path.name for path in adapter.iterdir()})
    found_adapter = AdapterFolder.at(adapter)
    _require_mergeable(found_adapter.config, adapter)
    _ = found_adapter.tensors


def _no_config(place: Path | str, names: set[str]) -> InputError:
    """What a folder, or a repository by its name, holds that has no adapter at its top.

    Args:
        names: relative paths of what is in it.
    """
    local = isinstance(place, Path)
    inside = in_order(path.rpartition("/")[0] for path in names if path.endswith(f"/{CONFIG}"))
    found = ", ".join(sorted(names)[:12]) if not local else None
    if inside:
        found = f"adapters in folders of it: {', '.join(inside[:8])}"
        last = inside[-1]
        remedy = f"give one of them: adapter: {place}/{last}" if local else _downloading(str(place), last)
    elif "config.json" in names:
        model = "`model`" if local else f"`model: {place}`"
        remedy = f"it is a whole model: give it as {model}, without `adapter`"
    else:
        what = "the folder that `save_pretrained`" if local else "a repository that `push_to_hub`"
        remedy = f"give {what} of a PEFT model wrote"
    message = "this is not a PEFT adapter: it has no adapter_config.json"
    return refusal(message, place, found=found or None, remedy=remedy)


def _no_weights(place: Path | str, names: set[str]) -> InputError:
    pickled = "adapter_model.bin" in names
    again = "PeftModel.from_pretrained(model, adapter).save_pretrained(folder)"
    return refusal(
        f"the adapter has no {WEIGHTS}",
        place,
        found="adapter_model.bin, a pickle, which is not loaded" if pickled else ", ".join(sorted(names)[:12]),
        remedy=f"load it with PEFT and save it again as safetensors: {again}" if pickled else "download it again",
    )


def _require_mergeable(config: Mapping[str, Any], place: Path) -> None:
    """Refuse by the config alone what is no change of weights, or of another class's."""
    kind, task = config["peft_type"], str(config.get("task_type"))
    if kind in _NO_WEIGHTS:
        message = f"an adapter of type {kind} cannot be merged into weights"
        raise refusal(message, place, remedy="use an adapter that changes weights, such as LoRA")
    if config.get("alora_invocation_tokens"):
        raise refusal(
            "an activated LoRA acts only behind its invocation tokens, so it cannot be merged into weights",
            place,
            found=f"alora_invocation_tokens: {config['alora_invocation_tokens']}",
            remedy="use a LoRA that acts at every token",
        )
    if task in _OTHER_TASKS:
        raise refusal(
            f"the adapter was trained for {_OTHER_TASKS[task]}, and what is steered is a causal language model",
            place,
            found=f"task_type: {task}",
            remedy="use an adapter of `task_type: CAUSAL_LM`",
        )
    begun = str(config.get("init_lora_weights"))
    if begun.startswith(("pissa_niter", "corda", "lora_ga")):
        raise refusal(
            "when this adapter was begun, the base's weights were changed in a way that nobody can repeat",
            place,
            found=f"init_lora_weights: {begun}",
            remedy=MERGE_FIRST,
        )
    if config.get("layer_replication"):
        message = "the adapter repeats blocks of its base (`layer_replication`), and the copy has the base's blocks"
        raise refusal(message, place)


def name_note(adapter: AdapterFolder, model: str) -> str | None:
    """A note where the adapter says that it was trained on a model of another name; shapes decide what fits."""
    stated = adapter.config.get("base_model_name_or_path")
    last = [str(name).partition("@")[0].rstrip("/").rpartition("/")[2] for name in (stated, model)]
    if not stated or last[0].lower() == last[1].lower() or Path(str(stated)).is_absolute():
        return None
    return (
        f"the adapter says that it was trained on `{stated}`, and is merged into `{model}`, which it fits by its shapes"
    )


def refusal(message: str, place: object = None, *, found: object = None, remedy: str | None = BY_HAND) -> InputError:
    """An error about the adapter."""
    where = "adapter" if place is None else f"adapter: {place}"
    return InputError(message, where=where, found=found, remedy=remedy)
