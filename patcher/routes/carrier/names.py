"""What a checkpoint calls its blocks, and what they are called once others lie between them."""

from __future__ import annotations

from patcher.architectures.analysis import Architecture
from patcher.checkpoint.folder import CheckpointFolder
from patcher.checkpoint.safetensors_file import TensorInfo
from patcher.routes.carrier.choice import Choice
from patcher.routes.carrier.disk import saved_block
from patcher.routes.disk_names import stored_tensors
from patcher.routes.plan import NotApplicable


class CarrierNames:
    """Names on disk: the base's blocks as this checkpoint calls them, or as the class would save them."""

    def __init__(self, architecture: Architecture, choice: Choice, checkpoint: CheckpointFolder | None) -> None:
        self.architecture, self.choice = architecture, choice
        self.stored = stored_tensors(checkpoint)
        self.saved = saved_block(choice.base, architecture.blocks, 0)[0]
        self.prefix = self._prefix()
        self.blocks = self._blocks()

    def _prefix(self) -> str:
        bare = self.architecture.base_prefix + "."
        found = []
        for prefix in dict.fromkeys((self.saved, self.architecture.blocks + ".")):
            found += [prefix, prefix.removeprefix(bare), bare + prefix]
        if self.stored is None:
            return self.saved
        for prefix in found:
            if any(name.startswith(f"{prefix}0.") for name in self.stored):
                return prefix
        raise NotApplicable("the checkpoint stores its blocks under names that the class does not know")

    def _blocks(self) -> dict[int, dict[str, TensorInfo | None]]:
        """Index -> name after it -> what is stored there."""
        found: dict[int, dict[str, TensorInfo | None]] = {}
        if self.stored is None:
            for block in range(self.choice.insertion.count):
                found[block] = dict.fromkeys(saved_block(self.choice.base, self.architecture.blocks, block)[1])
            return found
        for name, info in self.stored.items():
            index, _, rest = name.removeprefix(self.prefix).partition(".")
            if name.startswith(self.prefix) and index.isdigit():
                found.setdefault(int(index), {})[rest] = info
        return found

    def moved(self) -> tuple[dict[str, str], frozenset[str]]:
        """Names that change, and names of draft blocks, which are left out."""
        insertion = self.choice.insertion
        stored = [(block, f"{self.prefix}{block}.{rest}") for block, rests in self.blocks.items() for rest in rests]
        drafts = frozenset(name for block, name in stored if block >= insertion.count)
        copied = {name: insertion.moved_name(name, self.prefix) for _, name in stored if name not in drafts}
        return {name: new for name, new in copied.items() if name != new}, drafts

    def in_copy(self, saved_name: str) -> str:
        """A name under which the class saves a tensor, in this checkpoint's spelling."""
        if saved_name.startswith(self.saved):
            return self.prefix + saved_name.removeprefix(self.saved)
        return saved_name
