"""What a class under one config is made of, listed once from the class without weights, and what is kept about it."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from patcher.architectures.config_keys import block_count, stated
from patcher.architectures.decoder import checkpoint_config
from patcher.architectures.model_class import (
    embedding_rows,
    longest_module_list,
    parameter_aliases,
    parameter_shapes,
    submodule,
)
from patcher.architectures.registry import ModelTypeRow
from patcher.disk.findings import Findings, transformers_files
from patcher.errors import InputError

_MOST_FILES = 200


@dataclass(frozen=True)
class ClassListing:
    """See :class:`patcher.architectures.analysis.Architecture`, which has the same attributes."""

    class_name: str
    base_prefix: str
    parameters: Mapping[str, tuple[int, ...]]
    aliases: Mapping[str, str]
    blocks: str
    block_count: int
    embeddings: int | None

    @classmethod
    def of(cls, meta: nn.Module, config: Any, row: ModelTypeRow | None) -> ClassListing:
        """Of the class on meta.

        Raises:
            InputError: no list of decoder blocks is found in it.
        """
        blocks = _find_blocks(meta, config, row)
        return cls(
            type(meta).__name__,
            str(getattr(meta, "base_model_prefix", "") or ""),
            parameter_shapes(meta),
            parameter_aliases(meta),
            blocks,
            len(meta.get_submodule(blocks)),  # type: ignore[arg-type]
            embedding_rows(meta),
        )


def _find_blocks(meta: nn.Module, config: Any, row: ModelTypeRow | None) -> str:
    if row is not None and row.blocks and isinstance(submodule(meta, row.blocks), nn.ModuleList):
        return row.blocks
    found = longest_module_list(meta, block_count(config))
    if found is None:
        raise InputError(
            f"no list of {block_count(config)} decoder blocks was found in {type(meta).__name__}",
            where=f"model_type `{config.model_type}`",
            remedy="this architecture needs a row in patcher/architectures/rows.json",
        )
    return found


def findings_about(config: Any, *, trust_remote_code: bool = False) -> Findings:
    """What is kept between runs about the class of a config: by all that the config says, and by the code of the class.

    Nothing is kept where the code of the model itself runs and cannot be told.
    """
    own, config = config, checkpoint_config(config)
    try:
        content = dict(config.to_dict())
    except Exception:
        # Configs that come with a model's own code may do anything.
        return Findings(None)
    name = content.pop("_name_or_path", None) or stated(config, "_name_or_path")
    content.pop("transformers_version", None)
    code: Any = None
    if trust_remote_code and stated(config, "auto_map"):
        code = _own_code(str(name), config.auto_map)
        if code is None:
            return Findings(None)
    module = type(config).__module__
    files = [file for part in dict.fromkeys((module, type(own).__module__)) for file in _files_of(part)]
    kind = f"{module}.{type(config).__qualname__}"
    attention = stated(config, "_attn_implementation_internal")
    return Findings([kind, content, attention, trust_remote_code, code, files])


def _files_of(module: str) -> list[Any]:
    folder = module.removeprefix("transformers.").rpartition(".")[0].replace(".", "/")
    return list(transformers_files(folder)) if module.startswith("transformers.models.") else []


def _own_code(folder: str, auto_map: Any) -> list[list[str]] | None:
    """The hashes of the Python files that come with a model; None where they are elsewhere, or there are many."""
    place = Path(folder)
    if "--" in repr(auto_map) or not folder or not place.is_dir():
        return None
    with contextlib.suppress(OSError):
        paths = sorted(place.rglob("*.py"))
        if paths and len(paths) <= _MOST_FILES:
            return [[str(path.relative_to(place)), hashlib.sha256(path.read_bytes()).hexdigest()] for path in paths]
    return None
