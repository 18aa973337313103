"""The part of a build that runs the base: activations, steering vectors, a fitted constant, the evaluation."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from patcher.architectures.config_keys import stated
from patcher.architectures.quantised import quantisation_of
from patcher.build.job import Job
from patcher.build.planning import BuildPlan
from patcher.build.small_streams import Weighing
from patcher.capture.cache.key import capture_key, model_identity
from patcher.capture.cache.store import CaptureCache, Remembering, capture_cache
from patcher.capture.half_precision import turned_to_half
from patcher.capture.model import load_tokenizer, pick_device, pick_dtype
from patcher.capture.opened import Mode, OpenedBase, choose_mode, open_base
from patcher.capture.reader import ResidualReader
from patcher.checkpoint.block_names import block_names, tensors_for_blocks
from patcher.checkpoint.completeness import reading_of
from patcher.checkpoint.folder import CheckpointFolder
from patcher.checkpoint.prepare import PreparedBase
from patcher.checkpoint.source import fetch_blocks
from patcher.checkpoint.staging import scratch_folder
from patcher.errors import InputError
from patcher.evaluate.of_build import evaluate_build
from patcher.pairs.vocabulary import with_embeddings
from patcher.routes.plan import Plan
from patcher.routes.planner import ROUTES
from patcher.vectors.finding import answer_questions, find_vectors
from patcher.vectors.prepared import PreparedVector
from patcher.vectors.steering_vector import SteeringVector, sum_by_layer
from patcher.verify.probes import PROBES

if TYPE_CHECKING:
    from patcher.capture.processes.messages import Processes

Result = TypeVar("Result")
IMAGES = "reading pairs with images"


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
    """Runs the base for a job; made by :meth:`of`.

    Attributes:
        job: what it is run for.
        planned: what was decided without the weights.
        base: the base, prepared.
        identity: of the base, for the cache; None where it cannot be told.
        cache: of captured activations.
    """

    job: Job
    planned: BuildPlan
    base: PreparedBase
    identity: Mapping[str, Any] | None
    cache: CaptureCache

    @classmethod
    def of(cls, job: Job, planned: BuildPlan, base: PreparedBase) -> BaseRun:
        """Before the base is opened, because its files are told apart by their times.

        Raises:
            InputError: ``PATCH_MODEL_CACHE_SIZE`` is no size.
        """
        folder = None if base.adapter is None else base.adapter.folder
        identity = model_identity(planned.source, folder, trust_remote_code=job.recipe.trust_remote_code)
        return cls(job, planned, base, identity, capture_cache(enabled=job.cache))

    def stream_vectors(self) -> list[SteeringVector]:
        """The vectors alone, streamed: of the base, only what is read needs to be there.

        Raises:
            InputError, OutsideError: see :func:`patcher.build.local.build`.
        """
        clock = self.job.clock
        with clock.opening("load", self._opened("stream")) as (opened, reader), clock.time("capture"):
            vectors = self.find_vectors(self.planned.prepared, reader, opened.tokenizer)
        sum_by_layer(vectors)
        return vectors

    def find(self, plan: Plan, vectors: Sequence[SteeringVector] = ()) -> Found:
        """The vectors, the plan with what is fitted, and what the vectors do.

        In a launch of several processes all read activations, and this one does the rest.

        Args:
            plan: the route.
            vectors: if they were found before.

        Raises:
            InputError, OutsideError: see :func:`patcher.build.local.build`.
        """
        if self.job.processes is not None:
            with self.job.clock.time("capture"):
                vectors = self._find_together(self.job.processes)
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
        device, dtype = self.computed_in
        asked = self.job.recipe.capture.mode
        mode = choose_mode(
            asked,
            size=self._loaded_count * dtype.itemsize,
            device=device,
            quantised=quantisation_of(self.base.checkpoint.config) is not None,
            whole="`method: persona`" if self.planned.asks else IMAGES if self.planned.with_images else whole,
        )
        try:
            return self._run_in(mode, work)
        except InputError as error:
            if error.code != "stream" or asked != "auto":
                raise
            self.job.note(f"not streamed: {error.problems[0].message}")
            return self._run_in("spread", work)

    def _run_in(self, mode: Mode, work: Callable[[OpenedBase, ResidualReader], Result]) -> Result:
        with self.job.clock.opening("load", self._opened(mode)) as (opened, reader):
            return work(opened, reader)

    def _in(self, opened: OpenedBase, reader: ResidualReader, plan: Plan, vectors: list[SteeringVector]) -> Found:
        prepared, clock = self.planned.prepared, self.job.clock
        if not vectors:
            with clock.time("capture"):
                prepared = self.answered(opened)
                vectors = self.find_vectors(prepared, reader, opened.tokenizer)
        total = sum_by_layer(vectors)
        with clock.time("capture"):
            plan = self.weighing.with_vectors(plan, opened, total)
        if ROUTES[plan.route].fit is not None:
            with clock.time("capture"):
                plan = self._fitted(plan, opened, total)
        alone = [vector.as_measured for vector in vectors]
        measured = sum_by_layer(alone)
        with clock.time("evaluate"):
            self.measure_in_half(opened)
            evaluation, notes = evaluate_build(
                self.job.loaded, prepared, opened, alone, total, measured, self.job.say, clock
            )
        return Found(vectors, prepared, plan, evaluation, notes)

    def measure_in_half(self, opened: OpenedBase) -> None:
        """Compute in the half precision that the base is stored in, where it is faster and no dtype was asked for."""
        recipe, quantised = self.job.recipe, quantisation_of(self.base.checkpoint.config) is not None
        if opened.model is None or quantised or recipe.dtype != "auto" or not recipe.evaluate.enabled:
            return
        with self.job.clock.time("evaluate.cast"):
            if turned_to_half(opened.model, self.base.stored_dtype):
                self.job.note("what the vectors do is measured in bfloat16, as the base is stored")

    @cached_property
    def computed_in(self) -> tuple[str, torch.dtype]:
        """The device and the dtype of the capture."""
        recipe, base = self.job.recipe, self.base
        device = pick_device(recipe.device)
        return device, pick_dtype(recipe.dtype, self._loaded_count, base.stored_dtype, device)

    @property
    def _loaded_count(self) -> int:
        images = self.planned.with_images
        return self.base.parameter_count if images else self.base.loaded_count(self.planned.architecture)

    @contextmanager
    def _opened(self, mode: Mode) -> Iterator[tuple[OpenedBase, ResidualReader]]:
        device, dtype = self.computed_in
        how = {"memory": "loading", "spread": "loading (what does not fit stays on the disk)", "stream": "streaming"}
        self.job.say(f"{how[mode]} the model ({str(dtype).removeprefix('torch.')}, {device})")
        with scratch_folder(self.job.output) as scratch, self._opened_in(mode, scratch) as opened:
            yield opened, self._remembering(opened.reader, mode, device)

    def _opened_in(self, mode: Mode, scratch: Path) -> AbstractContextManager[OpenedBase]:
        device, dtype = self.computed_in
        return open_base(
            self.base.reference_folder,
            self.base.checkpoint,
            self.planned.architecture,
            mode,
            dtype=dtype,
            device=device,
            scratch=scratch,
            batch_size=self.job.recipe.capture.rows,
            note=self.job.note,
            towers=self.planned.with_images and mode != "stream",
        )

    @cached_property
    def weighing(self) -> Weighing:
        """What weighs a plan on the base's residual stream."""
        return Weighing(self.job, self.planned, self.base, functools.partial(self._opened_in, "stream"))

    def _remembering(self, reader: ResidualReader, mode: Mode, device: str) -> ResidualReader:
        if self.identity is None:
            return reader
        config = self.planned.architecture.config
        key = functools.partial(
            capture_key,
            self.identity,
            dtype=reader.runner.dtype,
            device=device,
            attention=str(stated(config, "_attn_implementation")),
            blocks=self.planned.architecture.blocks,
            settings={"mode": mode, "tokens": reader.tokens, "batch_size": reader.batch_size},
        )
        return replace(reader, memory=Remembering(self.cache, key, self.job.note))

    def answered(self, opened: OpenedBase) -> list[PreparedVector]:
        """The recipe's vectors, with the pairs that the model writes."""
        if not self.planned.asks:
            return self.planned.prepared
        assert opened.model is not None
        seed, say = self.job.recipe.seed, self.job.say
        return answer_questions(self.planned.prepared, opened.model, opened.tokenizer, seed=seed, progress=say)

    def find_vectors(
        self, prepared: Sequence[PreparedVector], reader: ResidualReader, tokenizer: Any
    ) -> list[SteeringVector]:
        """The steering vectors; see :func:`patcher.vectors.finding.find_vectors`."""
        neutral = neutral_tokens(tokenizer, self.planned.architecture.embeddings)
        return find_vectors(prepared, reader, neutral=neutral, progress=self.job.say)

    def _find_together(self, processes: Processes) -> list[SteeringVector]:
        """The vectors, with activations that all processes of a launch read; after it this process is alone."""
        # Not every build of torch knows several processes.
        from patcher.capture.processes.reader import sharded_reader

        recipe, base = self.job.recipe, self.base
        tokenizer = load_tokenizer(base.reference_folder, trust_remote_code=recipe.trust_remote_code)
        with sharded_reader(
            processes,
            self.planned.architecture,
            recipe,
            base,
            self.planned.source,
            last=self.planned.last_read,
            batch_size=recipe.capture.rows,
            say=self.job.say,
        ) as reader:
            return self.find_vectors(self.planned.prepared, reader, tokenizer)

    def _fitted(self, plan: Plan, opened: OpenedBase, total: Mapping[int, torch.Tensor]) -> Plan:
        from patcher.routes.rank_one.calibration import load_calibration

        fit, recipe, say = ROUTES[plan.route].fit, self.job.recipe, self.job.say
        assert opened.model is not None and fit is not None
        say("fitting the constant on calibration text")
        texts = load_calibration(recipe.calibration.texts, self.job.loaded.folder)
        options = {
            "architecture": self.planned.architecture,
            "vectors": total,
            "tokens": recipe.calibration.tokens,
            "seed": recipe.seed,
        }
        return fit(plan, opened.model, opened.tokenizer, texts, progress=say, **options)


