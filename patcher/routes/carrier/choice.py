"""Which block to insert for an edit: its type, its content, and the config that creates it."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from patcher.architectures.analysis import Architecture
from patcher.architectures.model_class import on_meta, submodule, with_flags
from patcher.errors import InputError
from patcher.errors.causes import cause_of
from patcher.routes.carrier.guard import block_kinds, require_neutral
from patcher.routes.carrier.insertion import CannotInsert, Insertion, insert_blocks
from patcher.routes.carrier.probe import Form, find_forms, why_none
from patcher.routes.carrier.trial import InsertionTrial, Stage

_MOST_TYPES = 6
_SIZE_DEPENDENT = ("attn", "attention", "mamba", "conv", "rotary", "indexer", "mixer")


@dataclass(frozen=True)
class Choice:
    """What is inserted.

    Attributes:
        insertion: the extended config, with the flags.
        forms: layer -> the content of the block after it.
        trials: layer -> the stand-in on which that was proven, made when it is asked for.
        keys: layer -> what tells the proofs of its stand-in from those of others.
        flags: config keys that the contents need.
        base: the base's class on meta.
        extended: the extended class on meta, with the flags.
    """

    insertion: Insertion
    forms: Mapping[int, Form]
    trials: Mapping[int, Callable[[], InsertionTrial]]
    keys: Mapping[int, Hashable]
    flags: Mapping[str, Any]
    base: nn.Module
    extended: nn.Module


def choose_insertion(
    architecture: Architecture, layers: Sequence[int], stages: Iterable[Stage] | None = None
) -> Choice:
    """The first block type and content that are proven for every layer.

    Args:
        architecture: the stock class under this config.
        layers: the blocks after which the residual must gain a vector.
        stages: what is looked for, in this order; by default everything, and what needs a config flag comes last.

    Raises:
        CannotInsert: there is none; the text says why.
    """
    base = on_meta(architecture.config, trust_remote_code=architecture.trust_remote_code)
    search = _Search(architecture, base)
    reasons: dict[str, None] = {}
    for stage in stages or search.stages():
        try:
            return search.all_layers(sorted(set(layers)), stage)
        except CannotInsert as finding:
            if str(finding) not in search.uninformative:
                reasons[str(finding)] = None
    raise CannotInsert("; ".join(list(reasons)[:3]) or "no content of an inserted block makes its output constant")


class _Search:
    uninformative = ("the config cannot make a single block of it dense",)

    def __init__(self, architecture: Architecture, base: nn.Module) -> None:
        self.architecture, self.base = architecture, base
        self.config, self.trust = architecture.config, architecture.trust_remote_code
        self.kinds = block_kinds(base, architecture.blocks)
        self._trials: dict[Any, InsertionTrial] = {}
        self._last: tuple[Any, tuple[Insertion, nn.Module]] | None = None

    def stages(self) -> Iterator[Stage]:
        yield Stage()
        yield Stage(dense=True)
        yield Stage(narrow=True)
        for name, value in vars(self.config).items():
            if value is False and "bias" in name:
                yield Stage(flags=((name, True),))

    def all_layers(self, layers: Sequence[int], stage: Stage) -> Choice:
        chosen = {layer: self._one_layer(layer, stage) for layer in layers}
        templates = {layer: template for layer, (template, _) in chosen.items()}
        insertion, extended = self._inserted(tuple(layers), templates, stage)
        forms = {layer: form for layer, (_, form) in chosen.items()}
        trials = {layer: self._trial_of(templates[layer], stage, forms[layer]) for layer in chosen}
        keys: dict[int, Hashable] = {layer: (templates[layer], stage) for layer in chosen}
        return Choice(insertion, forms, trials, keys, dict(stage.flags), self.base, extended)

    def _inserted(
        self, layers: tuple[int, ...], templates: Mapping[int, int], stage: Stage
    ) -> tuple[Insertion, nn.Module]:
        key = (layers, tuple(templates.items()), stage)
        if self._last is None or key != self._last[0]:
            self._last = key, self._insert(layers, templates, stage)
        return self._last[1]

    def _insert(
        self, layers: tuple[int, ...], templates: Mapping[int, int], stage: Stage
    ) -> tuple[Insertion, nn.Module]:
        insertion = insert_blocks(self.config, layers, templates, dense=stage.dense)
        extended = require_neutral(self.base, insertion, self.architecture.blocks, trust_remote_code=self.trust)
        if stage.flags:
            flagged = with_flags(insertion.config, dict(stage.flags))
            extended = on_meta(flagged, trust_remote_code=self.trust)
            changes = {**insertion.changes, **dict(stage.flags)}
            insertion = replace(insertion, config=flagged, changes=changes)
        return insertion, extended

    def _one_layer(self, layer: int, stage: Stage) -> tuple[int, Form]:
        why = ""
        for template in self._templates(layer):
            try:
                insertion, extended = self._inserted((layer,), {layer: template}, stage)
                block = submodule(extended, f"{self.architecture.blocks}.{insertion.copy_layers[layer]}")
                form = self._form(template, stage, block)
                self._require_proof(layer, template, stage, form)
                return template, form
            except CannotInsert as finding:
                why = why or str(finding)
        raise CannotInsert(why)

    def _templates(self, layer: int) -> list[int]:
        count = self.architecture.block_count
        near = [layer, min(layer + 1, count - 1), *(self.kinds.index(kind) for kind in dict.fromkeys(self.kinds))]
        by_kind = {self.kinds[block]: block for block in reversed(near)}
        return sorted(by_kind.values(), key=near.index)[:_MOST_TYPES]

    def _form(self, template: int, stage: Stage, block: nn.Module) -> Form:
        def search() -> Form | str:
            try:
                return self._search(template, stage, block)
            except CannotInsert as finding:
                return str(finding)
            except (InputError, RuntimeError, ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
                return f"a stand-in of it does not run ({cause_of(error)})"

        key = ("carrier form", repr(self.kinds[template]), stage)
        found = self.architecture.once(key, search, Form | str, template)
        if isinstance(found, str):
            raise CannotInsert(found)
        return found

    def _search(self, template: int, stage: Stage, block: nn.Module) -> Form:
        shapes = {name: tuple(tensor.shape) for name, tensor in block.state_dict().items()}
        trial = self._trial(template, stage)
        weights = {name for name, tensor in block.state_dict().items() if tensor.is_floating_point()}
        lacking = sorted(trial.parameters.keys() ^ weights)
        if lacking:
            raise CannotInsert(f"its stand-in is built otherwise (`{lacking[0]}`)")
        _require_same_factors(trial, block)
        form = next(find_forms(trial, shapes, self.architecture.hidden), None)
        if form is None:
            raise CannotInsert(why_none(trial))
        if _of_experts(trial, form) and form.carrier == form.sink:
            # What an expert weighs may depend on how many there are.
            trial = self._trial(template, stage, all_experts=True)
            again = find_forms(trial, shapes, self.architecture.hidden)
            form = next((found for found in again if found.sink == form.sink), None)
            if form is None:
                raise CannotInsert("with all experts its output is no constant")
        return form

    def _require_proof(self, layer: int, template: int, stage: Stage, form: Form) -> None:
        """The whole model again, as deep as the real one, with the block where it will be."""

        def why() -> str | None:
            try:
                self._prove(layer, template, stage, form)
            except CannotInsert as finding:
                return str(finding)
            return None

        reason = self.architecture.once(("carrier proof", layer, template, stage), why, str | None)
        if reason is not None:
            raise CannotInsert(reason)

    def _prove(self, layer: int, template: int, stage: Stage, form: Form) -> None:
        trial = self._trial(template, stage)
        deep = self._trial(template, stage, all_experts=_of_experts(trial, form), after=layer)
        if deep.parameters.keys() != trial.parameters.keys():
            raise CannotInsert("in a stand-in of full depth its block is of another type")
        difference, effect, largest = deep.prove(form.fills)
        if not difference <= 1e-4 * max(1.0, largest) or not difference <= 2e-3 * effect:
            raise CannotInsert(
                f"in a stand-in of full depth the model then differs from the hook by {difference / effect:.1%} of its "
                "effect: the class computes something from a block's index"
            )

    def _trial_of(self, template: int, stage: Stage, form: Form) -> Callable[[], InsertionTrial]:
        """The stand-in on which a form was found, or one like it of another block of the same kind."""

        def trial() -> InsertionTrial:
            made = self._trial(template, stage)
            many = _of_experts(made, form) and form.carrier == form.sink
            return self._trial(template, stage, all_experts=True) if many else made

        return trial

    def _trial(
        self, template: int, stage: Stage, *, all_experts: bool = False, after: int | None = None
    ) -> InsertionTrial:
        key = (template, stage, all_experts, after)
        if key not in self._trials:
            options: dict[str, Any] = {"all_experts": all_experts, "after": after, "trust_remote_code": self.trust}
            self._trials[key] = InsertionTrial(self.config, self.architecture.blocks, template, stage, **options)
        return self._trials[key]


def _of_experts(trial: InsertionTrial, form: Form) -> bool:
    return trial.parameters[form.sink].ndim == 3


def _require_same_factors(trial: InsertionTrial, block: nn.Module) -> None:
    """A factor that is computed from sizes was measured wrongly on a stand-in."""
    small = dict(trial.block.named_modules())
    for path, module in block.named_modules():
        if any(word in path for word in _SIZE_DEPENDENT):
            continue
        for name, value in vars(module).items():
            number = isinstance(value, float) and math.isfinite(value) and not name.startswith("_")
            if number and vars(small[path]).get(name) != value:
                raise CannotInsert(f"`{f'{path}.{name}'.strip('.')}` depends on the model's size")
