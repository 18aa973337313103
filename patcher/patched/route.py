"""The ``route`` of ``steering.json`` as types: how the edits are stored."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from patcher.patched.failed_route import FailedRoute
from patcher.patched.part import Number, Part

CAUSAL_LM = "AutoModelForCausalLM"
MOST_BLOCKS = 1 << 20
Layer = Annotated[int, Field(ge=-1, lt=MOST_BLOCKS)]
LayerKey = Annotated[str, Field(pattern=r"^(-1|[0-9]{1,7})$")]


class Tensor(Part):
    """A tensor that holds a vector, see :class:`patcher.routes.plan.TensorWrite`."""

    name: str
    parameter: str | None = None
    kind: str
    layer: Layer
    factor: Number
    dtype: str | None = None
    shape: list[int] | None = None
    offset: Number | None = None
    outer: bool = False
    transposed: bool = False
    spread: bool = False
    index: Annotated[int, Field(ge=0, lt=MOST_BLOCKS)] | None = None
    original: str | None = None


class Zeros(Part):
    """Created tensors of zeros."""

    count: int | None = None
    names: list[str] = []


class Grown(Part):
    """A tensor that has slices of more blocks in the copy, see :class:`patcher.checkpoint.slices.SliceOrder`."""

    axis: Annotated[int, Field(ge=0, lt=8)]
    stored: Annotated[int, Field(ge=1, lt=MOST_BLOCKS)]
    order: list[Annotated[int, Field(ge=0, lt=MOST_BLOCKS)] | None]


class Fit(Part):
    """Of a fitted route: what was measured on held-out calibration text, over all layers and for each."""

    error_mean: Number | None = None
    error_p95: Number | None = None
    cosine: Number | None = None
    mean: Number | None = None
    unfitted_experts: int | None = None
    tokens: int | None = None
    held_out_tokens: int | None = None
    sampled_tokens: int | None = None
    kl_hook_fit: Number | None = None
    kl_hook_base: Number | None = None
    kl_tokens: int | None = None
    ratio: Number | None = None
    layers: dict[str, Fit] = {}


class Constant(Part):
    """Of a carrier whose constant is not exact, see :class:`patcher.routes.constant.ConstantError`."""

    epsilon: Number
    mean_squares: list[Number] | None = None
    set_for: Number | None = None
    typical: Number | None = None
    worst: Number | None = None
    measured_on: str | None = None
    layer: Layer | None = None
    expected: Number | None = None


class NextRoute(Part):
    """The route that would have been next, see :class:`patcher.routes.plan.NextBest`."""

    name: str
    exact: bool = True
    cost: str | None = None
    stacks: dict[str, str] = {}
    constant: Constant | None = None


class RecordedRoute(Part):
    """How the edits are stored, see :class:`patcher.routes.plan.Plan`.

    ``failed_before`` are the exact routes that were tried first, in this order; older manifests have none. ``streams``
    is the number of residual streams, each of which gains the vector; where it is not recorded, there is one.
    ``loader`` is the stock loader of the whole copy; older manifests have none.
    """

    name: str = ""
    exact: bool = True
    cost: str | None = None
    architecture: str = ""
    loader: Annotated[str, Field(pattern=r"^AutoModel[A-Za-z]{1,40}$")] = CAUSAL_LM
    blocks: str | None = None
    tensors: list[Tensor] = []
    zeros: Zeros | None = None
    derived: dict[str, str] = {}
    dropped: list[str] = []
    renamed: dict[str, str] = {}
    grown: dict[str, Grown] = {}
    config_changes: dict[str, Any] = {}
    tokenizer_changes: dict[str, Any] = {}
    stacks: dict[str, str] = {}
    reason: str | None = None
    copy_layers: dict[LayerKey, Layer] = {}
    inserted: dict[LayerKey, list[Layer]] = {}
    residual: str | None = None
    streams: Annotated[int, Field(ge=1, lt=MOST_BLOCKS)] = 1
    warnings: list[str] = []
    advice: list[str] = []
    next_best: NextRoute | None = None
    failed_before: list[FailedRoute] = []
    fit: Fit | None = None
    constant: Constant | None = None
    config_before: dict[str, Any] = {}
    oldest: dict[str, str] = {}

    @property
    def centred(self) -> bool:
        """Whether the copy's residual stream gains the vector less its mean."""
        return self.residual == "centred"

    @property
    def inserted_blocks(self) -> dict[int, int]:
        """Layer of the base -> the block of the copy that was inserted after it and adds the vector, if one was."""
        moved = {int(layer): block for layer, block in self.copy_layers.items()}
        return {layer: block for layer, block in sorted(moved.items()) if block != layer}

    @property
    def new_blocks(self) -> list[int]:
        """All blocks of the copy that were inserted, ascending; those that only keep the others' types as well."""
        several = [block for blocks in self.inserted.values() for block in blocks]
        return sorted({*several, *self.inserted_blocks.values()})

    @property
    def wraps(self) -> bool:
        """Whether the copy is a multimodal model around a text decoder."""
        return self.loader != CAUSAL_LM

    @property
    def has_new_config(self) -> bool:
        """Whether ``config.json`` was written anew: the base's is then kept whole."""
        return bool(self.config_before.keys() - self.config_changes.keys())

    def in_copy(self, layer: int) -> int:
        """The block of the copy after which the residual stream holds the edit of ``layer``."""
        return self.copy_layers.get(str(layer), layer)
