"""The two roles where the model is larger than memory: all passes side by side, each weight read at most twice.

The first reading takes every pass that does not depend on another. The second takes the step of greedy decoding with a
cache, and what is run louder because its effect was small.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from patcher.verify.programs import stock_passes as passes
    from patcher.verify.programs.disk_loading import values_left_on_disk
    from patcher.verify.programs.shared_weights import Change
    from patcher.verify.programs.side_by_side import SideBySide, Work, changed
    from patcher.verify.programs.stock_forward import Forward
    from patcher.verify.programs.stock_image_runs import IMAGE
    from patcher.verify.programs.stock_model import own_dtype, set_factor
    from patcher.verify.programs.stock_roles import Candidate, Reference, Role
else:
    import stock_passes as passes
    from disk_loading import values_left_on_disk
    from side_by_side import SideBySide, changed
    from stock_image_runs import IMAGE
    from stock_model import own_dtype, set_factor
    from stock_roles import Candidate, Reference, Role


class Spread(Role):
    """A folder whose weights stay on the disk: all of them, or what memory does not hold.

    Attributes:
        own: the model in its own dtype, where it is run beside the one in fp32, of the same tensors.
        without_hooks: name of the pass of the model as it is.
    """

    own: Any = None
    without_hooks = ""

    def load(self) -> None:
        self.facts["reads"] = {}
        with values_left_on_disk():
            super().load()
            if self.job["own_dtype"] and self.job["offload"]["all"]:
                with self.skipping("own_dtype"):
                    self.own = own_dtype(self.job, None, self.facts)
        self.side = self.beside(self.model, self.own)
        self.facts["skipped"][f"{IMAGE}greedy"] = "each token would read the model from the disk once more"
        # What the towers make of the image is asked for by passes of both readings.
        self.image_made = contextlib.ExitStack()
        self.image_made.enter_context(self.image.once())

    def beside(self, *models: Any) -> SideBySide:
        memory = self.job["offload"]["bytes"] if self.job["offload"]["all"] else 0
        side = SideBySide([model for model in models if model is not None], self.job["blocks"], memory)
        side.tell = self.tell
        return side

    def tell(self, share: float) -> None:
        """How much is done, for whoever waits for this process."""
        with open(self.job["result"] + ".share", "w", encoding="ascii") as file:  # noqa: PTH123
            file.write(f"{share:.4f}")

    def read(self, side: SideBySide, *rounds: Callable[[], Sequence[Work]]) -> None:
        side.run(*rounds)
        counts = self.facts["reads"]
        for (file, name), count in side.on_disk.reads.items():
            counts[f"{file}:{name}"] = counts.get(f"{file}:{name}", 0) + count
        side.on_disk.reads.clear()

    def works(self, forward: Forward, ran: Sequence[passes.Pass]) -> list[Work]:
        """One for every batch, since each forward takes part in a reading of its own."""
        batches = [replace(one, probes=alike) for one in ran for alike in passes.groups(one.probes, self.ids)]
        return [functools.partial(self.run_one, forward, one) for one in batches]

    def run_one(self, forward: Forward, one: passes.Pass) -> None:
        forward.run(one)

    def first_reading(self, ran: Sequence[passes.Pass]) -> list[Work]:
        own = [] if self.own is None else self.own_works()
        image = functools.partial(self.image.first, self.without_hooks)
        return [*self.works(self.forward, ran), self.left_padding, self.greedy, self.long_prompt, image, *own]

    def image_works(self, ran: Sequence[passes.Pass]) -> list[Work]:
        """What is run over the prompt with an image that the first reading found."""
        return [*(functools.partial(self.image.run, one) for one in ran), self.image.left_padding]

    def own_works(self) -> list[Work]:
        self.of_own = self.over(self.own)
        one = passes.own_dtype_pass(self.hooks, self.lengths)

        def run(work: Work) -> None:
            with self.skipping("own_dtype"):
                work()

        return [functools.partial(run, work) for work in self.works(self.of_own, [one])]

    def own_dtype(self) -> None:
        """Where the loader writes what it converts, the model in fp32 goes before the other is loaded."""
        self.image_made.close()
        self.image.finish()
        self.finish_counting()
        self.model = self.side = self.forward = None  # type: ignore[assignment]
        if self.job["own_dtype"] and self.own is None and "own_dtype" not in self.facts["skipped"]:
            with self.skipping("own_dtype"):
                with values_left_on_disk():
                    self.own = own_dtype(self.job, None, self.facts)
                self.read(self.beside(self.own), self.own_works)
        if self.own is not None and "own_dtype" not in self.facts["skipped"]:
            self.tensors |= self.of_own.tensors
        self.own = None


class SpreadReference(Spread, Reference):
    """The base; see :class:`stock_roles.Reference`."""

    without_hooks = "base"

    def measure(self) -> None:
        self.start = None
        self.hooks = passes.all_hooks(self.layers)
        ran = passes.reference_passes(self.layers, self.lengths, self.forward.block_count)
        self.read(self.side, lambda: self.first_reading(ran), self.second_reading)
        self.amplify = self.facts["amplify"] = self.choose_amplification()

    def second_reading(self) -> list[Work]:
        """At the factor that does if the effect grows as the vector, and at ten times that, if one is needed at all."""
        self.tried: list[float] = []

        def note(factor: float) -> float:
            self.tried.append(factor)
            return 0.0 if len(self.tried) == 1 else float("inf")

        passes.choose_factor(self.effect("hook"), self.share(), note)
        image = self.image_works(passes.reference_image_passes(self.layers, self.forward.block_count, 1.0))
        return [*image, *(work for factor in self.tried for work in self.amplified(factor))]

    def amplified(self, factor: float) -> list[Work]:
        ran = passes.amplified_reference(self.layers, self.lengths, factor)
        return self.works(
            self.forward,
            [replace(one, name=self.at(one.name, factor), read_as=self.at(one.read_as, factor)) for one in ran],
        )

    def at(self, name: str, factor: float) -> str:
        return name and f"{name}@{factor:g}"

    def choose_amplification(self) -> float:
        found = self.forward.tensors

        def measure(factor: float) -> float:
            if factor not in self.tried:
                # Once more from the disk, for an effect that does not grow as the vector does.
                self.read(self.side, lambda: self.amplified(factor))
            return self.effect(self.at("hook_amplified", factor))

        chosen = passes.choose_factor(self.effect("hook"), self.share(), measure)
        for name in [name for name in found if "@" in name]:
            value = found.pop(name)
            if f"@{chosen:g}/" in name:
                found[name.replace(f"@{chosen:g}/", "/")] = value
        return chosen


class SpreadCandidate(Spread, Candidate):
    """The finished folder; see :class:`stock_roles.Candidate`."""

    without_hooks = "candidate"

    def measure(self) -> None:
        amplify = self.facts["amplify"] = float(self.job["amplify"])
        ran = passes.candidate_passes(self.layers, self.lengths, amplify)
        self.read(self.side, lambda: self.first_reading(ran), lambda: self.image_works([]))

    def run_one(self, forward: Forward, one: passes.Pass) -> None:
        if one.factor == 1.0:
            forward.run(one)
            return
        changes: dict[str, list[Change]] = {}
        for number, slot in enumerate(self.job["slots"]):
            change = functools.partial(_hold, self.held, number, slot, one.factor)
            changes.setdefault(slot["parameter"], []).append(change)
        with changed({name: functools.partial(_all, several) for name, several in changes.items()}):
            forward.run(one)


def _hold(held: Any, number: int, slot: Any, factor: float, parameter: torch.Tensor) -> None:
    set_factor(parameter, held, number, slot, factor)


def _all(changes: Sequence[Change], parameter: torch.Tensor) -> None:
    for change in changes:
        change(parameter)


def run(jobs: Sequence[dict[str, Any]]) -> None:
    """Run one role after the other."""
    for job in jobs:
        role = (SpreadReference if job["role"] == "reference" else SpreadCandidate)(job)
        role.load()
        role.measure()
        role.own_dtype()
        if isinstance(role, Candidate):
            role.causal_lm()
        role.write()
