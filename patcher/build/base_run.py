"""The part of a build that runs the base: activations, steering vectors, a fitted constant, the evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from patcher.architectures.quantised import quantisation_of
from patcher.build.result import Clock, DryRun
from patcher.capture.cache.key import model_identity
from patcher.capture.cache.of_model import Remembering
from patcher.capture.cache.store import CaptureCache
from patcher.capture.model import load_tokenizer, pick_device, pick_dtype
from patcher.capture.opened import Mode, OpenedBase, choose_mode, open_base
from patcher.capture.processes.launch import Processes
from patcher.capture.processes.reader import shared_reader
from patcher.capture.reader import ResidualReader
from patcher.checkpoint.block_names import block_names, tensors_for_blocks
from patcher.checkpoint.folder import CheckpointFolder
from patcher.checkpoint.prepare import PreparedBase
from patcher.checkpoint.source import fetch_blocks
from patcher.checkpoint.staging import scratch_folder
from patcher.errors import InputError
from patcher.evaluate.details import Looked
from patcher.evaluate.of_build import evaluate_build
from patcher.recipe.schema import Recipe
from patcher.routes.plan import Plan
from patcher.routes.planner import ROUTES
from patcher.vectors import SteeringVector
from patcher.vectors.finding import PreparedVector, answer_questions, find_vectors, sum_by_layer
from patcher.verify.probes import PROBES

Say = Callable[[str], None]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Found:
    """What the base was run for.

    Attributes:
        vectors: the steering vectors.
        prepared: the recipe's vectors with the pairs that they were made of.
        plan: the route, its constant fitted where it has one.
        evaluation: what was measured, or None.
        notes: what the user should know.
    """

    vectors: list[SteeringVector]
    prepared: list[PreparedVector]
    plan: Plan
    evaluation: dict[str, Any] | None
    notes: list[str]


@dataclass(frozen=True)
class BaseRun:
    """Runs the base for a build.

    Attributes:
        recipe: of the build.
        recipe_path: inputs are relative to it.
        planned: what the dry run found.
        base: the base, prepared.
        scratch: a folder on a disk with room.
        clock: takes the time.
        say: called with a line about what is going on.
        note: called with what ``-v`` shows.
        cache: of captured activations.
        identity: of the base, for the cache; None where it cannot be told.
    """

    recipe: Recipe
    recipe_path: Path
    planned: DryRun
    base: PreparedBase
    scratch: Path
    clock: Clock
    say: Say
    note: Say
    cache: CaptureCache
    identity: Mapping[str, Any] | None

    def stream_vectors(self) -> list[SteeringVector]:
        """The vectors alone, streamed: of the base, only what is read needs to be there.

        Raises:
            InputError, OutsideError: see :func:`patcher.build.local.build`.
        """
        device, dtype = self._device_and_dtype()
        with self.clock.time("capture"), self._opening("stream", dtype, device) as opened:
            reader = self._remembering(opened.reader, "stream", device)
            vectors = self._find_vectors(self.planned.prepared, reader, opened.tokenizer)
        sum_by_layer(vectors)
        return vectors

    def find(self, plan: Plan, processes: Processes | None = None, vectors: Sequence[SteeringVector] = ()) -> Found:
        """The vectors, the plan with what is fitted, and what the vectors do.

        Args:
            plan: the route.
            processes: of a launch of several; all read activations, this one does the rest.
            vectors: if they were found before.

        Raises:
            InputError, OutsideError: see :func:`patcher.build.local.build`.
        """
        if processes is not None:
            with self.clock.time("capture"):
                vectors = self._find_together(processes)
        fitted = None if ROUTES[plan.route].fit is None else "the fitted route"
        return self.run(lambda opened, reader: self._in(opened, reader, plan, list(vectors)), whole=fitted)

    def run(self, work: Callable[[OpenedBase, ResidualReader], Result], whole: str | None = None) -> Result:
        """Do ``work`` with the base, opened where it fits, and with what reads its residuals or remembers them.

        Work that finds a base cannot be streamed exactly is begun again on one that is spread over memory and disk.

        Args:
            whole: what needs the model whole, for errors; or None.

        Raises:
            InputError, OutsideError: see :func:`patcher.build.local.build`.
        """
        device, dtype = self._device_and_dtype()
        mode = choose_mode(
            self.recipe.capture.mode,
            size=self.base.parameter_count * dtype.itemsize,
            device=device,
            quantised=quantisation_of(self.base.checkpoint.config) is not None,
            whole="`method: persona`" if any(entry.asked for entry in self.planned.prepared) else whole,
        )
        try:
            return self._run_in(mode, dtype, device, work)
        except InputError as error:
            if error.code != "stream" or self.recipe.capture.mode != "auto":
                raise
            self.note(f"not streamed: {error.problems[0].message}")
            return self._run_in("spread", dtype, device, work)

    def _run_in(
        self, mode: Mode, dtype: torch.dtype, device: str, work: Callable[[OpenedBase, ResidualReader], Result]
    ) -> Result:
        with ExitStack() as stack:
            with self.clock.time("load"):
                opened = stack.enter_context(self._opening(mode, dtype, device))
            return work(opened, self._remembering(opened.reader, mode, device))

    def _in(self, opened: OpenedBase, reader: ResidualReader, plan: Plan, vectors: list[SteeringVector]) -> Found:
        prepared = self.planned.prepared
        if not vectors:
            with self.clock.time("capture"):
                prepared = self.answered(opened)
                vectors = self._find_vectors(prepared, reader, opened.tokenizer)
        total = sum_by_layer(vectors)
        if ROUTES[plan.route].fit is not None:
            with self.clock.time("capture"):
                plan = self._fitted(plan, opened, total)
        architecture = self.planned.architecture
        evaluation, notes = evaluate_build(
            self.recipe,
            prepared,
            Looked(opened.logits, opened.model, architecture.blocks, opened.tokenizer, opened.positions),
            total,
            recipe_folder=self.recipe_path.parent,
            progress=self.say,
        )
        return Found(vectors, prepared, plan, evaluation, notes)

    def _device_and_dtype(self) -> tuple[str, torch.dtype]:
        device = pick_device(self.recipe.device)
        return device, pick_dtype(self.recipe.dtype, self.base.parameter_count, self.base.stored_dtype, device)

    def _opening(self, mode: Mode, dtype: torch.dtype, device: str) -> AbstractContextManager[OpenedBase]:
        how = {"memory": "loading", "spread": "loading (what does not fit stays on the disk)", "stream": "streaming"}
        self.say(f"{how[mode]} the model ({str(dtype).removeprefix('torch.')}, {device})")
        return open_base(
            self.base.reference_folder,
            self.base.checkpoint,
            self.planned.architecture,
            mode,
            dtype=dtype,
            device=device,
            scratch=self.scratch,
            batch_size=_rows(self.recipe),
            note=self.note,
        )

    def _remembering(self, reader: ResidualReader, mode: Mode, device: str) -> ResidualReader:
        if self.identity is None:
            return reader
        config = self.planned.architecture.config
        memory = Remembering(
            self.cache,
            self.identity,
            dtype=reader.runner.dtype,
            device=device,
            attention=str(getattr(config, "_attn_implementation", None)),
            blocks=self.planned.architecture.blocks,
            settings={"mode": mode, "tokens": reader.tokens, "batch_size": reader.batch_size},
            note=self.note,
        )
        return replace(reader, memory=memory)

    def answered(self, opened: OpenedBase) -> list[PreparedVector]:
        """The recipe's vectors, with the pairs that the model writes."""
        prepared = self.planned.prepared
        if not any(entry.asked for entry in prepared):
            return prepared
        assert opened.model is not None
        return answer_questions(
            prepared,
            opened.model,
            opened.tokenizer,
            recipe=self.recipe,
            recipe_name=self.recipe_path.name,
            progress=self.say,
        )

    def _find_vectors(
        self, prepared: list[PreparedVector], reader: ResidualReader, tokenizer: Any
    ) -> list[SteeringVector]:
        neutral = [tokenizer(text)["input_ids"] for text in PROBES] if tokenizer is not None else []
        folder = self.recipe_path.parent
        return find_vectors(prepared, reader, recipe_folder=folder, neutral=neutral, progress=self.say)

    def _find_together(self, processes: Processes) -> list[SteeringVector]:
        """The vectors, with activations that all processes of a launch read; after it this process is alone."""
        recipe, base, prepared = self.recipe, self.base, self.planned.prepared
        tokenizer = load_tokenizer(base.reference_folder, trust_remote_code=recipe.trust_remote_code)
        with shared_reader(
            processes,
            self.planned.architecture,
            folder=base.reference_folder,
            source=self.planned.source,
            last=max(layer for entry in prepared for layer in entry.read_layers.values()),
            parallel=recipe.capture.parallel,
            device=recipe.device,
            dtype=recipe.dtype,
            parameters=base.parameter_count,
            stored=base.stored_dtype,
            batch_size=_rows(recipe),
            say=self.say,
        ) as reader:
            return self._find_vectors(prepared, reader, tokenizer)

    def _fitted(self, plan: Plan, opened: OpenedBase, total: Mapping[int, torch.Tensor]) -> Plan:
        from patcher.routes.rank_one.calibration import load_calibration

        fit = ROUTES[plan.route].fit
        assert opened.model is not None and fit is not None
        self.say("fitting the constant on calibration text")
        texts = load_calibration(self.recipe.calibration.texts, self.recipe_path.parent)
        tokens, seed = self.recipe.calibration.tokens, self.recipe.seed
        options = {"architecture": self.planned.architecture, "vectors": total, "tokens": tokens}
        return fit(plan, opened.model, opened.tokenizer, texts, seed=seed, progress=self.say, **options)


