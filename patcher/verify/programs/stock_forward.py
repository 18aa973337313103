"""Runs passes on a model in memory: probes of one length in one batch, only the logits that are kept."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from patcher.verify.programs.stock_passes import EMBEDDING, RESIDUAL_PROBES, Hook, Pass, groups
else:
    from stock_passes import EMBEDDING, RESIDUAL_PROBES, Hook, Pass, groups

MOST_LOGITS = 2**28
"""In one batch."""


class Start:
    """The residual stream of each probe as it enters a block, and what the blocks before it return.

    Attributes:
        block: number of the block.
        entering: probe -> [positions, hidden].
        lengths: of each earlier block, of how many parts the tuple is that it returns; None for a tensor.
    """

    def __init__(self, block: int) -> None:
        self.block = block
        self.entering: dict[int, torch.Tensor] = {}
        self.lengths: dict[int, int | None] = {}
        self.refused = ""
        """Why no pass can start there; empty where one can."""


class Forward:
    """One model in memory, and what its passes gave.

    Args:
        model: a causal LM in eval mode.
        blocks: the path of its decoder blocks.
        ids: of each probe.
        vectors: what hooks add, [hidden] fp32; of the candidate, nothing.
        device: where the ids go.
    """

    def __init__(
        self,
        model: Any,
        blocks: str,
        ids: Sequence[Sequence[int]],
        vectors: Mapping[str, Any],
        *,
        device: str,
    ) -> None:
        self.model, self.blocks, self.ids, self.vectors = model, blocks, ids, vectors
        self.device = device
        self.tensors: dict[str, torch.Tensor] = {}
        self.read_by = ""
        self.counted: dict[str, float] = {"passes": 0, "tokens": 0}
        """Batches, and tokens times the share of the blocks that they went through; decoding is not among them."""
        self.keeps = "logits_to_keep" in signature(model.forward).parameters

    @property
    def block_count(self) -> int:
        return len(self.model.get_submodule(self.blocks))

    def run(self, one: Pass, start: Start | None = None, *, record: Start | None = None) -> None:
        """Run a pass; ``start``: from where, if not from the ids; ``record``: where to put what enters its block."""
        vocabulary = int(getattr(self.model.config.get_text_config(), "vocab_size", 1))
        for alike in groups(one.probes, self.ids):
            most = max(1, MOST_LOGITS // (vocabulary * len(self.ids[alike[0]])))
            for first in range(0, len(alike), most):
                self._batch(one, alike[first : first + most], None if one.whole else start, record)

    def _batch(self, one: Pass, numbers: Sequence[int], start: Start | None, record: Start | None) -> None:
        ids = torch.tensor([self.ids[number] for number in numbers])
        read = [number for number in numbers if number < RESIDUAL_PROBES] if one.residuals else []
        with contextlib.ExitStack() as stack:
            if start is not None:
                stack.enter_context(self._starting(start, numbers))
            if record is not None:
                stack.enter_context(self._recording(record, numbers))
            taken = stack.enter_context(self._taking(one.residuals.values())) if read else None
            more = {"output_hidden_states": True} if read else {}
            # Where only the residual stream is wanted, the head need not run everywhere.
            output = self.forward(one.hooks, ids, None if one.name else [0], **more)
        self._count(ids.numel(), start)
        if one.name:
            found = torch.log_softmax(output.logits.float(), dim=-1).cpu()
            for row, number in enumerate(numbers):
                self.tensors[f"{one.name}/{number}"] = found[row].contiguous()
        if taken is not None:
            for key, layer in one.residuals.items():
                state = self._residual(layer, output, taken)
                if state.ndim == 4 and state.shape[:2] != ids.shape == state.shape[1:3]:
                    state = state.permute(1, 2, 0, 3)  # several streams, one after the other
                for number in read:
                    place = f"residual/{one.read_as}/{key}/{number}"
                    self.tensors[place] = state[numbers.index(number)].cpu().contiguous()

    def _count(self, tokens: int, start: Start | None) -> None:
        self.counted["passes"] += 1
        self.counted["tokens"] += tokens if start is None else tokens * (1 - start.block / self.block_count)

    def forward(self, hooks: Iterable[Hook], ids: Any, positions: list[int] | None = None, **options: Any) -> Any:
        """A forward pass under hooks; of the logits only those at ``positions`` come back."""
        if positions is not None and self.keeps:
            options["logits_to_keep"] = torch.tensor(positions, device=self.device)
        with self.hooked(hooks), torch.no_grad():
            output = self.model(input_ids=ids.to(self.device), use_cache=False, **options)
        if positions is not None and output.logits.shape[1] != len(positions):
            output.logits = output.logits[:, positions]
        return output

    def hooked(self, hooks: Iterable[Hook]) -> contextlib.AbstractContextManager[None]:
        """While open, plain forward hooks add their vectors."""
        return removed_after(
            attach(
                self.model.get_submodule(f"{self.blocks}.{hook.layer}"),
                hook.entering,
                self.vectors[hook.key] * hook.factor,
            )
            for hook in hooks
        )

    # --- where a pass starts -------------------------------------------------------------------------------------

    def _recording(self, start: Start, numbers: Sequence[int]) -> contextlib.AbstractContextManager[None]:
        def enter(_module: Any, inputs: Any, keywords: dict[str, Any]) -> None:
            hidden = inputs[0] if inputs else keywords["hidden_states"]
            if getattr(self.model.config.get_text_config(), "altup_num_inputs", None):
                start.refused = "its residual streams come one after the other"
                return
            start.entering.update(zip(numbers, hidden.detach().clone(), strict=True))

        def leave(place: int) -> Any:
            def hook(_module: Any, _inputs: Any, output: Any) -> None:
                if not isinstance(output, torch.Tensor) and any(part is not None for part in output[1:]):
                    start.refused = "a block hands on more than the residual stream"
                start.lengths[place] = None if isinstance(output, torch.Tensor) else len(output)

            return hook

        block = self.model.get_submodule(f"{self.blocks}.{start.block}")
        handles = [block.register_forward_pre_hook(enter, with_kwargs=True)]
        for place in range(start.block):
            handles.append(self.model.get_submodule(f"{self.blocks}.{place}").register_forward_hook(leave(place)))
        return removed_after(handles)

    @contextlib.contextmanager
    def _starting(self, start: Start, numbers: Sequence[int]) -> Iterator[None]:
        """While open, every block before the start gives what enters the block there."""
        hidden = torch.stack([start.entering[number] for number in numbers]).to(self.device)

        def gives(place: int) -> Any:
            length = start.lengths[place]

            def forward(*_inputs: Any, **_keywords: Any) -> Any:
                return hidden.clone() if length is None else (hidden.clone(), *[None] * (length - 1))

            return forward

        replaced = [self.model.get_submodule(f"{self.blocks}.{place}") for place in range(start.block)]
        for place, module in enumerate(replaced):
            module.forward = gives(place)
        try:
            yield
        finally:
            for module in replaced:
                del module.forward

    # --- what is read --------------------------------------------------------------------------------------------

    def _largest_list(self) -> tuple[Any, int]:
        """The model's own record of its blocks: not the module path that the edit was made with."""
        config = self.model.config
        if getattr(config, "text_config", None) is not None:
            config = config.text_config
        # Of a multimodal model, the part that has the text's config.
        text = (m for m in self.model.modules() if type(getattr(m, "config", None)) is type(config))
        stated = (getattr(config, name, None) for name in ("decoder_layers", "num_layers_per_stack"))
        count = next((number for number in stated if number), None) or config.num_hidden_layers
        lists = [m for m in next(text, self.model).modules() if isinstance(m, torch.nn.ModuleList) and len(m) == count]
        return max(lists, key=lambda blocks: sum(parameter.numel() for parameter in blocks.parameters())), count

    @contextlib.contextmanager
    def _taking(self, layers: Iterable[int]) -> Iterator[dict[int, torch.Tensor]]:
        """While open, what enters the first block and leaves the given ones goes into a dict, the first under -1.

        Of a block that is run several times, it is what leaves it first: a vector is added each time.
        """
        taken: dict[int, torch.Tensor] = {}

        def enter(_module: Any, inputs: Any, keywords: dict[str, Any]) -> None:
            entering = inputs[0] if inputs else keywords["hidden_states"]
            taken.setdefault(EMBEDDING, entering.detach().float())

        def leave(layer: int) -> Any:
            def hook(_module: Any, _inputs: Any, output: Any) -> None:
                hidden = output if isinstance(output, torch.Tensor) else output[0]
                taken.setdefault(layer, hidden.detach().float())

            return hook

        largest, _ = self._largest_list()
        handles = [largest[0].register_forward_pre_hook(of_this_thread(enter), with_kwargs=True)]
        handles += [
            largest[layer].register_forward_hook(of_this_thread(leave(layer))) for layer in layers if layer != EMBEDDING
        ]
        try:
            yield taken
        finally:
            for handle in handles:
                handle.remove()

    def _residual(self, layer: int, output: Any, taken: Mapping[int, torch.Tensor]) -> torch.Tensor:
        """[rows, positions, hidden] after a block; several residual streams as the class has them."""
        if layer == EMBEDDING:
            self.read_by = "what enters the first block"
            return taken[EMBEDDING]
        _, count = self._largest_list()
        states = getattr(output, "hidden_states", None)
        # The last record is taken behind the final norm. Some classes (Mamba) leave out what enters the first block.
        complete = states is not None and len(states) == count + 1 and layer < count - 1
        if states is not None and complete and torch.equal(states[0].float(), taken[EMBEDDING]):
            self.read_by = "output_hidden_states"
            return states[layer + 1].float()  # type: ignore[no-any-return]
        self.read_by = "the model's largest list of blocks"
        return taken[layer]


