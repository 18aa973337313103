"""This package from the checkpoint on the disk to the vector: the model loaded, or streamed block by block."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig

from patcher.architectures.analysis import Architecture
from patcher.capture.opened import open_base
from patcher.checkpoint.folder import CheckpointFolder
from patcher.recipe.file import LoadedRecipe
from patcher.recipe.schema import Recipe
from patcher.vectors.finding import find_vectors, prepare_vectors


class Contender:
    model = None

    def __init__(self, folder: Path, dtype: str) -> None:
        self.folder, self.dtype = folder, getattr(torch, dtype)

    def capture(self, pairs: str, layer: int, mode: Literal["memory", "stream"]) -> dict[str, Any]:
        architecture = Architecture(AutoConfig.from_pretrained(self.folder))
        checkpoint = CheckpointFolder(self.folder)
        vector = {"name": "benchmark", "pairs": Path(pairs).name, "format": "ab", "layer": layer}
        recipe = Recipe.model_validate({"model": str(self.folder), "vectors": [vector], "evaluate": {"enabled": False}})
        with (
            tempfile.TemporaryDirectory(dir=Path(pairs).parent) as scratch,
            open_base(
                self.folder,
                checkpoint,
                architecture,
                mode,
                dtype=self.dtype,
                device="cpu",
                scratch=Path(scratch),
            ) as opened,
        ):
            loaded = LoadedRecipe(recipe, "", Path(pairs).with_name("recipe.yaml"))
            prepared = prepare_vectors(loaded, opened.tokenizer, architecture.block_count)
            vectors = find_vectors(prepared, opened.reader, neutral=[])
            # A loaded checkpoint is mapped as a whole.
            whole = sum(checkpoint.path.joinpath(file).stat().st_size for file in checkpoint.weight_files)
            read = getattr(opened.reader.runner, "bytes_read", whole)
        return {"vector": vectors[0].values, "bytes_read": read}
