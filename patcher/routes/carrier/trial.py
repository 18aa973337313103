"""A tiny base, and its extension by one block whose content can be set and whose effect can be measured."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from patcher.architectures.config_keys import (
    EXPERT_GROUPS,
    EXPERTS,
    EXPERTS_PER_TOKEN,
    IDLE_EXPERTS,
    block_count,
    stated,
    whole_number,
)
from patcher.architectures.model_class import quiet_transformers, submodule, with_flags
from patcher.architectures.residual import attached, mean_stream, streams_of
from patcher.architectures.shrink import HIDDEN, NARROW, WIDE, kept_layers, sharing_kinds, shrink_config
from patcher.architectures.stand_in import RandomStandIn, build_stand_in, logits_of, run_on
from patcher.capture.forward import Enough
from patcher.routes.carrier.fills import Fill, content
from patcher.routes.carrier.grown import grown_tensors
from patcher.routes.carrier.insertion import CannotInsert, Insertion, insert_blocks, names_blocks
from patcher.routes.constant import moments_of

_PERIOD = re.compile(r"_(period|offset|step)$")
_DENSE_BLOCKS = ("mlp_only_layers",)
_INNER_SIZES = ("intermediate", "ffn_hidden", "n_inner", "ffn_dim", "dim_ff")
SCALES = (0.3, 3.0, 100.0)


@dataclass(frozen=True)
class Stage:
    """One way to look for a content of the inserted block.

    Attributes:
        dense: give it a dense MLP where others have experts.
        narrow: look for contents that serve an MLP of fewer than two neurons a coordinate.
        near: only types of the steered block and of the one after it.
        split: among how many experts, the selected ones, the coordinates are split; 0: not at all; 1 and ``narrow``:
            between all experts, of equal contents, and one that every token uses.
        flags: config keys, and what they are set to.
    """

    dense: bool = False
    narrow: bool = False
    near: bool = False
    split: int = 0
    flags: tuple[tuple[str, Any], ...] = ()


class InsertionTrial:
    """The tiny base of one block type, extended after that block.

    Attributes:
        model: the extended class, with the base's random weights in all blocks but the inserted one.
        base: the tiny base.
        insertion: of the tiny config.
        place: index of the inserted block that is to hold the vector.
        parameters: name in the block -> what the inserted block has there.
        template: the same of its template, unchanged.
        hidden: width of the stand-in's residual stream.
        leak: what the block adds to residuals of scale 1 without any content, where it mixes several streams.
        narrow: whether its MLPs have fewer than two neurons a coordinate.

    Without ``after`` the stand-in has a few blocks, and the insertion comes after the template. With it the stand-in
    is as deep as the real model, so that whatever a class computes from a block's index is what it computes there.
    ``types`` are then those of all blocks that are inserted, of which ``template`` is number ``carrier``.
    """

    def __init__(
        self,
        config: Any,
        blocks: str,
        template: int,
        stage: Stage = Stage(),
        *,
        all_experts: bool = False,
        after: int | None = None,
        types: tuple[int, ...] = (),
        carrier: int = 0,
        trust_remote_code: bool = False,
    ) -> None:
        inner = NARROW if stage.narrow else _shared_width(stage.split) if stage.split else WIDE
        tiny, layer = stand_in_config(config, template, inner, all_experts=all_experts or bool(stage.split))
        like = layer
        if after is not None:
            tiny, layer, like = as_deep(tiny, config, template), after, template
            if len(types) > 1:
                take_pattern(tiny, config)
        elif _is_read_by_others(tiny, like):
            # Behind it the inserted block would be read instead.
            layer = like - 1
        self.blocks, self.layer, self.hidden, self.narrow = blocks, layer, HIDDEN, inner < 2 * HIDDEN
        self.insertion: Insertion = insert_blocks(
            tiny, [layer], {layer: types or like}, dense=stage.dense, carriers={layer: carrier}
        )
        self.place = self.insertion.copy_layers[layer]
        stand_in = RandomStandIn.of(tiny, trust_remote_code=trust_remote_code)
        self.base, self.ids = stand_in.model, stand_in.ids
        self.model = build_stand_in(
            with_flags(self.insertion.config, dict(stage.flags)), trust_remote_code=trust_remote_code
        )
        _raise_residual(self.base)
        self._fill_from_base(strict=not stage.dense)
        self.block: nn.Module = submodule(self.model, f"{blocks}.{self.place}")
        self.parameters = _stored(self.block)
        self.template = {
            name: tensor.detach().clone() for name, tensor in _stored(submodule(self.base, f"{blocks}.{like}")).items()
        }
        self.vector = stand_in.random(self.hidden)
        self.leak: torch.Tensor | None = None

    def _fill_from_base(self, *, strict: bool) -> None:
        stored, prefix = self.base.state_dict(), self.blocks + "."
        for name, order in grown_tensors(self.base, self.model, self.insertion, self.blocks).items():
            stored[name] = order.of(stored[name])
        filled = {self.insertion.moved_name(name, prefix): tensor for name, tensor in stored.items()}
        types, places = self.insertion.types[self.layer], self.insertion.inserted[self.layer]
        for like, place in zip(types, places, strict=True) if strict else ():
            own, there = f"{prefix}{like}.", f"{prefix}{place}."
            filled |= {there + name.removeprefix(own): value for name, value in stored.items() if name.startswith(own)}
        try:
            result = self.model.load_state_dict(filled, strict=False)
        except RuntimeError as error:
            raise CannotInsert(f"a tensor has another shape in the extended class ({str(error)[:200]})") from None
        if result.unexpected_keys:
            raise CannotInsert(f"the extended class lacks {result.unexpected_keys[0]}")
        with torch.no_grad():
            for name in result.missing_keys:
                self.model.state_dict()[name].zero_()

    def set(self, fills: Mapping[str, Fill], vector: torch.Tensor | None = None) -> None:
        """Fill the inserted block; what ``fills`` does not name is zero."""
        self._set(self.parameters, fills, vector)

    def set_beside(self, number: int, fills: Mapping[str, Fill]) -> None:
        """Fill one of several inserted blocks, by its number among them."""
        place = self.insertion.inserted[self.layer][number]
        self._set(_stored(submodule(self.model, f"{self.blocks}.{place}")), fills, None)

    def rest_idle(self, neutral: Callable[[InsertionTrial], Mapping[str, Fill] | None]) -> None:
        """Make all inserted blocks but the one that is to hold the vector do nothing, where ``neutral`` knows how."""
        own = self.place, self.block, self.parameters
        for place in self.insertion.inserted[self.layer]:
            if place != own[0]:
                self.place, self.block = place, submodule(self.model, f"{self.blocks}.{place}")
                self.parameters = _stored(self.block)
                self.__dict__.pop("_call", None)
                self.set(neutral(self) or {})
        self.place, self.block, self.parameters = own
        self.__dict__.pop("_call", None)

    def _set(
        self, parameters: Mapping[str, torch.Tensor], fills: Mapping[str, Fill], vector: torch.Tensor | None
    ) -> None:
        with torch.no_grad():
            for name, tensor in parameters.items():
                fill = fills.get(name, Fill("zeros"))
                if fill.kind == "copied":
                    tensor.copy_(self.template.get(name, torch.zeros(())).expand_as(tensor))
                else:
                    tensor.copy_(content(fill, tuple(tensor.shape), self.hidden, vector).to(tensor.dtype))

    def gains(self, scales: tuple[float, ...] = SCALES, *, peaked: bool = False) -> list[torch.Tensor]:
        """What the inserted block adds to random residuals of each scale, [batch, position, hidden] fp32.

        Of several streams it is [batch, position, streams, hidden], without what the mixing leaks.
        """
        args, kwargs = self._call
        found = []
        with torch.no_grad(), quiet_transformers():
            for scale in scales:
                noise = self.noise(scale, peaked=peaked)
                rest = copy.deepcopy((args[1:], kwargs))
                if args:
                    output = self.block(noise, *rest[0], **rest[1])
                else:
                    output = self.block(**{**rest[1], "hidden_states": noise})
                hidden = output if isinstance(output, torch.Tensor) else output[0]
                gained = streams_of(hidden.float() - noise, self.hidden)
                found.append(gained if self.leak is None or peaked else gained - scale * self.leak)
        return found

    def noise(self, scale: float, *, peaked: bool = False) -> torch.Tensor:
        """The random residuals of a scale, as the block takes them, fp32; ``peaked``: in one coordinate nearly all."""
        generator = torch.Generator().manual_seed(1)
        noise = torch.randn(self._shape, generator=generator)
        if peaked:
            peak = torch.randint(self.hidden, (*noise.shape[:2], *[1] * (noise.ndim - 2)), generator=generator)
            there = torch.arange(noise.shape[-1]) % self.hidden == peak
            noise = torch.where(there, self.hidden**0.5, 1e-2 * noise)
        return noise * scale

    def moments(self, scale: float) -> torch.Tensor:
        """Of these residuals (of several streams, of their mean), for each entry of what is gained: fp64 [..., 2]."""
        moments = moments_of(mean_stream(self.noise(scale), self.hidden))
        return moments.unsqueeze(-2) if self.streams > 1 else moments

    @property
    def streams(self) -> int:
        """How many residual streams the block has."""
        streams = streams_of(torch.empty(self._shape, device="meta"), self.hidden)
        return streams.shape[2] if streams.ndim == 4 else 1

    @functools.cached_property
    def _call(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """With what the model calls the inserted block; only the residual is replaced."""
        seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.append((args, kwargs))
            raise Enough

        with (
            attached(self.block.register_forward_pre_hook(before, with_kwargs=True)),
            torch.no_grad(),
            quiet_transformers(),
            contextlib.suppress(Enough),
        ):
            logits_of(self.model, self.ids)
        return copy.deepcopy(seen[0])

    @property
    def _shape(self) -> torch.Size:
        args, kwargs = self._call
        residual: torch.Tensor = args[0] if args else kwargs["hidden_states"]
        return residual.shape

    def prove(self, fills: Mapping[str, Fill]) -> tuple[float, float, float]:
        """Max |difference in logits| from the base under a hook, that hook's effect, and the largest logit."""
        block = submodule(self.base, f"{self.blocks}.{self.layer}")
        with torch.no_grad(), quiet_transformers():
            residual, plain = run_on(self.base, block, self.ids)
            # As large as the residual, or the effect would drown in what fp32 rounds off.
            vector = self.vector * float(residual.square().mean().sqrt())
            self.set(fills, vector)
            logits = logits_of(self.model, self.ids)
            _, hooked = run_on(self.base, block, self.ids, add=vector)
        return float((logits - hooked).abs().max()), float((hooked - plain).abs().max()), float(hooked.abs().max())


