"""Forward passes side by side over stock models whose weights lie on the disk: a weight is read once for all of them.

Part of the program that runs in a process of its own (:mod:`patcher.verify.programs.stock_run`); it imports nothing of
this package. The stock loader loads the models, and accelerate spreads them: its hooks fetch the weights of a module
when it is called. Every pass is a thread that calls the stock forward as it is. Where it comes to a decoder block, or
to another module with weights, it waits until all passes have come as far. Then the one thread that computes runs the
module for one pass after the other, with the same weights, and gives them up. So no two threads compute at a time, and
the values are those of passes that run alone.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from patcher.verify.programs.shared_weights import Change, OnDisk, Stop, Stored, Weights
else:
    from shared_weights import Change, OnDisk, Stop, Stored, Weights

Work = Callable[[], None]
STACK_BYTES = 2 << 20
"""For the thread of a pass, which only goes from module to module: the usual 8 MiB count in a limited address space."""


@dataclass(eq=False)
class Request:
    """A pass has come to a stop and wants its module run."""

    stop: Stop
    model: Spread
    forward: Callable[[], Any]
    grad: bool = field(default_factory=torch.is_grad_enabled)
    context: contextvars.Context = field(default_factory=contextvars.copy_context)
    output: Any = None
    error: Exception | None = None


class Pass(threading.Thread):
    """Work that calls models; it runs while the conductor waits for it, and waits while a module is run for it.

    Attributes:
        reading: how often it has begun a forward, and with which reading it started.
        block: the last decoder block that it has passed.
        step: how many modules it has passed since then.
    """

    def __init__(self, work: Work, reading: int) -> None:
        super().__init__(daemon=True)
        self.work, self.reading, self.block, self.step = work, reading - 1, -1, 0
        self.changes: dict[str, Change] = {}
        self.request: Request | None = None
        self.error: BaseException | None = None
        self._go, self._stands = threading.Semaphore(0), threading.Semaphore(0)

    @property
    def progress(self) -> tuple[int, int, int]:
        return self.reading, self.block, self.step

    def run(self) -> None:
        _OF_THREAD.current = self
        try:
            self.work()
        except BaseException as error:
            self.error = error
        self._stands.release()

    def ask(self, request: Request) -> Any:
        """Wait until the conductor has run the module."""
        self.request = request
        self._stands.release()
        self._go.acquire()
        if request.error is not None:
            raise request.error
        return request.output

    def go_on(self) -> None:
        """Let it run to its next stop, or to its end."""
        self.request = None
        if self.ident is None:
            self.start()
        else:
            self._go.release()
        self._stands.acquire()


_OF_THREAD = threading.local()


def this_pass() -> Pass | None:
    """The pass that the calling thread runs."""
    return getattr(_OF_THREAD, "current", None)


@contextlib.contextmanager
def changed(changes: Mapping[str, Change]) -> Iterator[None]:
    """Within a pass: it computes with these parameters changed in place, by name; no other pass does."""
    current = this_pass()
    assert current is not None
    before, current.changes = current.changes, dict(changes)
    try:
        yield
    finally:
        current.changes = before


class Spread:
    """One model, whose modules ask the conductor to run them.

    Attributes:
        weights: those on the disk; None where all are in memory.
    """

    def __init__(self, model: Any, blocks: str, stop_at: Callable[[str, int | None], Stop], on_disk: OnDisk) -> None:
        parameters = dict(model.named_parameters(remove_duplicate=False))
        self.weights: Weights | None = None
        for module in model.modules():
            for hook in _hooks(module):
                if self.weights is None:
                    sizes = {name: one.numel() * one.element_size() for name, one in parameters.items()}
                    self.weights = Weights(hook.weights_map.dataset, sizes, on_disk)
                hook.weights_map.dataset = self.weights
        model.register_forward_pre_hook(_begin_reading)
        for path, module in model.named_modules():
            parent, _, leaf = path.rpartition(".")
            own = any(True for _ in module.parameters(recurse=False))
            if parent == blocks:
                self._wait_before(module, stop_at(path, int(leaf)))
            elif own and not f"{blocks}.".startswith(f"{path}." if path else ""):
                if not path.startswith(f"{blocks}."):
                    self._wait_before(module, stop_at(path, None))
            elif own:
                self._stay_in_memory(path, module)
        self._in_memory = {name: one for name, one in _tensors(model).items() if not one.is_meta}

    def _wait_before(self, module: Any, stop: Stop) -> None:
        forward = module.forward

        @functools.wraps(forward)
        def waiting(*args: Any, **kwargs: Any) -> Any:
            current = this_pass()
            run = functools.partial(forward, *args, **kwargs)
            return run() if current is None else current.ask(Request(stop, self, run))

        module.forward = waiting

    def _stay_in_memory(self, path: str, module: Any) -> None:
        """What holds the blocks is left by one pass while others are still in it."""
        for hook in _hooks(module):
            for name, parameter in list(module.named_parameters(recurse=False)):
                if parameter.is_meta:
                    value = hook.weights_map[name]
                    module._parameters[name] = torch.nn.Parameter(value, parameter.requires_grad)
            hook.offload = False

    @contextlib.contextmanager
    def at(self, stop: Stop, changes: Mapping[str, Change]) -> Iterator[None]:
        """Its weights are those of this stop, with the changes of a pass."""
        if self.weights is not None:
            self.weights.stop, self.weights.changes = stop, changes
        before = []
        try:
            with torch.no_grad():
                for name, change in changes.items():
                    if name.startswith(f"{stop.path}.") and name in self._in_memory:
                        before.append((self._in_memory[name], self._in_memory[name].detach().clone()))
                        change(self._in_memory[name])
            yield
        finally:
            with torch.no_grad():
                for parameter, value in before:
                    parameter.copy_(value)
            if self.weights is not None:
                self.weights.stop, self.weights.changes = None, {}


def _tensors(model: Any) -> dict[str, torch.Tensor]:
    found = dict(model.named_parameters(remove_duplicate=False))
    return {**found, **dict(model.named_buffers(remove_duplicate=False))}


def _hooks(module: Any) -> list[Any]:
    """Accelerate's hooks that fetch this module's weights from the disk."""
    hook = getattr(module, "_hf_hook", None)
    hooks = getattr(hook, "hooks", [hook])
    return [one for one in hooks if hasattr(getattr(getattr(one, "weights_map", None), "dataset", None), "index")]


def _begin_reading(_model: Any, _inputs: Any) -> None:
    current = this_pass()
    if current is not None:
        current.reading, current.block, current.step = current.reading + 1, -1, 0


class SideBySide:
    """Runs passes over spread models so that each weight is read once for all forwards that begin together.

    Args:
        models: stock models of the same modules (a checkpoint in two dtypes).
        blocks: path of the list of decoder blocks, such as ``model.layers``.
        memory: bytes that weights may take; the next block is read while one computes if both fit.

    Attributes:
        on_disk: what was read.
        tell: called with how much of the readings is done, 0 to 1.
    """

    tell: Callable[[float], None] | None = None

    def __init__(self, models: Sequence[Any], blocks: str, memory: int) -> None:
        self.on_disk, self._memory = OnDisk(), memory
        self._stops: dict[str, Stop] = {}
        self._blocks, self._count = blocks, len(models[0].get_submodule(blocks))
        self._begun, self._readings = 0, 1
        self._at: list[Stop] = []
        self._coming: dict[Stop, Future[None]] = {}
        self._reader = ThreadPoolExecutor(1)
        self.models = [Spread(model, blocks, self._stop_at, self.on_disk) for model in models]
        self._keep_tied()

    def run(self, *rounds: Callable[[], Sequence[Work]]) -> None:
        """Run passes, each of which takes part in one reading of the weights with every forward that it calls.

        Args:
            rounds: the passes that begin with each reading. The next is asked for when all passes so far have ended or
                come to their next forward, so it can depend on what they found.

        Raises:
            BaseException: what a pass raised; the others have ended.
        """
        size = threading.stack_size(STACK_BYTES)
        passes: list[Pass] = []
        coming = list(enumerate(rounds))
        self._readings = len(rounds)
        try:
            while True:
                waiting = [one for one in passes if one.request is not None]
                if coming and all(one.reading >= coming[0][0] for one in waiting):
                    reading, given = coming.pop(0)
                    self._begun = reading
                    fresh = [Pass(work, reading) for work in given()]
                    passes += fresh
                    for one in fresh:
                        one.go_on()
                elif waiting:
                    self._serve(min(waiting, key=lambda one: one.progress), waiting)
                else:
                    break
        finally:
            threading.stack_size(size)
            self._leave([])
        for one in passes:
            if one.error is not None:
                raise one.error

    def _serve(self, one: Pass, waiting: Sequence[Pass]) -> None:
        """Run the module that a pass waits for."""
        requests = [other.request for other in waiting if other.request is not None]
        request = one.request
        assert request is not None
        # What no pass waits for is given up before more is read.
        self._leave([other.stop for other in requests])
        self._enter(request.stop, [other.model.weights for other in requests if other.stop is request.stop])
        try:
            with request.model.at(request.stop, one.changes), torch.set_grad_enabled(request.grad):
                request.output = request.context.run(request.forward)
        except Exception as error:
            request.error = error
        one.step += 1
        if request.stop.block is not None:
            one.block, one.step = request.stop.block, 0
        one.go_on()

    def _enter(self, stop: Stop, models: Sequence[Weights | None]) -> None:
        if stop in self._at:
            return
        self._at.append(stop)
        if self.tell is not None and stop.block is not None:
            self.tell((self._begun + stop.block / self._count) / self._readings)
        coming = self._coming.pop(stop, None)
        if coming is not None:
            # What did not fit beside another block may fit alone.
            with contextlib.suppress(MemoryError, RuntimeError):
                coming.result()
        following = None if stop.block is None else self._stops.get(f"{self._blocks}.{stop.block + 1}")
        spread = list({id(one): one for one in models if one is not None}.values())
        if following is None or following in self._coming:
            return
        if self._kept_bytes + sum(self._size(stop, one) + self._size(following, one) for one in spread) <= self._memory:
            self._coming[following] = self._reader.submit(following.fetch_all, spread)

    def _leave(self, wanted: Sequence[Stop]) -> None:
        for stop in [stop for stop in self._at if stop not in wanted]:
            stop.leave()
            self._at.remove(stop)

    def _stop_at(self, path: str, block: int | None) -> Stop:
        return self._stops.setdefault(path, Stop(path, block, self.on_disk))

    def _size(self, stop: Stop, weights: Weights) -> int:
        return sum(weights.sizes[name] for name in weights.under(stop.path))

    def _keep_tied(self) -> None:
        self._kept_bytes = 0
        for weights in [one.weights for one in self.models if one.weights is not None]:
            places: dict[Stored, list[str]] = {}
            for name in weights.under(""):
                places.setdefault(weights.stored(name), []).append(name)
            largest = max((self._size(stop, weights) for stop in self._stops.values()), default=0)
            for stored, (first, *others) in places.items():
                if others and stored not in self.on_disk.keep:
                    fits = self._kept_bytes + weights.sizes[first] + largest <= self._memory
                    self.on_disk.keep[stored] = fits
                    self._kept_bytes += weights.sizes[first] if fits else 0
