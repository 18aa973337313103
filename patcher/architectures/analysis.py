"""What this model, with this config, is made of: its decoder blocks and the slots that can carry a vector."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import nn

from patcher.architectures.class_listing import ClassListing, findings_about
from patcher.architectures.config_keys import stated
from patcher.architectures.decoder import checkpoint_config, decoder_config, wrapper_of
from patcher.architectures.model_class import (
    as_saved,
    auto_class_of,
    on_meta,
    parameter_aliases,
    parameter_shapes,
    renamed_alone,
    require_decoder,
    saved_names,
    stored_buffers,
    why_config_is_refused,
    with_flags,
)
from patcher.architectures.probe import ProbeResult, flags_change_nothing, probe_slot
from patcher.architectures.quantised import Quantisation, quantisation_of
from patcher.architectures.registry import ModelTypeRow, row_inside, rows
from patcher.architectures.shrink import shrink_config
from patcher.architectures.stand_in import FAILURES, why_it_does_not_run
from patcher.architectures.towers import places_without, towers_of
from patcher.errors.causes import cause_of
from patcher.stacks.names import TRANSFORMERS_ALONE

_T = TypeVar("_T")


@dataclass(frozen=True)
class Slot:
    """A parameter whose content reaches the residual stream after block ``layer`` as a constant.

    Attributes:
        layer: 0-based block index; -1 for the residual stream that enters block 0.
        parameter: its full name in the causal LM class.
        shape: [hidden], or [rows, hidden] where every row (of an embedding, of experts) must carry the vector.
        factor: residual gain per unit of the slot.
        flags: config keys that must be set for the class to create it; empty where it is always there.
        created: every parameter that those flags create in the whole model, with its shape; of tied ones the first.
        times: the parameter whose entries multiply the slot's one by one, where there is one.
    """

    layer: int
    parameter: str
    shape: tuple[int, ...]
    factor: float
    flags: Mapping[str, Any] = field(default_factory=dict)
    created: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    times: str | None = None

    @property
    def site(self) -> str:
        """The module that owns the slot."""
        return self.parameter.rpartition(".")[0]


class Architecture:
    """A causal LM class under one config, looked at without its weights.

    Attributes:
        config: the transformers config of the decoder; of a multimodal wrapper its text config, which remembers it.
        wraps: whether the decoder is inside of a multimodal wrapper.
        class_name: the class that stock software loads.
        model_type: transformers' name of the decoder's architecture.
        blocks: path of the list of decoder blocks.
        block_count: number of decoder blocks.
        hidden: width of the residual stream.
        embeddings: how many token ids it has embeddings for, or None where the class does not say.
        base_prefix: the prefix that checkpoints of the bare model leave out (``transformer``, ``model`` ...).
        parameters: every parameter of the class under this config, with its shape.
        aliases: of tied parameters, the name of the one that a checkpoint stores.
        row: the registry's row, of a decoder inside a wrapper the one for it there; or None for a class that is
            analysed at run time.
        stacks: which stock stacks read the row's slots; of a class without a row, transformers alone.
        loads: which stock stacks load this architecture at all.
    """

    def __init__(self, config: Any, *, trust_remote_code: bool = False) -> None:
        config = decoder_config(config)
        require_decoder(config)
        self._cache: dict[Hashable, Any] = {}
        self._findings = findings_about(config, trust_remote_code=trust_remote_code)
        self.config = config
        self.trust_remote_code = trust_remote_code
        self.model_type = str(config.model_type)
        self.wraps = wrapper_of(config) is not None
        known = row_inside(self.checkpoint_type, self.model_type) if self.wraps else rows().get(self.model_type)
        self.row: ModelTypeRow | None = known
        listing = self.once(("listing",), lambda: ClassListing.of(self._meta, config, self.row), ClassListing)
        self.class_name, self.base_prefix = listing.class_name, listing.base_prefix
        self.parameters, self.aliases = listing.parameters, listing.aliases
        self.blocks, self.block_count = listing.blocks, listing.block_count
        self.hidden = int(config.hidden_size)
        self.embeddings = listing.embeddings
        self.stacks: Mapping[str, str] = TRANSFORMERS_ALONE if self.row is None else self.row.stacks
        self.loads: Mapping[str, str] = TRANSFORMERS_ALONE if self.row is None else self.row.loads

    @property
    def checkpoint_config(self) -> Any:
        """The config of the class that stock software loads."""
        return checkpoint_config(self.config)

    @property
    def checkpoint_type(self) -> str:
        """transformers' name of the whole: of a wrapper its own, else the decoder's."""
        return str(self.checkpoint_config.model_type)

    @functools.cached_property
    def auto_class(self) -> str:
        """The stock loader, such as ``AutoModelForCausalLM``."""
        return auto_class_of(self.config)

    @functools.cached_property
    def _meta(self) -> nn.Module:
        return on_meta(self.config, trust_remote_code=self.trust_remote_code)

    @functools.cached_property
    def buffers(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor that is stored and is no parameter (what experts are chosen by), with its shape."""

        def look() -> dict[str, tuple[int, ...]]:
            return {name: tuple(tensor.shape) for name, tensor in stored_buffers(self._meta).items()}

        return self.once(("buffers",), look, dict[str, tuple[int, ...]])

    @functools.cached_property
    def towers(self) -> tuple[str, ...]:
        """Paths of what no text passes through, of a multimodal wrapper; see :mod:`patcher.architectures.towers`."""
        return self.once(("towers",), lambda: towers_of(self._meta), tuple[str, ...]) if self.wraps else ()

    @functools.cached_property
    def unread(self) -> int:
        """How many parameters are in the towers and not loaded for texts."""
        if not self.towers:
            return 0
        inside = tuple(f"{tower}." for tower in self.towers)
        loaded = places_without(self._meta, self.towers, "cpu")
        return sum(
            math.prod(shape)
            for name, shape in self.parameters.items()
            if name.startswith(inside) and name not in loaded
        )

    @functools.cached_property
    def quantisation(self) -> Quantisation | None:
        """The format that the checkpoint is quantised in, if it is."""
        found = stated(self.config, "quantization_config")
        to_dict = getattr(found, "to_dict", None)
        return quantisation_of({"quantization_config": to_dict() if to_dict else found})

    @functools.cached_property
    def does_not_run(self) -> str | None:
        """What the installed class raises on a prompt of text, on a stand-in without any edit; None where it runs."""

        def test() -> str | None:
            tiny, _ = shrink_config(self.config, 0)
            return why_it_does_not_run(tiny, trust_remote_code=self.trust_remote_code)

        return self.once(("does not run",), test, str | None)

    @property
    def loaded_by(self) -> int:
        """How many of the stock stacks load this architecture at all."""
        return sum(support != "no" for support in self.loads.values())

    def stacks_of(self, slots: Iterable[Slot]) -> Mapping[str, str]:
        """Which stacks read these slots, that the class has in any case.

        The registry says it of the MLP's bias; any other (a norm's) is read by whoever loads the architecture at all.
        """
        stated = self.row.slots if self.row is not None else ()
        of_mlp = all(slot.parameter.removeprefix(f"{self.blocks}.{slot.layer}.") in stated for slot in slots)
        return self.stacks if of_mlp else self.loads

    def native_slot(self, layer: int) -> tuple[Slot | None, str]:
        """The slot that the class has under its own config, or None and why not."""
        return self._first_slot(layer, {})

    def flagged_slot(self, layer: int) -> tuple[Slot | None, str]:
        """The slot that config flags can create, or None and why not. The fewest flags win."""
        why = "the class has no config flag that creates an MLP output bias"
        for flags in self._flag_choices():
            slot, reason = self._first_slot(layer, flags)
            if slot is not None:
                return slot, ""
            names = ", ".join(flags)
            declared = any(stated(self.config, name, ...) is not ... for name in flags)
            if declared or (self.row is not None and self.row.slots):
                why = f"`{names}`: {reason}"
        return None, why

    def attention_slot(self, layer: int) -> tuple[Slot | None, str]:
        """An attention output bias that shifts the residual stream by a constant, or None and why not."""
        flags: list[dict[str, Any]] = [{}]
        flags += [{name: True} for name, value in vars(self.config).items() if value is False and "bias" in name]
        for chosen in flags:
            slot, _ = self._first_slot(layer, chosen, attention=True)
            if slot is not None:
                return slot, ""
        return None, "no attention output bias is a constant shift: there is none, or the block's MLP reads it too"

    def saved_names(self, parameters: Iterable[str]) -> dict[str, str]:
        """Parameter -> the name under which transformers stores it, for parameters of any flags."""
        names = tuple(parameters)
        if len(names) == 1 and names[0] in self._saved_together:
            return {names[0]: self._saved_together[names[0]]}
        kind = dict[str, str]
        return dict(self.once(("saved names", *names), lambda: saved_names(self._meta, names), kind))

    def saved_beside(self, module: str) -> tuple[str, ...]:
        """The names under which transformers stores what is in the module around ``module``, all of it at once."""

        def look() -> tuple[str, ...]:
            around = module.rpartition(".")[0] + "."
            state = {name: tensor for name, tensor in self._meta.state_dict().items() if name.startswith(around)}
            return tuple(as_saved(self._meta, state) or state)

        return self.once(("saved beside", module), look, tuple[str, ...])

    @functools.cached_property
    def _saved_together(self) -> Mapping[str, str]:
        """The same of the class's own parameters, of each whose name does not depend on what it is stored with."""
        # Fused experts are stored in parts, and with one of them the library says nothing of all the others.
        names = [name for name, shape in self.parameters.items() if len(shape) < 3]
        return self.once(("saved together",), lambda: renamed_alone(self._meta, names), dict[str, str])

    def _flag_choices(self) -> Iterator[dict[str, Any]]:
        if self.row is not None and self.row.slots:
            wanted = {name: value for name, value in self.row.flags.items() if self._differs(name, value)}
            for size in range(1, len(wanted) + 1):
                for names in itertools.combinations(wanted, size):
                    yield {name: wanted[name] for name in names}
        else:
            for name, value in vars(self.config).items():
                if value is False and "bias" in name and "attention" not in name:
                    yield {name: True}

    def _differs(self, name: str, value: Any) -> bool:
        return bool(stated(self.config, name) != value)

    def _first_slot(self, layer: int, flags: dict[str, Any], *, attention: bool = False) -> tuple[Slot | None, str]:
        also = dict(self.row.also) if self.row is not None and flags else {}
        if flags and (refused := self._why_refused({**flags, **also})) is not None:
            return None, f"transformers does not load a config with {', '.join(flags)}: {refused}"
        shapes, aliases = self._parameters_with(tuple(sorted(flags.items())))
        reasons = []
        for slot_name in self._attention_biases(layer, shapes) if attention else self._candidates(layer, shapes):
            parameter = f"{self.blocks}.{layer}.{slot_name}"
            if flags and parameter in self.parameters:
                continue
            if parameter in aliases or parameter in aliases.values():
                reasons.append(f"`{slot_name}` is one tensor that several blocks share")
                continue
            result = self.probe(layer, slot_name, flags)
            factor = self.stated_factor(self.config)
            if not (result.constant and factor is not None and self._agrees(result, layer, flags)):
                why = result.reason or f"its factor is {result.factor:.4g}, and the registry has no rule for it"
                reasons.append(f"`{slot_name}` is no constant shift of the residual stream: {why}")
                continue
            if flags and not self._neutral(layer, {**flags, **also}):
                named = ", ".join(flags)
                reasons.append(f"setting {named} changes more than it adds: with zeros the model computes otherwise")
                continue
            lost = sorted(set(self.parameters) - set(shapes))
            if lost:
                reasons.append(f"setting {', '.join(flags)} removes {lost[0]}")
                continue
            created = {
                name: shape for name, shape in shapes.items() if name not in self.parameters and name not in aliases
            }
            times = None if result.times is None else f"{self.blocks}.{layer}.{result.times}"
            return Slot(layer, parameter, shapes[parameter], factor, {**flags, **also}, created, times), ""
        none = f"the class creates no bias after this block's {'attention' if attention else 'MLP'}"
        return None, max(reasons, key=lambda reason: "not causal" in reason) if reasons else none

    def stated_factor(self, config: Any) -> float | None:
        """Residual gain per unit of a slot under ``config``, by the row's rule; None where the rule does not fit it."""
        if self.row is None:
            return 1.0
        try:
            return self.row.factor(config)
        except (AttributeError, TypeError, ValueError, LookupError, ArithmeticError):
            # Another release of transformers may call the key otherwise; then nothing is known.
            return None

    def _agrees(self, result: ProbeResult, layer: int, flags: dict[str, Any]) -> bool:
        # The rule is tested where it can be measured, on the stand-in; then it is applied to the real config.
        tiny, _ = shrink_config(with_flags(self.config, flags), layer)
        stated = self.stated_factor(tiny)
        return stated is not None and math.isclose(result.factor, stated, rel_tol=1e-3)

    def _why_refused(self, flags: Mapping[str, Any]) -> str | None:
        key = ("refused", *sorted(flags.items()))
        return self.once(key, lambda: why_config_is_refused(self.config, flags), str | None)

    def _neutral(self, layer: int, flags: Mapping[str, Any]) -> bool:
        def test() -> bool:
            tiny, _ = shrink_config(self.config, layer)
            return flags_change_nothing(tiny, flags, trust_remote_code=self.trust_remote_code)

        return self.once(("neutral", self.kind(layer), *sorted(flags.items())), test, bool, layer)

    def _candidates(self, layer: int, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
        # An attention output bias also feeds the MLP of a sequential block; the parallel case is a route of its own.
        found = [name for name in self._biases(layer, shapes) if not _of_attention(name)]
        if self.row is None or not self.row.slots:
            return found
        stated = [slot for slot in self.row.slots if f"{self.blocks}.{layer}.{slot}" in shapes]
        # Where a norm ends the block (post-LN), its bias takes the vector.
        return stated + [name for name in found if "norm" in name and name not in stated]

    def _attention_biases(self, layer: int, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
        return [name for name, shape in self._biases(layer, shapes).items() if _of_attention(name) and len(shape) == 1]

    def _biases(self, layer: int, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Biases of a block as wide as the residual stream, the last (of an output projection) first."""
        prefix = f"{self.blocks}.{layer}."
        return {
            name.removeprefix(prefix): shape
            for name, shape in list(shapes.items())[::-1]
            if name.startswith(prefix) and name.endswith("bias") and len(shape) <= 2 and shape[-1] == self.hidden
        }

    def _parameters_with(
        self, flags: tuple[tuple[str, Any], ...]
    ) -> tuple[Mapping[str, tuple[int, ...]], Mapping[str, str]]:
        def look() -> tuple[Mapping[str, tuple[int, ...]], Mapping[str, str]]:
            meta = on_meta(self.config, dict(flags), trust_remote_code=self.trust_remote_code)
            return parameter_shapes(meta), parameter_aliases(meta)

        kind = tuple[dict[str, tuple[int, ...]], dict[str, str]]
        return self.once(("parameters", *flags), look, kind) if flags else (self.parameters, self.aliases)

    def probe(self, layer: int, slot_name: str, flags: Mapping[str, Any]) -> ProbeResult:
        """Probe ``slot_name`` on a tiny stand-in of this config; see :mod:`patcher.architectures.probe`."""

        def measure() -> ProbeResult:
            try:
                tiny, stand_in = shrink_config(with_flags(self.config, flags), layer)
                return probe_slot(tiny, self.blocks, slot_name, stand_in, trust_remote_code=self.trust_remote_code)
            except FAILURES as error:
                return ProbeResult.refused(f"the probe could not run on a stand-in ({cause_of(error)})")

        return self.once(("probe", self.kind(layer), slot_name, *sorted(flags.items())), measure, ProbeResult, layer)

    def once(self, key: Hashable, make: Callable[[], _T], kind: Any = None, layer: int | None = None) -> _T:
        """What ``make`` returned when it was first asked for under this key.

        Args:
            kind: the type of plain data that it is; then it is kept between runs, see
                :class:`patcher.disk.findings.Findings`.
            layer: that was looked at for it. Another run may have to look at another one of its kind.
        """
        if key not in self._cache:
            self._cache[key] = make() if kind is None else self._findings.once([key, layer], kind, make)
        found: _T = self._cache[key]
        return found

    def kind(self, layer: int) -> tuple[str, ...]:
        """What tells the types of blocks apart: the parameters, and the entry in the config's list of types."""
        prefix = f"{self.blocks}.{layer}."
        names = tuple(sorted(name.removeprefix(prefix) for name in self.parameters if name.startswith(prefix)))
        types = stated(self.config, "layer_types")
        return (*names, str(types[layer]) if isinstance(types, list) and layer < len(types) else "")


def _of_attention(name: str) -> bool:
    return "attn" in name or "attention" in name