def _is_read_by_others(config: Any, block: int) -> bool:
    """Whether later blocks read the keys and values of this one, which is not the first."""
    kinds = sharing_kinds(config)
    return bool(kinds) and block > 0 and not kinds[block][1] and kinds[block] not in kinds[block + 1 :]


def _shared_width(selected: int) -> int:
    """Of experts that share the coordinates: what is needed and some to spare; grouped products take multiples of 8."""
    return 8 * (2 * -(-HIDDEN // selected) // 8 + 1)


def stand_in_config(config: Any, layer: int, inner: int, *, all_experts: bool = False) -> tuple[Any, int]:
    """A shrunk config whose MLPs have ``inner`` neurons, and its block that stands for ``layer``.

    Args:
        config: the real one.
        layer: a block of the real model.
        inner: width of every MLP.
        all_experts: keep the number of experts, of which the weight of a single one may be a share.
    """
    tiny, stand_in = shrink_config(config, layer)
    _shrink_indices(tiny, config, layer)
    for part in (tiny, stated(tiny, "ffn_config")):
        for name, value in list(vars(part).items()) if part is not None else []:
            if any(word in name for word in _INNER_SIZES):
                if whole_number(vars(part), name):
                    setattr(part, name, inner)
                elif isinstance(value, list) and value and all(isinstance(item, int) for item in value):
                    setattr(part, name, [inner] * len(value))
    for name in (*EXPERTS, *EXPERTS_PER_TOKEN, *EXPERT_GROUPS, *IDLE_EXPERTS) if all_experts else ():
        real = whole_number(vars(config), name)
        if real is not None and name in vars(tiny):
            setattr(tiny, name, real)
    return copy.deepcopy(tiny), stand_in


def as_deep(tiny: Any, config: Any, layer: int) -> Any:
    """A stand-in of as many blocks as the real model has; each block that was left out is one like that before it.

    Where blocks read others' keys and values it is one of its own kind.

    Raises:
        CannotInsert: the config does not take so many.
    """
    kept, kinds = kept_layers(config, layer), sharing_kinds(config)
    of_kind = {kinds[block]: place for place, block in reversed(list(enumerate(kept)))} if kinds else {}
    left_out = {
        place: tuple(of_kind[kinds[block]] if kinds else place for block in range(left + 1, right))
        for place, (left, right) in enumerate(itertools.pairwise(kept))
        if right > left + 1
    }
    return insert_blocks(tiny, list(left_out), left_out).config if left_out else tiny


def take_pattern(tiny: Any, config: Any) -> None:
    """Lists of the blocks' types, in a stand-in that is as deep as the real model: what they are there."""
    count = block_count(config)
    for name, value in vars(config).items():
        own = vars(tiny).get(name)
        if _PERIOD.search(name) or (name in _DENSE_BLOCKS and not value):
            setattr(tiny, name, copy.copy(value))
        if not isinstance(value, (list, tuple)) or not isinstance(own, (list, tuple)) or "token" in name:
            continue
        kinds = len(value) == count and len(own) == count and set(map(repr, own)) <= set(map(repr, value))
        if kinds or names_blocks(name, value, count):
            setattr(tiny, name, copy.copy(value))


def _shrink_indices(tiny: Any, config: Any, layer: int) -> None:
    """Lists of block indices that the general shrinking does not know."""
    kept = kept_layers(config, layer)
    for name, value in vars(config).items():
        if names_blocks(name, value, block_count(config)):
            setattr(tiny, name, [kept.index(index) for index in value if index in kept])


def _raise_residual(model: nn.Module) -> None:
    """A trained residual is about as large as 1; beside the initial one a norm's epsilon would count."""
    find = getattr(model, "get_input_embeddings", None)
    weight = getattr(find() if callable(find) else None, "weight", None)
    if isinstance(weight, torch.Tensor):
        with torch.no_grad():
            weight.mul_(1.0 / weight.std())


def _stored(block: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and stored buffers of a block that hold floating-point numbers."""
    names = block.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in names.items() if tensor.is_floating_point()}
