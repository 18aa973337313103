"""Whether a carrier's constant is right on this base's residual stream, found out before the copy is written.

The constant is short where the stream is small. What enters block 0 tells whether that can matter. If so, the first
blocks are run on a few hundred tokens, before the model is loaded: that sets the constant. Where it would still fail
the proof, another content or route is taken. With the vectors known, log-probabilities are computed under what the
copy will add, and compared with the hook's.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path

import torch

from patcher.architectures.analysis import Architecture
from patcher.architectures.decoder import decoder_part
from patcher.build.job import Job
from patcher.build.planning import BuildPlan
from patcher.capture.batches import Batch, padded
from patcher.capture.forward import steering_hooks
from patcher.capture.logits import LoadedModel, LogitsJob
from patcher.capture.moments import stream_moments
from patcher.capture.opened import OpenedBase, open_base
from patcher.checkpoint.folder import CheckpointFolder
from patcher.checkpoint.prepare import PreparedBase
from patcher.checkpoint.staging import scratch_folder
from patcher.errors import InputError
from patcher.pairs.vocabulary import with_embeddings
from patcher.routes.carrier.small_streams import ConstantTooShort, SmallStreams
from patcher.routes.constant import ConstantError, moments_of
from patcher.routes.inspection import Inspection
from patcher.routes.plan import Plan
from patcher.routes.planner import choose_route
from patcher.verify.probes import PROBES
from patcher.verify.stock_job import ids_without_tokenizer

PROMPT_TOKENS = 512
"""So many tokens of the recipe's own prompts are looked at, beside the texts of the verification."""
NEGLIGIBLE = 1e-6
"""A relative error of the vector that no proof can see."""
INSPECTED_ROWS = 256
"""Rows of the embedding that an inspection reads."""
_MANY = 128
"""Tokens of a text that are looked at."""
_TEXT = 16


