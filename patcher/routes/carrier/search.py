"""The search for the block to insert: types and contents are tried in turn, and what is chosen is proven."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from patcher.architectures.analysis import Architecture
from patcher.architectures.config_keys import EXPERTS_PER_TOKEN
from patcher.architectures.model_class import on_meta, submodule, with_flags
from patcher.errors import InputError
from patcher.errors.causes import cause_of
from patcher.routes.carrier.choice import Block, Choice
from patcher.routes.carrier.grown import grown_tensors
from patcher.routes.carrier.guard import block_kinds, require_neutral
from patcher.routes.carrier.insertion import (
    CannotInsert,
    Insertion,
    MovesOthers,
    continued,
    insert_blocks,
    pattern_length,
)
from patcher.routes.carrier.neutral import neutral_fills
from patcher.routes.carrier.pinned import find_pinned
from patcher.routes.carrier.probe import TOLERANCE, Form, constant_gain, find_forms, why_none
from patcher.routes.carrier.readers import SHARING
from patcher.routes.carrier.shared import find_shared
from patcher.routes.carrier.trial import InsertionTrial, Stage

_MOST_TYPES = 6
_SIZE_DEPENDENT = ("attn", "attention", "mamba", "conv", "rotary", "indexer", "mixer")


@dataclass(frozen=True)
class _Row:
    """What is inserted after one layer.

    Attributes:
        types: the base's blocks whose types the inserted ones have.
        carrier: which of them holds the vector, with the content ``form``.
        idle: number of another one -> the content under which it does nothing.
    """

    types: tuple[int, ...]
    carrier: int
    form: Form
    idle: Mapping[int, Form]


def choose_insertion(
    architecture: Architecture,
    layers: Sequence[int],
    stages: Iterable[Stage] | None = None,
    *,
    number: int = 1,
    lossless: bool = False,
) -> Choice:
    """The first block type and content that are proven for every layer.

    Args:
        architecture: the stock class under this config.
        layers: the blocks after which the residual must gain a vector.
        stages: what is looked for, in this order; by default everything, and what needs a config flag comes last.
        number: how many blocks are inserted after each layer. Of several, one holds the vector and the others do
            nothing; they go on with the pattern of types that the base's blocks have.
        lossless: only contents whose constant loses nothing, however small the residual stream is.

    Raises:
        MovesOthers: there is none as long as so many blocks are inserted.
        CannotInsert: there is none; the text says why.
    """
    base = on_meta(architecture.config, trust_remote_code=architecture.trust_remote_code)
    search = _Search(architecture, base, number, lossless=lossless)
    reasons: dict[str, None] = {}
    kind = CannotInsert
    for stage in stages or search.stages():
        try:
            return search.all_layers(sorted(set(layers)), stage)
        except CannotInsert as finding:
            if str(finding) not in search.uninformative:
                reasons[str(finding)] = None
                kind = MovesOthers if isinstance(finding, MovesOthers) else kind
    raise kind("; ".join(list(reasons)[:3]) or "no content of an inserted block makes its output constant")


def length_of_pattern(architecture: Architecture) -> int | None:
    """After how many blocks the types of this model's blocks repeat themselves, or None."""
    base = on_meta(architecture.config, trust_remote_code=architecture.trust_remote_code)
    return pattern_length(block_kinds(base, architecture.blocks))