def vectors_before_download(
    recipe: Recipe,
    recipe_path: Path,
    planned: DryRun,
    output: Path,
    clock: Clock,
    say: Say,
    note: Say,
    cache: CaptureCache,
) -> list[SteeringVector]:
    """The vectors of a streamed Hub model, before the shards after the last block that is read are downloaded.

    Empty where they have to wait for the whole model.

    Raises:
        InputError, OutsideError: see :func:`patcher.build.local.build`.
    """
    reads = {layer for entry in planned.prepared for layer in entry.read_layers.values()}
    if any(entry.asked for entry in planned.prepared) or ROUTES[planned.plan.route].fit is not None:
        return []  # refused when the mode is chosen, with the reason
    say(f"downloading {planned.source.name} up to block {max(reads)}")
    names = block_names(planned.architecture)
    with clock.time("load"):
        source = fetch_blocks(
            planned.source.name, planned.source.revision, lambda stored: tensors_for_blocks(stored, names, max(reads))
        )
    checkpoint = CheckpointFolder(source.folder, partial=True)
    if checkpoint.is_bin:
        return []
    base = PreparedBase(checkpoint, source.folder, None)
    identity = model_identity(source, trust_remote_code=recipe.trust_remote_code)
    with scratch_folder(output) as scratch:
        return BaseRun(recipe, recipe_path, planned, base, scratch, clock, say, note, cache, identity).stream_vectors()


def _rows(recipe: Recipe) -> int | None:
    return None if recipe.capture.batch_size == "auto" else recipe.capture.batch_size
