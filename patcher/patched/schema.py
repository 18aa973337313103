"""The content of ``steering.json`` as types: what one build writes, and what is checked of a file from elsewhere.

Every module reads attributes of these models; keys that are not named here are kept as they came. What a manifest must
have before anything is done with its folder is stated once, in :mod:`patcher.patched.checking`. Other keys have
defaults, so that older folders are read in the same way everywhere.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Annotated, Any

from pydantic import AfterValidator, Field, model_validator

from patcher.patched.evaluation import Evaluation
from patcher.patched.failed_route import RecordedCheck
from patcher.patched.made_of import MadeOf, pairs_in_words
from patcher.patched.part import Number, Part
from patcher.patched.route import Layer, RecordedRoute
from patcher.patched.vector_source import VectorSource

FORMAT = 1
LONGEST = 200
"""Characters, of a name or of what an error quotes."""


def _inside(name: str) -> str:
    """Refuse a name that leads out of the folder that it is looked for in, or that no file can have."""
    path = PurePosixPath(name)
    if not path.parts or path.is_absolute() or ".." in path.parts or "\0" in name or len(name) > LONGEST:
        raise ValueError("not the name of a file inside of a folder")
    return name


FileName = Annotated[str, AfterValidator(_inside)]
Count = Annotated[int, Field(ge=0)]


class RecordedFile(Part):
    """One file of the base; ``sha256`` is null where it was not hashed."""

    name: FileName
    size: Count
    sha256: str | None


class Adapter(Part):
    """The PEFT adapter that was merged: its name, where it was given (on the Hub: at which commit), its weights' hash.

    ``uses`` names what its side files stand for in the copy, and ``files`` lists them. Older manifests have neither:
    then all side files were the base's.
    """

    name: str
    given: str
    sha256: str
    revision: str | None = None
    uses: list[str] = []
    files: list[RecordedFile] = []


def _distinct(files: list[RecordedFile]) -> list[RecordedFile]:
    """Refuse a list that names a file twice: it could not be two things."""
    if len({PurePosixPath(file.name) for file in files}) < len(files):
        raise ValueError("a file is named twice")
    return files


class Base(Part):
    """The model that was steered. ``path`` is the local folder; it is never published.

    ``stripped`` is what was left out of the names of its tensors (:mod:`patcher.checkpoint.stored_names`).
    """

    model: str
    hub: bool | None = None
    revision: str | None = None
    path: str | None = None
    adapter: Adapter | None = None
    stripped: list[str] | None = None
    files: Annotated[list[RecordedFile], AfterValidator(_distinct)] | None = None

    @property
    def hub_id(self) -> str | None:
        """Its name on the Hub, if it came from there."""
        return self.model.partition("@")[0] if self.hub and self.model else None


class Edit(Part):
    """One steering vector: what the residual stream gains after block ``layer`` (-1: the embedding).

    ``tensor`` is its key in ``steering.safetensors``; ``norm`` and ``residual_norm`` are L2 norms. ``source`` is of one
    that was read from a file.
    """

    name: str
    layer: Layer
    site: str | None = None
    read_layer: int | None = None
    method: str | None = None
    coefficient: Number | None = None
    scale: Any = None
    tensor: str = ""
    norm: Number | None = None
    residual_norm: Number | None = None
    stored_rel_error: Number | None = None
    generations: str | None = None
    made_of: MadeOf | None = None
    source: VectorSource | None = None


class WithImages(Part):
    """What was checked of a class that takes images, on a text, an image and a text.

    Attributes:
        checked: whether such a prompt was run.
        by: what made the pixel values: the folder's own processor, its image processor, or random values.
        why: what stood in the way of a better one, or of any.
        positions: tokens of the prompt.
    """

    checked: bool = False
    by: str | None = None
    why: str | None = None
    positions: Count | None = None
    max_abs_logprob_diff: Number | None = None
    steering_effect: Number | None = None
    tolerance: Number | None = None


class ByCausalLM(Part):
    """What ``AutoModelForCausalLM`` does with a multimodal copy: loads the ``whole``, the ``text``, or ``refuses``."""

    does: str = ""
    architecture: str | None = None


class Verification(Part):
    """How one stack compared with the hook reference."""

    stack: str = ""
    version: str | None = None
    status: str = "not_checked"
    passed: bool | None = None
    reference: str | None = None
    dtype: str | None = None
    max_abs_logprob_diff: Number | None = None
    noise_floor: Number | None = None
    own_error: Number | None = None
    steering_effect: Number | None = None
    vector_rel_error: Number | None = None
    tolerance: Number | None = None
    kl_share: Number | None = None
    checks: list[RecordedCheck] = []
    detail: str | None = None
    note: str | None = None
    remedy: str | None = None
    blocks: int | None = None
    images: WithImages | None = None
    causal_lm: ByCausalLM | None = None


class RecipeRecord(Part):
    """The recipe, verbatim and resolved; ``folder`` is what its paths are relative to, and is never published."""

    text: str | None = None
    resolved: dict[str, Any] | None = None
    folder: str | None = None


class RecordedInputs(Part):
    """What one vector was made of, as SHA-256: its file, its pairs as texts, the tokens that were read, its images."""

    vector: str
    file: str | None = None
    pairs: str | None = None
    tokens: str | None = None
    images: str | None = None


class Undo(Part):
    """What the writer noted to take the copy back, see :func:`patcher.checkpoint.undo.undo_record`."""

    lost: list[str] | None = None


class Downloaded(Part):
    name: str
    size: Count | None = None


class Remote(Part):
    """Of a copy that was made on the Hub: which of the base's weights were here for it."""

    downloaded: list[Downloaded] = []
    bytes_downloaded: Count | None = None
    bytes_of_weights: Count | None = None
    weight_files: Count | None = None
    blocks_read: Count | None = None
    changed: list[str] = []


