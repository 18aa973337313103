"""Stock forward passes in which the blocks do not compute: what they are called with, and what comes after them."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch

from patcher.capture.forward import EMBEDDING, Enough, forward
from patcher.capture.logits import LogitsJob, job_logits
from patcher.capture.streaming.block_calls import After, BatchOnItsWay, Recording, Returned
from patcher.capture.streaming.shell import Shell, Weights
from patcher.capture.streaming.stand_ins import NotStreamable

Inputs = Mapping[str, torch.Tensor]


class Rehearsal:
    """Runs a shell's stock forward around its blocks."""

    def __init__(self, shell: Shell) -> None:
        self._shell = shell
        self._returns: Returned | None = None

    @property
    def returns(self) -> Returned:
        """What the blocks return."""
        assert self._returns is not None, "find_out comes first"
        return self._returns

    def find_out(self, inputs: Inputs, first: Weights) -> None:
        """Run block 0 for once, to see what a block returns beside the residual stream.

        Args:
            inputs: of one row, which does.
            first: the weights of block 0.

        Raises:
            NotStreamable: it is not called, or what it returns cannot be followed.
        """

        def called(layer: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            with self._shell.intercepted(None), self._shell.holding(dict(first)):
                self._returns = Returned.by(self._shell.blocks[layer](*args, **kwargs))[0]
            raise Enough

        if self._returns is None:
            with self._shell.intercepted(called), contextlib.suppress(Enough):
                forward(self._shell.model, inputs)
        if self._returns is None:
            raise _not_called()

    def calls(self, inputs: Inputs, last: int, after: After, *, all_of_them: bool = False) -> Recording:
        """What the blocks are called with.

        Args:
            last: the block at whose first call it ends; -1 ends before block 0 and gives no calls.
            after: is given the residual stream that enters block 0, as layer -1.
            all_of_them: go on until something is computed with what the last block puts out.

        Raises:
            NotStreamable: something is computed with residual streams between the blocks.
        """
        recording = Recording()

        def called(layer: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden = _entering(args, kwargs)
            if not recording.calls:
                hidden = after(EMBEDDING, hidden)
                if last == EMBEDDING:
                    raise Enough
                args, kwargs = ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})
            recording.add(layer, args, kwargs)
            if layer == last and not all_of_them:
                raise Enough
            return self.returns.pending(len(recording.calls) - 1, hidden)

        try:
            with self._shell.intercepted(called):
                forward(self._shell.model, inputs)
            raise _not_called()
        except Enough:
            pass
        except NotStreamable:
            if not (all_of_them and recording.calls and recording.calls[-1].layer == last):
                raise
        recording.check()
        return recording

    def logits(self, job: LogitsJob, way: BatchOnItsWay) -> torch.Tensor:
        """What the class makes of the residual stream after its last block, as a job asks for it."""
        final = len(way.layers) - 1
        hidden = way.take((final, 0))
        number = -1

        def called(layer: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            nonlocal number
            number += 1
            if number > final or way.layers[number] != layer:
                raise NotStreamable("it goes on computing with its blocks after the last one")
            if number == final:
                return self.returns.of(number, hidden)
            return self.returns.pending(number, _entering(args, kwargs))

        def begins(*_inputs: Any) -> None:
            # A class that cannot leave positions out may be run twice.
            nonlocal number
            number = -1

        with self._shell.model.register_forward_pre_hook(begins), self._shell.intercepted(called):
            return job_logits(self._shell.model, job.inputs, job.columns, job.rows)


def _entering(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor:
    hidden = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(hidden, torch.Tensor):
        raise NotStreamable("its blocks are not called with the residual stream")
    return hidden


def _not_called() -> NotStreamable:
    return NotStreamable("its forward does not call the blocks that were found")