@dataclass(frozen=True)
class Weighing:
    """Weighs the plans of a build on its base.

    Attributes:
        job: the recipe.
        planned: what was decided without the weights.
        base: the base, prepared.
        open_streamed: opens it with a folder for what does not fit in memory; the weights that are used are read.
        moments: layer -> what was measured of the residual stream after it, of each text [tokens, 2].
    """

    job: Job
    planned: BuildPlan
    base: PreparedBase
    open_streamed: Callable[[Path], AbstractContextManager[OpenedBase]]
    moments: dict[int, list[torch.Tensor]] = field(default_factory=dict)

    def before_load(self, plan: Plan) -> Plan:
        """The plan with its constant set for the base's residual stream, or the next best one.

        Of the weights, rows of the embedding are read, and the blocks up to the last steered one where these tell that
        it may matter.

        Raises:
            InputError: no route is left; what its constant would be off by is said.
        """
        if plan.constant is None:
            return plan
        if self.moments.keys() >= plan.sites.keys():
            return self._chosen(plan, self._streams(self.moments), exact=self.job.recipe.exact)
        try:
            with scratch_folder(self.job.output) as scratch, self.open_streamed(scratch) as opened:
                first = _entering(opened, self._rows, plan, plan.constant)
                if (first.worst or 0.0) <= NEGLIGIBLE:
                    return replace(plan, constant=first)
                self.job.say("measuring the residual stream: the inserted block's constant depends on it")
                found = stream_moments(opened.reader.runner, self._rows, sorted(plan.sites), moments_of)
        except InputError as error:
            if error.code != "stream":
                raise
            self.job.note(f"the residual stream is measured when the model is loaded: {error.problems[0].message}")
            return plan
        self.moments.update(found)
        return self._chosen(plan, self._streams(found), exact=self.job.recipe.exact)

    @staticmethod
    def _streams(moments: Mapping[int, list[torch.Tensor]]) -> SmallStreams:
        return SmallStreams({layer: torch.cat(parts) for layer, parts in moments.items()})

    def by_embedding_rows(self, plan: Plan) -> Plan:
        """The plan with what the rows of the embedding say of its constant, as if nothing were added before the block.

        Raises:
            InputError: (code ``stream``) the base cannot be read in parts.
        """
        if plan.constant is None:
            return plan
        with tempfile.TemporaryDirectory() as scratch, self.open_streamed(Path(scratch)) as opened:
            return replace(plan, constant=_entering(opened, self._rows, plan, plan.constant))

    def with_vectors(self, plan: Plan, opened: OpenedBase, vectors: Mapping[int, torch.Tensor]) -> Plan:
        """The same once the vectors are known: their effect tells what a constant that is off by so much will make.

        Args:
            vectors: layer -> [hidden], what the residual stream gains.

        Raises:
            InputError: no route is left.
        """
        constant = plan.constant
        if constant is None or (constant.worst is not None and constant.worst <= NEGLIGIBLE):
            return plan
        checks, _ = self._texts
        moments = self._moments_under(opened, vectors, self._rows)
        expect = partial(_expected, opened, vectors, checks, moments)
        streams = replace(self._streams(moments), expect=expect, tolerance=self.job.recipe.verify.tolerance)
        return self._chosen(plan, streams, exact=self.job.recipe.exact or opened.model is None)

    def _chosen(self, plan: Plan, streams: SmallStreams, *, exact: bool) -> Plan:
        try:
            return streams.weighed(plan)
        except ConstantTooShort as short:
            recipe = self.job.recipe
            again = choose_route(
                self.planned.architecture,
                sorted(plan.sites),
                self.base.checkpoint,
                targets=recipe.targets,
                route=recipe.route,
                exact=exact,
                prefer=recipe.prefer,
                streams=streams,
            )
            self.job.say(f"the `{plan.route}` route would come first, but {short}")
            if again.route == plan.route:
                return again
            return replace(again, advice=(*again.advice, f"the `{plan.route}` route came first, but {short}"))

    @property
    def _rows(self) -> list[list[int]]:
        return [ids for some in self._texts for ids in some]

    @cached_property
    def _texts(self) -> tuple[list[list[int]], list[list[int]]]:
        """Token ids of what the verification will run, and of the recipe's own prompts."""
        tokenizer, embeddings = self.planned.tokenizer, self.planned.architecture.embeddings
        if tokenizer is None:
            return ids_without_tokenizer(decoder_part(self.base.checkpoint.config)), []
        texts = self.job.recipe.verify.probes or PROBES
        checks = [list(tokenizer(text)["input_ids"])[:_MANY] for text in texts]
        prompts: list[list[int]] = []
        for entry in self.planned.prepared:
            both = zip(entry.sides.positive, entry.sides.negative, strict=False)
            for side in (side for sides in both for side in sides):
                if sum(map(len, prompts)) < PROMPT_TOKENS:
                    prompts.append(list(side.ids)[:_MANY])
        return with_embeddings((ids for ids in checks if ids), embeddings), with_embeddings(prompts, embeddings)

    def _moments_under(
        self, opened: OpenedBase, vectors: Mapping[int, torch.Tensor], rows: list[list[int]]
    ) -> Mapping[int, list[torch.Tensor]]:
        """Layer -> those of each row, where the earlier layers have been steered."""
        if len(vectors) == 1 and self.moments.keys() >= vectors.keys():
            return self.moments
        runner = opened.reader.runner
        if opened.model is None:
            return stream_moments(runner, rows, sorted(vectors), moments_of, vectors)
        found: dict[int, list[torch.Tensor]] = {}
        for layer in sorted(vectors):
            earlier = {at: vector for at, vector in vectors.items() if at < layer}
            with steering_hooks(opened.model, opened.blocks, earlier):
                found |= stream_moments(runner, rows, [layer], moments_of)
        return found