@contextlib.contextmanager
def removed_after(handles: Iterable[Any]) -> Iterator[None]:
    """While open, hooks stay registered."""
    registered = list(handles)
    try:
        yield
    finally:
        for handle in registered:
            handle.remove()


def of_this_thread(hook: Any) -> Any:
    """A hook that does nothing in other threads: passes that run side by side have the modules in common."""
    owner = threading.get_ident()
    return lambda *given, **named: hook(*given, **named) if threading.get_ident() == owner else None


def attach(module: Any, entering: bool, vector: torch.Tensor) -> Any:
    """A plain forward hook that adds ``vector`` to a block's output, or to what enters it.

    Several residual streams, [rows, positions, streams, hidden] or side by side in the last dimension, all gain it.
    """

    def steered(hidden: torch.Tensor) -> torch.Tensor:
        return hidden + vector.repeat(hidden.shape[-1] // len(vector)).to(hidden.device, hidden.dtype)

    def on_output(_module: Any, _inputs: Any, output: Any) -> Any:
        return steered(output) if isinstance(output, torch.Tensor) else (steered(output[0]), *output[1:])

    def on_input(_module: Any, inputs: Any, keywords: dict[str, Any]) -> Any:
        if inputs:
            return (steered(inputs[0]), *inputs[1:]), keywords
        return inputs, {**keywords, "hidden_states": steered(keywords["hidden_states"])}

    if entering:
        return module.register_forward_pre_hook(of_this_thread(on_input), with_kwargs=True)
    return module.register_forward_hook(of_this_thread(on_output))
