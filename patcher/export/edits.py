"""The edits of a patched folder, as its base would gain them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from patcher.architectures.analysis import Architecture
from patcher.architectures.decoder import with_changes
from patcher.checkpoint.prepare import read_config
from patcher.checkpoint.steering_files import VECTORS
from patcher.disk.json_files import read_json_object
from patcher.errors import InputError
from patcher.patched.reading import read_manifest
from patcher.patched.route import RecordedRoute


@dataclass(frozen=True)
class Edits:
    """What a folder's base gains.

    Attributes:
        vectors: layer of the base (-1: the embedding) -> fp32 [hidden], all of its edits together.
        names: layer -> names of its edits.
        base: Hub id or folder name of the base.
        revision: the base's commit, of a Hub model.
        place: the Hub id, or the local folder: for what is shown here, never for what is written.
        on_hub: whether ``base`` is a Hub id.
        base_config: the base's config.json.
        trust_remote_code: whether code that comes with the base may run.
        notes: what the user should know.
    """

    vectors: Mapping[int, torch.Tensor]
    names: Mapping[int, list[str]]
    base: str
    revision: str | None
    place: str
    on_hub: bool
    base_config: Mapping[str, Any]
    trust_remote_code: bool
    notes: tuple[str, ...]

    @property
    def model_type(self) -> str:
        return str(self.base_config.get("model_type", ""))

    def architecture(self) -> Architecture:
        """The base's stock class, without weights.

        Raises:
            InputError: this transformers cannot build it.
        """
        # A quantised base has the same modules; which of them hold what does not matter here.
        plain = {key: value for key, value in self.base_config.items() if key != "quantization_config"}
        with tempfile.TemporaryDirectory(prefix="patch-model-config-") as name:
            (Path(name) / "config.json").write_text(json.dumps(plain), encoding="utf-8")
            config = read_config(Path(name), trust_remote_code=self.trust_remote_code)
        return Architecture(config, trust_remote_code=self.trust_remote_code)


class Format(Protocol):
    """What every format's module has."""

    SUFFIX: str
    """Of the default output's name; empty for a folder."""

    def is_ours(self, path: Path) -> bool:
        """Whether what is there is an export of this format, which may be replaced."""

    def write(self, edits: Edits, target: Path) -> list[str]:
        """Write a file or a folder at ``target``, which is not there yet; notes for the user.

        Raises:
            InputError: the format cannot hold these edits.
            MissingExtraError: it needs a package that is not installed.
        """

    def use(self, edits: Edits, output: Path) -> list[str]:
        """Lines that use the export."""


def read_edits(folder: Path, *, trust_remote_code: bool = False) -> Edits:
    """The edits of a patched folder.

    Args:
        folder: the patched folder.
        trust_remote_code: allow code that comes with the base to run. The folder itself has no say in that.

    Raises:
        InputError: it is not one, or its files contradict each other.
    """
    patch = read_manifest(folder)
    base = patch.base
    sums: dict[int, torch.Tensor] = {}
    names: dict[int, list[str]] = {}
    path = folder / VECTORS
    try:
        with safe_open(path, framework="pt") as file:
            for edit in patch.edits:
                layer, vector = edit.layer, file.get_tensor(edit.tensor)
                alike = vector.ndim == 1 and len(vector) and vector.shape == sums.get(layer, vector).shape
                if not alike or not bool(torch.isfinite(vector.double()).all()):
                    raise ValueError(f"{edit.tensor} is not a vector of finite numbers")
                sums[layer] = sums.get(layer, torch.zeros(())) + vector.double()
                names.setdefault(layer, []).append(edit.name)
    except (OSError, SafetensorError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(
            "the folder's vectors cannot be read", where=str(path), found=error, remedy="build the folder again"
        ) from None
    if not sums:
        raise InputError("the manifest lists no edit", where=str(folder), remedy="build the folder again")
    notes = []
    if base.adapter:
        notes.append("an adapter was merged into the base before it was steered; the export holds the steering alone")
    return Edits(
        vectors={layer: sums[layer].float().contiguous() for layer in sorted(sums)},
        names={layer: names[layer] for layer in sorted(names)},
        base=base.model,
        revision=base.revision,
        place=base.path or base.model,
        on_hub=bool(base.hub),
        base_config=_base_config(read_json_object(folder / "config.json"), patch.route),
        trust_remote_code=trust_remote_code,
        notes=tuple(notes),
    )


def _base_config(copied: Mapping[str, Any], route: RecordedRoute) -> dict[str, Any]:
    """The config.json that the route started from: the copy's, with what the route changed put back."""
    before = route.config_before
    if route.has_new_config:
        # The route wrote all of the decoder's config anew, so all of the base's was kept.
        return with_changes(copied, {}, {key: value for key, value in before.items() if key != "quantization_config"})
    return with_changes(copied, before)