class _Search:
    uninformative = ("the config cannot make a single block of it dense",)

    def __init__(self, architecture: Architecture, base: nn.Module, number: int, *, lossless: bool = False) -> None:
        self.architecture, self.base, self.number, self.lossless = architecture, base, number, lossless
        self.config, self.trust = architecture.config, architecture.trust_remote_code
        self.kinds = block_kinds(base, architecture.blocks)
        self._trials: dict[Any, InsertionTrial] = {}
        self._last: tuple[Any, tuple[Insertion, nn.Module]] | None = None

    def stages(self) -> Iterator[Stage]:
        selected = self._selected()
        shared = (Stage(split=selected), Stage(split=1, narrow=True)) if selected > 1 else ()
        first = any(self.config.model_type in types for types in SHARING.values())
        if shared:
            # Blocks of another type than their neighbours are what other stacks may not read.
            yield Stage(near=True)
        yield from shared if first else ()
        yield Stage()
        yield Stage(dense=True)
        yield from () if first else shared
        yield Stage(narrow=True)
        for name, value in vars(self.config).items():
            if value is False and "bias" in name:
                yield Stage(flags=((name, True),))

    def _selected(self) -> int:
        """How many experts a token uses, where all blocks agree."""
        for name in EXPERTS_PER_TOKEN:
            stated = vars(self.config).get(name)
            counts = set(stated) if isinstance(stated, (list, tuple)) else {stated}
            if len(counts) == 1 and isinstance(count := counts.pop(), int):
                return count
        return 0

    def all_layers(self, layers: Sequence[int], stage: Stage) -> Choice:
        rows = {layer: self._one_layer(layer, stage) for layer in layers}
        insertion, extended = self._inserted(
            {layer: row.types for layer, row in rows.items()},
            {layer: row.carrier for layer, row in rows.items()},
            stage,
        )
        forms = {layer: row.form for layer, row in rows.items()}
        blocks = {}
        for layer, places in insertion.inserted.items():
            row = rows[layer]
            for number, (place, template) in enumerate(zip(places, row.types, strict=True)):
                form = row.form if number == row.carrier else row.idle[number]
                key = (template, stage, self.lossless)
                blocks[place] = Block(form, self._trial_of(template, stage, form), key, template)
        grown = grown_tensors(self.base, extended, insertion, self.architecture.blocks)
        return Choice(insertion, forms, blocks, dict(stage.flags), self.base, extended, grown)

    def _inserted(
        self, types: Mapping[int, tuple[int, ...]], carriers: Mapping[int, int], stage: Stage
    ) -> tuple[Insertion, nn.Module]:
        key = (tuple(types.items()), tuple(carriers.items()), stage)
        if self._last is None or key != self._last[0]:
            self._last = key, self._insert(types, carriers, stage)
        return self._last[1]

    def _insert(
        self, types: Mapping[int, tuple[int, ...]], carriers: Mapping[int, int], stage: Stage
    ) -> tuple[Insertion, nn.Module]:
        insertion = insert_blocks(self.config, list(types), types, dense=stage.dense, carriers=carriers)
        extended = require_neutral(self.base, insertion, self.architecture.blocks, trust_remote_code=self.trust)
        if stage.flags:
            flagged = with_flags(insertion.config, dict(stage.flags))
            extended = on_meta(flagged, trust_remote_code=self.trust)
            changes = {**insertion.changes, **dict(stage.flags)}
            insertion = replace(insertion, config=flagged, changes=changes)
        return insertion, extended

    def _one_layer(self, layer: int, stage: Stage) -> _Row:
        why, moves = "", False
        for types, carrier in self._candidates(layer, near=stage.near):
            try:
                insertion, extended = self._inserted({layer: types}, {layer: carrier}, stage)
                places = insertion.inserted[layer]
                block = [submodule(extended, f"{self.architecture.blocks}.{place}") for place in places]
                form = self._form(types[carrier], stage, block[carrier])
                others = (number for number in range(len(types)) if number != carrier)
                idle = {number: self._idle(types[number], stage, block[number]) for number in others}
                row = _Row(types, carrier, form, idle)
                self._require_proof(layer, row, stage)
                return row
            except CannotInsert as finding:
                why, moves = why or str(finding), moves or isinstance(finding, MovesOthers)
        raise (MovesOthers if moves else CannotInsert)(why)

    def _candidates(self, layer: int, *, near: bool) -> list[tuple[tuple[int, ...], int]]:
        """Types of the inserted blocks, and which of them is to hold the vector."""
        if self.number == 1:
            return [((template,), 0) for template in self._templates(layer, near=near)]
        types = continued(layer, self.number, self.architecture.block_count)
        kinds = [self.kinds[block] for block in types]
        return [(types, kinds.index(kind)) for kind in dict.fromkeys(kinds)]

    def _templates(self, layer: int, *, near: bool) -> list[int]:
        count = self.architecture.block_count
        others = [] if near else [self.kinds.index(kind) for kind in dict.fromkeys(self.kinds)]
        order = [layer, min(layer + 1, count - 1), *others]
        by_kind = {self.kinds[block]: block for block in reversed(order)}
        return sorted(by_kind.values(), key=order.index)[:_MOST_TYPES]

    def _form(self, template: int, stage: Stage, block: nn.Module) -> Form:
        def search() -> Form | str:
            try:
                return self._search(template, stage, block)
            except CannotInsert as finding:
                return str(finding)
            except (InputError, RuntimeError, ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
                return f"a stand-in of it does not run ({cause_of(error)})"

        key = ("carrier form", repr(self.kinds[template]), stage, self.lossless)
        found = self.architecture.once(key, search, Form | str, template)
        if isinstance(found, str):
            raise CannotInsert(found)
        return found

    def _search(self, template: int, stage: Stage, block: nn.Module) -> Form:
        shapes = {name: tuple(tensor.shape) for name, tensor in block.state_dict().items()}
        trial = self._trial(template, stage)
        lacking = _lacking(trial, block)
        if lacking:
            raise CannotInsert(f"its stand-in is built otherwise (`{lacking[0]}`)")
        factors = _factors_of_size(trial, block)
        hidden = self.architecture.hidden
        if stage.split and stage.narrow:
            forms = find_shared(trial, shapes, hidden)
        elif stage.split:
            forms = find_pinned(trial, shapes, hidden, stage.split)
        else:
            forms = find_forms(trial, shapes, hidden)
        form = next(self._wanted(forms, trial, factors), None)
        if form is None:
            named = next(iter(factors), None)
            raise CannotInsert(
                why_none(trial) if named is None else f"`{'.'.join(named).strip('.')}` depends on the model's size"
            )
        if _of_experts(trial, form) and form.carrier == form.sink and not stage.split:
            # What an expert weighs may depend on how many there are.
            trial = self._trial(template, stage, all_experts=True)
            again = self._wanted(find_forms(trial, shapes, hidden), trial, factors)
            form = next((found for found in again if found.sink == form.sink), None)
            if form is None:
                raise CannotInsert("with all experts its output is no constant")
        return form

    def _wanted(
        self, forms: Iterator[Form], trial: InsertionTrial, factors: Mapping[tuple[str, str], float]
    ) -> Iterator[Form]:
        for form in forms:
            if not (self.lossless and form.loss.epsilon) and _holds_under(trial, form, factors):
                yield form

    def _idle(self, template: int, stage: Stage, block: nn.Module) -> Form:
        """The content under which a block of this type does nothing."""

        def search() -> Form | str:
            trial = self._trial(template, stage)
            if lacking := _lacking(trial, block):
                return f"its stand-in is built otherwise (`{lacking[0]}`)"
            fills = neutral_fills(trial)
            return why_none(trial) if fills is None else Form(fills, "", "", "", 1.0)

        found = self.architecture.once(("idle form", repr(self.kinds[template]), stage), search, Form | str, template)
        if isinstance(found, str):
            raise CannotInsert(found)
        return found

    def _require_proof(self, layer: int, row: _Row, stage: Stage) -> None:
        """The whole model again, as deep as the real one, with the blocks where they will be."""

        def why() -> str | None:
            try:
                self._prove(layer, row, stage)
            except CannotInsert as finding:
                return str(finding)
            return None

        place: tuple[Any, ...] = (layer, row.types[row.carrier], stage, self.lossless)
        several = (row.types, row.carrier) if len(row.types) > 1 else ()
        reason = self.architecture.once(("carrier proof", *place, *several), why, str | None)
        if reason is not None:
            raise CannotInsert(reason)

    def _prove(self, layer: int, row: _Row, stage: Stage) -> None:
        template, form = row.types[row.carrier], row.form
        trial = self._trial(template, stage)
        many = _of_experts(trial, form)
        several = row.types if len(row.types) > 1 else ()
        deep = self._trial(template, stage, all_experts=many, after=layer, types=several, carrier=row.carrier)
        if deep.parameters.keys() != trial.parameters.keys():
            raise CannotInsert("in a stand-in of full depth its block is of another type")
        for number, idle in row.idle.items():
            deep.set_beside(number, idle.fills)
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
            many = bool(form.carrier) and _of_experts(made, form) and form.carrier == form.sink and not stage.split
            return self._trial(template, stage, all_experts=True) if many else made

        return trial

    def _trial(
        self,
        template: int,
        stage: Stage,
        *,
        all_experts: bool = False,
        after: int | None = None,
        types: tuple[int, ...] = (),
        carrier: int = 0,
    ) -> InsertionTrial:
        key = (template, stage, all_experts, after, types, carrier)
        if key not in self._trials:
            options: dict[str, Any] = {"all_experts": all_experts, "after": after, "trust_remote_code": self.trust}
            options |= {"types": types, "carrier": carrier}
            try:
                self._trials[key] = InsertionTrial(self.config, self.architecture.blocks, template, stage, **options)
            except CannotInsert:
                if self.number == 1 or after is not None:
                    raise
                # A single block more would make others of another type in a small stand-in as well (Jamba).
                self._trials[key] = trial = InsertionTrial(
                    self.config, self.architecture.blocks, template, stage, **{**options, **self._in_pattern(template)}
                )
                trial.rest_idle(neutral_fills)
        return self._trials[key]

    def _in_pattern(self, template: int) -> dict[str, Any]:
        """After which block, among which types and as which of them a block like this one can be inserted."""
        count = self.architecture.block_count
        for after in range(count):
            types = continued(after, self.number, count)
            alike = [number for number, block in enumerate(types) if self.kinds[block] == self.kinds[template]]
            if alike:
                return {"after": after, "types": types, "carrier": alike[0]}
        raise CannotInsert("no block of its type is part of the pattern of types")


def _lacking(trial: InsertionTrial, block: nn.Module) -> list[str]:
    """The weights that only one of the stand-in's block and the real one has."""
    weights = {name for name, tensor in block.state_dict().items() if tensor.is_floating_point()}
    return sorted(trial.parameters.keys() ^ weights)


def _of_experts(trial: InsertionTrial, form: Form) -> bool:
    return trial.parameters[form.sink].ndim == 3


def _factors_of_size(trial: InsertionTrial, block: nn.Module) -> dict[tuple[str, str], float]:
    """Module and attribute -> the real model's value, of factors that the class computes from the model's sizes."""
    small, found = dict(trial.block.named_modules()), {}
    for path, module in block.named_modules():
        if any(word in path for word in _SIZE_DEPENDENT):
            continue
        for name, value in vars(module).items():
            number = isinstance(value, float) and math.isfinite(value) and not name.startswith("_")
            if number and vars(small[path]).get(name) != value:
                found[path, name] = value
    return found


def _holds_under(trial: InsertionTrial, form: Form, factors: Mapping[tuple[str, str], float]) -> bool:
    """Whether the block adds the vector under the real model's factors as well, so that none of them counts."""
    small = dict(trial.block.named_modules())
    before = {(path, name): vars(small[path]).get(name) for path, name in factors}
    try:
        for (path, name), value in factors.items():
            setattr(small[path], name, value)
        found = constant_gain(trial, form.fills, trial.vector) if factors else (1.0, 0.0)
        return found is not None and abs(found[0] - 1.0) <= TOLERANCE
    finally:
        for (path, name), old in before.items():
            setattr(small[path], name, old)