class Patch(Part):
    """What one build did, without what was done before it."""

    format: int = FORMAT
    tool_version: str | None = None
    base: Base = Base(model="")
    edits: list[Edit] = []
    route: RecordedRoute = RecordedRoute()
    verification: list[Verification] = []
    evaluation: Evaluation | None = None
    recipe: RecipeRecord = RecipeRecord()
    inputs: list[RecordedInputs] = []
    environment: dict[str, Any] = {}
    notes: list[str] = []
    undo: Undo | None = None
    remote: Remote | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        """A part that is null where it cannot be is one that is not there."""
        if not isinstance(data, Mapping):
            return data
        never = {name for name, field in cls.model_fields.items() if field.default is not None}
        return {key: part for key, part in data.items() if part is not None or key not in never}

    @property
    def resolved(self) -> Mapping[str, Any]:
        """The recipe as it was built, with every default filled in."""
        return self.recipe.resolved or {}

    @property
    def said_of_pairs(self) -> list[str]:
        """Which part of its pairs each vector is made of, and measured on, for people."""
        effects = self.evaluation.per_vector if self.evaluation else []
        measured = [effect.vector for effect in effects if effect.held_out]
        return pairs_in_words([(edit.name, edit.made_of) for edit in self.edits], measured)

    @property
    def remote_code(self) -> bool:
        """Whether the base brings code of its own."""
        return self.resolved.get("trust_remote_code") is True


class Manifest(Patch):
    """The whole of ``steering.json``: the latest patch, and in ``history`` those before it, the earliest first."""

    history: list[Patch] = []

    @classmethod
    def of(cls, patch: Patch, history: Sequence[Patch]) -> Manifest:
        """The manifest of ``patch``, after the patches in ``history``, the earliest first."""
        return cls.model_validate({**patch.as_json(), "history": [earlier.as_json() for earlier in history]})

    def with_parts(self, **parts: Any) -> Manifest:
        """The same with other ``verification``, ``evaluation`` ..."""
        return type(self).model_validate({**self.as_json(), **parts})

    @property
    def patches(self) -> list[Patch]:
        """All patches, the latest (without its history) last."""
        latest = Patch.model_validate({key: part for key, part in self.as_json().items() if key != "history"})
        return [*self.history, latest]

    def text(self) -> str:
        """``steering.json`` as it is written."""
        return json.dumps(self.as_json(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
