"""Which stored tensors the first decoder blocks need: for a download of those alone."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from patcher.architectures.model_class import quiet_transformers, submodule
from patcher.architectures.shrink import shrink_config
from patcher.architectures.stand_in import FAILURES, build_stand_in, logits_of
from patcher.checkpoint.names import spellings

if TYPE_CHECKING:
    from patcher.architectures.analysis import Architecture

_INDEX = re.compile(r"(\d+)\.")
_TOKENS = 5


@dataclass(frozen=True)
class BlockNames:
    """How a class's tensors are told apart by their names on disk. Prefixes end with a dot.

    Attributes:
        blocks: prefixes of the list of decoder blocks: as the class has it, without (or with) the prefix that
            checkpoints of the bare model leave out, and as it was spelled in earlier releases.
        after: prefixes of the modules that no text needs up to the last block: the final norm, the LM head; a
            multimodal wrapper's towers, and what stands between them and the text.
        tied: groups of parameters that are one tensor, which a checkpoint may store under any of their names.
    """

    blocks: tuple[str, ...]
    after: tuple[str, ...]
    tied: tuple[frozenset[str], ...] = ()

    def block_of(self, name: str) -> int | None:
        """The 0-based index of the block that a tensor belongs to, None where it belongs to none."""
        for prefix in self.blocks:
            found = _INDEX.match(name, len(prefix)) if name.startswith(prefix) else None
            if found is not None:
                return int(found[1])
        return None

    def is_needed(self, name: str, last: int) -> bool:
        """Whether blocks 0 to ``last`` may read the tensor of this name."""
        index = self.block_of(name)
        return index <= last if index is not None else not name.startswith(self.after)


def tensors_for_blocks(stored: Collection[str], names: BlockNames, last: int) -> set[str]:
    """The stored tensors that blocks 0 to ``last`` need: what feeds them, and they themselves.

    A tensor whose place is not known is taken. Where no name at all has the index of a block, all are.

    Args:
        stored: every name in the checkpoint.
        last: 0-based index of the last block that is run; -1 for none.
    """
    if all(names.block_of(name) is None for name in stored):
        return set(stored)
    needed = {name for name in stored if names.is_needed(name, last)}
    for group in names.tied:
        there = group & set(stored)
        if not there & needed and any(names.is_needed(name, last) for name in group):
            needed |= there
    return needed


def block_names(architecture: Architecture) -> BlockNames:
    """The names of this class under this config; what runs after the blocks is seen on a tiny stand-in."""
    spell = _Spelling(architecture)
    tied: dict[str, set[str]] = {}
    for alias, owner in architecture.aliases.items():
        tied.setdefault(owner, {owner}).add(alias)
    return BlockNames(
        blocks=tuple(dict.fromkeys(spell.block_prefixes())),
        after=tuple(dict.fromkeys(spell.module_prefixes(_modules_after_blocks(architecture)))),
        tied=tuple(frozenset(name for member in group for name in spell.of(member)) for group in tied.values()),
    )


@dataclass(frozen=True)
class _Spelling:
    """Every way in which a checkpoint of a class may spell a name."""

    architecture: Architecture

    def of(self, name: str) -> list[str]:
        """As the class calls it, and as earlier releases did; with and without the prefix of the base model."""
        try:
            saved = self.architecture.saved_names([name]).get(name, name)
        except IndexError:
            saved = name  # fused of several stored tensors, so it has no one name
        return [spelled for one in (name, saved) for spelled in spellings(one, self.architecture.base_prefix)]

    def block_prefixes(self) -> Iterator[str]:
        blocks = self.architecture.blocks + "."
        yield from spellings(blocks, self.architecture.base_prefix)
        for name in self._parameters_in(f"{blocks}0."):
            for spelled in self.of(name):
                head, index, _ = spelled.partition(".0.")
                if index:
                    yield head + "."

    def module_prefixes(self, modules: Iterable[str]) -> Iterator[str]:
        for module in modules:
            for name in self._parameters_in(module + "."):
                leaf = name.removeprefix(module)
                yield from (spelled.removesuffix(leaf) + "." for spelled in self.of(name) if spelled.endswith(leaf))

    def _parameters_in(self, prefix: str) -> list[str]:
        return [name for name in self.architecture.parameters if name.startswith(prefix)]


def _modules_after_blocks(architecture: Architecture) -> frozenset[str]:
    """Paths of the modules with parameters that are run after the last block and never before its end; of a multimodal
    wrapper those too that a text does not run at all.

    None where the stand-in cannot be run: then they are downloaded as well.
    """
    try:
        tiny, _ = shrink_config(architecture.config, 0)
        model = build_stand_in(tiny, trust_remote_code=architecture.trust_remote_code)
        after, unused = _run_after(model, architecture.blocks, int(tiny.vocab_size))
        return after | unused if architecture.wraps else after
    except FAILURES:
        return frozenset()


def _run_after(model: nn.Module, blocks: str, vocabulary: int) -> tuple[frozenset[str], frozenset[str]]:
    """The modules that a text runs only after the last block, and those of which it runs nothing."""
    when: dict[bool, set[str]] = {True: set(), False: set()}
    passed = False

    def ends(*_arguments: Any) -> None:
        nonlocal passed
        passed = True

    def begins(path: str) -> Any:
        return lambda *_arguments: when[passed].add(path)

    last: Any = submodule(model, blocks)[-1]
    last.register_forward_hook(ends)
    for path, module in model.named_modules():
        if not path.startswith(blocks + ".") and any(True for _ in module.parameters(recurse=False)):
            module.register_forward_pre_hook(begins(path))
    ids = torch.arange(3, 3 + _TOKENS)[None] % vocabulary
    with torch.no_grad(), quiet_transformers():
        logits_of(model, ids)
    ran = {*when[True], *when[False], f"{blocks}.0"}
    idle = {path for path, _ in model.named_modules() if path and not _any_in(ran, path)}
    # Whole parts: the stand-in has fewer blocks in them than the model.
    parts = {path for path in idle if path.rpartition(".")[0] not in idle and not path.startswith(f"{blocks}.")}
    return frozenset(when[True] - when[False]), frozenset(parts)


def _any_in(paths: Collection[str], part: str) -> bool:
    return any(f"{path}.".startswith(f"{part}.") for path in paths)
