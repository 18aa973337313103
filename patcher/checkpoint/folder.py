"""A checkpoint folder: which files a stock loader would read, and which of them travel into a copy."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from patcher.disk.json_files import read_json_object
from patcher.disk.links import require_inside
from patcher.errors import InputError

if TYPE_CHECKING:
    from patcher.checkpoint.safetensors_header import TensorInfo

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
BIN_SINGLE = "pytorch_model.bin"
BIN_INDEX = "pytorch_model.bin.index.json"

GENERATION = "generation_config.json"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "vocab.bpe", "merges.txt", "spiece.model",
    "sentencepiece.bpe.model", "sentencepiece.model", "spm.model", "*.tiktoken", "tekken.json", "emoji.json",
)  # fmt: skip
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
"""What turns images, video and sound into a multimodal model's inputs."""
TEMPLATE_FOLDERS = ("additional_chat_templates",)
SIDE_FILES = (
    GENERATION, *TOKENIZER_FILES, *TEMPLATE_FILES, *PROCESSOR_FILES,
    "LICENSE*", "LICENCE*", "License*", "NOTICE*", "USE_POLICY*", "COPYING*",
)  # fmt: skip
SIDE_FOLDERS = TEMPLATE_FOLDERS

_LONGEST_NAME = 255
"""Bytes. Beyond it a file system does not say that there is no such file, but fails."""

Layout = Literal["single", "sharded", "bin", "bin-sharded"]


class CheckpointFolder:
    """A local checkpoint, opened read-only.

    Args:
        partial: take a download of some shards as it is: what lies in the shards that the index names and that are
            not there is not there. Without it a missing shard is an error wherever tensors are asked for.

    Attributes:
        path: the folder.
        config: the content of config.json.
        layout: how the weights lie; ``model.safetensors`` wins over an index, as in transformers.

    Raises:
        InputError: no folder, no config, no weights, or files that contradict each other.
    """

    def __init__(self, path: Path, *, partial: bool = False) -> None:
        self.path = path
        self.partial = partial
        if not path.is_dir():
            raise InputError(
                "there is no such folder", where=str(path), remedy="check the spelling, and that it is still there"
            )
        self.config: dict[str, Any] = read_json_object(path / "config.json")
        self.layout: Layout = self._layout()

    def _layout(self) -> Layout:
        names = {SINGLE: "single", INDEX: "sharded", BIN_SINGLE: "bin", BIN_INDEX: "bin-sharded"}
        for name, layout in names.items():
            if (self.path / name).is_file():
                return layout  # type: ignore[return-value]
        raise InputError(
            "the folder holds no weights that transformers would load",
            where=str(self.path),
            found=", ".join(sorted(item.name for item in self.path.iterdir())[:12]) or "nothing",
            remedy=f"a checkpoint has {SINGLE}, {INDEX} or {BIN_SINGLE}",
        )

    @property
    def is_bin(self) -> bool:
        """Whether the weights are PyTorch pickles, which are converted before anything is written."""
        return self.layout in ("bin", "bin-sharded")

    @property
    def index(self) -> dict[str, Any]:
        """The index of a sharded checkpoint."""
        return read_json_object(self.path / (INDEX if self.layout == "sharded" else BIN_INDEX))

    @property
    def weight_map(self) -> Mapping[str, str]:
        """Of a sharded checkpoint: the name of each tensor -> that of the file which holds it, as the index says."""
        weight_map = self.index.get("weight_map")
        where = str(self.path / (INDEX if self.layout == "sharded" else BIN_INDEX))
        if not isinstance(weight_map, dict) or not weight_map:
            raise InputError("the index has no `weight_map`", where=where, remedy="download the checkpoint again")
        for name in weight_map.values():
            if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
                raise InputError("the index names a file outside of the folder", where=where, found=name)
            if len(name.encode("utf-8", "surrogatepass")) > _LONGEST_NAME:
                raise InputError("the index names a file that cannot be there", where=where, found=f"{name[:80]}...")
            if self.layout == "sharded" and not name.endswith(".safetensors"):
                raise InputError("the index names a file that is not safetensors", where=where, found=name)
        return weight_map

    @property
    def weight_files(self) -> list[str]:
        """Names of the files that hold weights, in order; of a partial checkpoint, of those that are there."""
        if self.layout == "single":
            return [SINGLE]
        if self.layout == "bin":
            return [BIN_SINGLE]
        named = sorted(set(self.weight_map.values()))
        if not self.partial:
            return named
        there = [name for name in named if (self.path / name).is_file()]
        if not there:
            raise InputError(
                "none of the weight files that the index names is there",
                where=str(self.path),
                remedy="download the checkpoint again",
            )
        return there

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every stored tensor by its name on disk (safetensors layouts)."""
        found: dict[str, TensorInfo] = {}
        for name in self.weight_files:
            for key, info in self._header(name).items():
                if key in found:
                    raise InputError(
                        f"the tensor {key!r} is stored twice",
                        where=str(self.path),
                        found=f"{found[key].file.name} and {name}",
                        remedy="stock loaders disagree on which one counts; download it again, into an empty folder",
                    )
                found[key] = info
        return found

    def _header(self, name: str) -> Mapping[str, TensorInfo]:
        # It takes torch, and names of files are looked at before that is imported.
        from patcher.checkpoint.safetensors_header import read_header

        return read_header(self.path / name)

    def side_files(self, *, remote_code: bool = False) -> list[Path]:
        """Relative paths of the files besides weights and config that a copy takes along, and nothing else.

        Raises:
            InputError: one of them is a link out of the folder, see :mod:`patcher.disk.links`.
        """
        patterns = (*SIDE_FILES, "*.py") if remote_code else SIDE_FILES
        chosen = [
            Path(item.name)
            for item in sorted(self.path.iterdir())
            if item.is_file() and any(fnmatch.fnmatchcase(item.name, pattern) for pattern in patterns)
        ]
        for folder in SIDE_FOLDERS:
            if (self.path / folder).is_dir():
                templates = (self.path / folder).glob("*.jinja")
                chosen += sorted(item.relative_to(self.path) for item in templates if item.is_file())
        for name in chosen:
            require_inside(self.path / name, self.path)
        return chosen