def with_embedding_rows(job: Job, planned: BuildPlan) -> BuildPlan:
    """The plan of a dry run with what can be said of a carrier's constant where the base lies on this disk."""
    if planned.plan.constant is None or planned.source.hub or planned.reading.stripped:
        return planned
    checkpoint = CheckpointFolder(planned.source.folder)
    if checkpoint.is_bin:
        return planned
    base = PreparedBase(checkpoint, planned.source.folder, None)
    open_streamed = partial(_streamed, checkpoint, planned.architecture)
    try:
        return replace(planned, plan=Weighing(job, planned, base, open_streamed).by_embedding_rows(planned.plan))
    except InputError as error:
        job.note(f"the embedding was not looked at: {error.problems[0].message}")
        return planned


def inspected_with_embedding_rows(found: Inspection) -> Inspection:
    """The same for an inspection, by rows that lie evenly over the vocabulary; where they cannot be read, as it was."""
    checkpoint, architecture = found.checkpoint, found.architecture
    plans = [plan for plan in (found.best, *(verdict.plan for verdict in found.verdicts)) if plan is not None]
    if architecture is None or checkpoint is None or checkpoint.is_bin or all(plan.constant is None for plan in plans):
        return found
    rows = torch.linspace(0, (architecture.embeddings or 1) - 1, INSPECTED_ROWS).long().view(-1, _TEXT).tolist()

    def looked_at(plan: Plan | None) -> Plan | None:
        if plan is None or plan.constant is None:
            return plan
        return replace(plan, constant=_entering(opened, rows, plan, plan.constant))

    try:
        with (
            tempfile.TemporaryDirectory() as scratch,
            _streamed(checkpoint, architecture, Path(scratch)) as opened,
        ):
            verdicts = tuple(replace(verdict, plan=looked_at(verdict.plan)) for verdict in found.verdicts)
            best = looked_at(found.best)
    except InputError:
        return found
    return replace(found, verdicts=verdicts, best=best, chosen=None if found.chosen is None else best)


def _streamed(
    checkpoint: CheckpointFolder, architecture: Architecture, scratch: Path
) -> AbstractContextManager[OpenedBase]:
    found = (checkpoint.path, checkpoint, architecture)
    return open_base(*found, "stream", dtype=torch.float32, device="cpu", scratch=scratch)


def _entering(opened: OpenedBase, rows: list[list[int]], plan: Plan, constant: ConstantError) -> ConstantError:
    """What the constant is off by if nothing is added to the embedding before the inserted block."""
    entering = torch.cat(stream_moments(opened.reader.runner, rows, [-1], moments_of)[-1])
    return constant.measured(dict.fromkeys(plan.sites, entering), "embedding rows", corrected=False)


def _expected(
    opened: OpenedBase,
    vectors: Mapping[int, torch.Tensor],
    rows: list[list[int]],
    moments: Mapping[int, list[torch.Tensor]],
    plan: Plan,
) -> float:
    """The largest difference of a log-probability between the hook and what the copy will add."""
    constant = plan.constant
    assert constant is not None
    dtype = opened.reader.runner.dtype
    jobs, gained = [], []
    for number, ids in enumerate(rows):
        inputs = Batch(padded([ids], "right", 0)[0], ()).inputs_in(dtype)
        shares = {layer: constant.gained(layer, moments[layer][number]) for layer in vectors}
        short = {layer: (shares[layer].float()[:, None] * vector)[None] for layer, vector in vectors.items()}
        gained += list(shares.values())
        # What half a precision rounds off is more than the difference: there it is the effect that is computed.
        other: Mapping[int, torch.Tensor] = short if dtype == torch.float32 else {}
        jobs += [LogitsJob(inputs, added, torch.arange(len(ids))) for added in (vectors, other)]
    seen: dict[int, torch.Tensor] = {}
    apart = [0.0]

    def use(number: int, logits: torch.Tensor) -> None:
        seen[number] = logits.float().log_softmax(dim=-1)
        if number ^ 1 in seen:
            apart.append(float((seen.pop(number) - seen.pop(number ^ 1)).abs().max()))

    source = opened.logits if opened.model is None else LoadedModel(opened.model, opened.blocks)
    source.logits(jobs, use)
    if dtype == torch.float32:
        return max(apart)
    return max(apart) * float((torch.cat(gained) - 1.0).abs().max())