def neutral_tokens(tokenizer: Any, embeddings: int | None) -> list[list[int]]:
    """Token ids of texts about nothing, on which residual norms are measured; none without a tokenizer.

    A text is left out that holds a token without an embedding: the model has ``embeddings`` of them.
    """
    if tokenizer is None:
        return []
    return with_embeddings((tokenizer(text)["input_ids"] for text in PROBES), embeddings)


def vectors_before_download(job: Job, planned: BuildPlan) -> list[SteeringVector]:
    """The vectors of a streamed Hub model, before the shards after the last block that is read are downloaded.

    Empty where they have to wait for the whole model.

    Raises:
        InputError, OutsideError: see :func:`patcher.build.local.build`.
    """
    if planned.asks or planned.with_images or ROUTES[planned.plan.route].fit is not None:
        return []  # refused when the mode is chosen, with the reason
    source, last = planned.source, planned.last_read
    names, text = block_names(planned.architecture), f"downloading {source.name} up to block {last}"

    def needed(stored: Collection[str]) -> Collection[str]:
        return tensors_for_blocks(stored, names, last)

    with job.clock.time("load"):
        source = fetch_blocks(source.name, source.revision, needed, say=job.say, text=text)
    checkpoint = CheckpointFolder(source.folder, partial=True)
    if checkpoint.is_bin or reading_of(source, trust_remote_code=job.recipe.trust_remote_code).stripped:
        return []
    base = PreparedBase(checkpoint, source.folder, None)
    return BaseRun.of(job, replace(planned, source=source), base).stream_vectors()
