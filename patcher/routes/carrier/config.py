"""The changes of config.json that insert blocks."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from patcher.architectures.analysis import Architecture
from patcher.architectures.config_keys import stated
from patcher.architectures.decoder import decoder_config, decoder_part, own_values, with_changes
from patcher.architectures.model_class import quiet_transformers
from patcher.checkpoint.folder import CheckpointFolder
from patcher.routes.carrier.choice import Choice
from patcher.routes.carrier.disk import CarrierNames
from patcher.routes.carrier.insertion import QUANTISED, as_stated
from patcher.routes.exclusions import module_of, modules_of, moved_config
from patcher.routes.plan import NotApplicable, TensorWrite

PER_BLOCK = "per_layer_config"
"""Settings of single blocks, which is transformers' own way to write them."""


def config_changes(architecture: Architecture, choice: Choice, checkpoint: CheckpointFolder | None) -> dict[str, Any]:
    """The changes in the spelling of this config.json; it must then say what was proven."""
    stored = _decoded(decoder_part(checkpoint.config)) if checkpoint is not None else own_values(architecture.config)
    changes = as_stated(choice.insertion, architecture.config, stored)
    before = architecture.config.to_dict()
    changes = {name: _spelled(value, stored.get(name), before.get(name)) for name, value in changes.items()}
    spellings: Mapping[str, str] = stated(architecture.config, "attribute_map") or {}
    for common, own in spellings.items():
        for name, other in ((common, own), (own, common)):
            if name in changes and other in stored:
                changes[other] = changes[name]
    wanted = choice.insertion.config.to_dict()
    if PER_BLOCK not in stored and PER_BLOCK in changes:
        # The class makes it of the list of types, which other stacks read.
        fewer = {name: value for name, value in changes.items() if name != PER_BLOCK}
        changes = changes if _unlike(architecture, checkpoint, {**stored, **fewer}, wanted) else fewer
    if (key := _unlike(architecture, checkpoint, {**stored, **changes}, wanted)) is not None:
        raise NotApplicable(f"the config key `{key}` would be read otherwise, not as {wanted[key]!r}")
    return changes


def _unlike(
    architecture: Architecture,
    checkpoint: CheckpointFolder | None,
    stated: Mapping[str, Any],
    wanted: Mapping[str, Any],
) -> str | None:
    """A key under which transformers reads something else in this config.json than what is wanted, or None."""
    try:
        with quiet_transformers():
            read = _read(architecture, checkpoint, copy.deepcopy(dict(stated))).to_dict()
    except Exception as error:
        # Classes check their configs in their own ways, with errors of any type.
        raise NotApplicable(f"transformers does not load the config with one more layer: {error}") from None
    skipped = ("_name_or_path", "dtype", "torch_dtype", "transformers_version", "architectures", QUANTISED)
    names = (name for name in wanted if name not in skipped and not name.startswith("_"))
    return next((name for name in names if read.get(name) != wanted[name]), None)


def _read(architecture: Architecture, checkpoint: CheckpointFolder | None, stated: Mapping[str, Any]) -> Any:
    """The decoder's config that a stock loader makes of it."""
    whole = architecture.checkpoint_config
    if not architecture.wraps or checkpoint is None:
        return type(architecture.config).from_dict(dict(stated))
    return decoder_config(type(whole).from_dict(with_changes(_decoded(checkpoint.config), {}, stated)))


def moved_quantisation(
    architecture: Architecture,
    choice: Choice,
    names: CarrierNames,
    checkpoint: CheckpointFolder | None,
    tensors: Sequence[TensorWrite],
) -> dict[str, Any]:
    """The base's ``quantization_config`` with every block where it is now, and the inserted ones left out of it."""
    quantisation, insertion = architecture.quantisation, choice.insertion
    if quantisation is None:
        raise ValueError("the base is not quantised")
    stated = architecture.config.quantization_config if checkpoint is None else checkpoint.config[QUANTISED]
    matrices = [tensor for tensor in tensors if len(tensor.shape) > 1]
    added = [module_of(name) for tensor in matrices for name in (tensor.parameter, tensor.name)]

    def moved(module: str) -> tuple[str, ...]:
        new = {insertion.moved_name(module, prefix) for prefix in (architecture.blocks + ".", names.prefix)}
        return tuple(new - {module} or new)

    drafts = names.moved()[1]
    stored = None if names.stored is None else {n: info for n, info in names.stored.items() if n not in drafts}
    return moved_config(
        quantisation,
        stated,
        modules_of(choice.base, quantisation, stored, moved, dict.fromkeys(added), insertion.moved),
    )


def _spelled(value: Any, stored: Any, read: Any) -> Any:
    """A list of block types in the words of this config.json, where transformers has read them as others.

    Other software reads the release's own words: llama.cpp's converter knows ``mamba``, not ``linear_attention``.
    """
    lists = all(isinstance(item, list) for item in (value, stored, read))
    if not lists or len(stored) != len(read) or not all(isinstance(item, str) for item in (*stored, *read)):
        return value
    words = dict(zip(read, stored, strict=True))
    return [words.get(item, item) for item in value] if set(value) <= words.keys() else value


def _decoded(value: Any) -> Any:
    """JSON as transformers writes it, with its notation for infinity read."""
    if isinstance(value, dict) and value.keys() == {"__float__"}:
        return float(value["__float__"])
    if isinstance(value, dict):
        return {key: _decoded(item) for key, item in value.items()}
    return [_decoded(item) for item in value] if isinstance(value, list) else value
