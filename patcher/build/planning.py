"""The plan of a build: everything that can be decided and checked without the weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from patcher.architectures.analysis import Architecture
from patcher.architectures.config_keys import stated
from patcher.build.adapted_base import look_at_base
from patcher.build.fed_texts import check_fed_texts
from patcher.build.job import Job
from patcher.checkpoint.adapter_folder import AdapterFolder
from patcher.checkpoint.completeness import Reading, reading_of
from patcher.checkpoint.folder import CheckpointFolder
from patcher.checkpoint.prepare import find_model
from patcher.checkpoint.source import Source, fetch
from patcher.checkpoint.staging import check_output
from patcher.disk.json_files import read_json_object
from patcher.evaluate.inputs import check_evaluation_inputs, own_pairs
from patcher.pairs.image_prompts import ImagePrompts
from patcher.recipe.file import LoadedRecipe
from patcher.recipe.schema import Recipe
from patcher.routes.plan import Plan
from patcher.routes.planner import ROUTES, choose_route, with_next_best
from patcher.vectors.files.asked import SteeredModel
from patcher.vectors.finding import prepare_vectors
from patcher.vectors.layers import resolve_layers
from patcher.vectors.prepared import PreparedVector
from patcher.verify.of_build import require_stacks

Checkpoint = TypeVar("Checkpoint", bound=CheckpointFolder)


@dataclass(frozen=True)
class BuildPlan:
    """What a build does; ``--dry-run`` stops here.

    Attributes:
        source: the base. Of a Hub model only small files are here, until :func:`with_weights`.
        architecture: of the base, with the adapter's vocabulary.
        plan: the route.
        prepared: the recipe's vectors, their pairs read and split.
        output: where the copy goes.
        notes: what the user should know.
        about_tokenizer: those of them that tell of a tokenizer which does not go with the model in every way.
        tokenizer: what prompts are read with, or None.
        adapter: what is merged into the base first, or None.
        reading: how the base's tensors are read.
        with_images: whether any pair has an image.
    """

    source: Source
    architecture: Architecture
    plan: Plan
    prepared: list[PreparedVector]
    output: Path
    notes: list[str]
    reading: Reading
    about_tokenizer: tuple[str, ...] = field(default=(), kw_only=True)
    tokenizer: Any = field(default=None, kw_only=True)
    adapter: AdapterFolder | None = field(default=None, kw_only=True)
    with_images: bool = field(default=False, kw_only=True)

    @property
    def asks(self) -> bool:
        """Whether the model has to write pairs first (`method: persona`)."""
        return any(entry.asked for entry in self.prepared)

    def settled(self, job: Job) -> Job:
        """The job with what the recipe leaves to the day of the build, so that its manifest says it."""
        days = [{"template_date": entry.spec.template_date} for entry in self.prepared]
        specs = [spec.model_copy(update=day) for spec, day in zip(job.recipe.vectors, days, strict=True)]
        return replace(job, loaded=job.loaded.changed(vectors=specs))

    @property
    def last_read(self) -> int:
        """The last layer whose residuals are read."""
        return max(layer for entry in self.prepared for layer in entry.read_layers.values())

    def as_json(self) -> dict[str, Any]:
        return {
            "model": self.source.name,
            "revision": self.source.revision,
            "architecture": self.architecture.class_name,
            "blocks": self.architecture.block_count,
            "hidden": self.architecture.hidden,
            "route": self.plan.as_json(),
            "vectors": [
                {
                    "name": entry.spec.name,
                    "method": entry.spec.method,
                    "layers": list(entry.layers),
                    "read_layers": [entry.read_layers[layer] for layer in entry.layers],
                    "coefficient": entry.spec.coefficient,
                    "scale": entry.spec.scale,
                    "pairs": entry.pair_count,
                    "held_out": entry.held_out_count,
                    "refit": entry.spec.refit,
                    **({} if not entry.image_count else {"images": entry.image_count}),
                    **({} if entry.lists is None else {"lists": entry.lists.counts()}),
                }
                for entry in self.prepared
            ],
            "output": str(self.output),
            "notes": self.notes,
        }


def plan_build(job: Job, *, writes: bool = True) -> BuildPlan:
    """Everything that can be decided and checked without the weights; of a Hub model only small files are fetched.

    Args:
        writes: whether a folder is to be written, and must not be in the way.

    Raises:
        InputError: anything that would stop the build before its real work.
    """
    recipe, loaded = job.recipe, job.loaded
    job.say("reading the model's config")
    require_stacks(recipe)
    source = find_model(recipe.model, loaded.folder, weights=False)
    if writes:
        check_output(job.output, force=job.force, inputs=(source.folder,))
    base = look_at_base(loaded, source)
    architecture, tokenizer, adapter = base.architecture, base.tokenizer, base.adapter
    job.say("checking the contrast pairs and the route")
    layers = all_layers(loaded, architecture.block_count)
    # What is stored has the base's vocabulary, or names of its own; once it is as it will be copied, the route is
    # planned again.
    known = not (source.hub or base.resized or base.reading.stripped)
    checkpoint = CheckpointFolder(source.folder) if known else None
    plan = next_to(recipe, architecture, layers, checkpoint, route_for(recipe, architecture, layers, checkpoint))
    model = steered_model(architecture, source)
    images = ImagePrompts(source.folder, tokenizer, architecture, trust_remote_code=recipe.trust_remote_code)
    prepared = prepare_vectors(loaded, tokenizer, architecture.block_count, model, images)
    about = check_fed_texts(loaded, prepared, tokenizer, architecture, fits=ROUTES[plan.route].fit is not None)
    notes = [
        *base.reading.notes,
        *(adapter.notes if adapter else ()),
        *about,
        *(note for entry in prepared for note in entry.notes),
    ]
    notes += check_evaluation_inputs(loaded, prepared)
    notes += [
        f"vector `{spec.name}`: its `auto` is chosen by a sweep; until then 40 % depth and coefficient 1 stand for it"
        for spec in recipe.vectors
        if spec.swept
    ]
    return BuildPlan(
        source,
        architecture,
        plan,
        prepared,
        job.output,
        notes,
        base.reading,
        about_tokenizer=tuple(about),
        tokenizer=tokenizer,
        adapter=adapter,
        with_images=_with_images(loaded, prepared),
    )


def _with_images(loaded: LoadedRecipe, prepared: Sequence[PreparedVector]) -> bool:
    own = own_pairs(loaded) if loaded.recipe.evaluate.enabled else []
    pairs = [*own, *(pair for entry in prepared for pair in (*entry.used, *entry.held_out))]
    return any(pair.image is not None for pair in pairs)


def with_weights(job: Job, planned: BuildPlan) -> BuildPlan:
    """The same plan, the base's weights downloaded.

    Raises:
        InputError, OutsideError: see :func:`patcher.checkpoint.source.fetch` and
            :func:`patcher.checkpoint.completeness.reading_of`.
    """
    source = planned.source
    if not source.hub:
        return planned
    with job.clock.time("load"):
        source = fetch(source.name, source.revision, weights=True, say=job.say)
    return replace(planned, source=source, reading=reading_of(source, trust_remote_code=job.recipe.trust_remote_code))


def all_layers(loaded: LoadedRecipe, block_count: int) -> list[int]:
    """The layers that any vector of the recipe is added at, ascending; -1 is the embedding.

    Raises:
        InputError: see :func:`patcher.vectors.layers.resolve_layers`.
    """
    layers: set[int] = set()
    for index, spec in enumerate(loaded.recipe.vectors):
        layers.update(resolve_layers(spec, block_count, loaded.place(f"vectors.{index}")))
    return sorted(layers)


def steered_model(architecture: Architecture, source: Source) -> SteeredModel:
    """What vectors from files are held against."""
    origin = str(stated(architecture.checkpoint_config, "_name_or_path", "") or "")
    names = (source.name, *([origin] if origin and not Path(origin).is_absolute() else []))
    # Of a model that takes images, the files of other tools may have the name of the whole.
    whole = read_json_object(source.folder / "config.json").get("model_type")
    kinds = dict.fromkeys([architecture.model_type, *([whole] if isinstance(whole, str) else [])])
    return SteeredModel(architecture.hidden, architecture.block_count, tuple(kinds), names)


def route_for(
    recipe: Recipe,
    architecture: Architecture,
    layers: list[int],
    checkpoint: CheckpointFolder | None,
    without: Mapping[str, str] | None = None,
) -> Plan:
    """The route that the recipe asks for.

    Args:
        without: exact routes whose proof failed, and why they are out; another exact one is wanted.

    Raises:
        InputError: see :func:`patcher.routes.planner.choose_route`.
    """
    return choose_route(
        architecture,
        layers,
        checkpoint,
        targets=recipe.targets,
        route="auto" if without else recipe.route,
        exact=recipe.exact or bool(without),
        prefer=recipe.prefer,
        without=without or {},
    )


def next_to(
    recipe: Recipe,
    architecture: Architecture,
    layers: list[int],
    checkpoint: CheckpointFolder | None,
    plan: Plan,
    without: Mapping[str, str] | None = None,
) -> Plan:
    """With what would be next in the planner's order, for whoever reads of the route that is taken.

    Args:
        without: routes that are out of the question, and why.
    """
    wanted: dict[str, Any] = {"targets": recipe.targets, "exact": recipe.exact, "prefer": recipe.prefer}
    return with_next_best(plan, architecture, layers, checkpoint, **wanted, without=without or {})


def planned_again(
    job: Job,
    planned: BuildPlan,
    checkpoint: Checkpoint,
    plan_with: Callable[[Recipe, Architecture, list[int], Checkpoint], Plan],
) -> Plan:
    """The route that was chosen, planned once more now that there is more of the base: after a download, a merge.

    Args:
        plan_with: :func:`route_for`, or what a remote build has in its place.

    Raises:
        InputError: see :func:`patcher.routes.planner.choose_route`.
    """
    forced = job.recipe.model_copy(update={"route": planned.plan.route})
    plan = plan_with(forced, planned.architecture, sorted(planned.plan.sites), checkpoint)
    return replace(plan, advice=planned.plan.advice, next_best=planned.plan.next_best)
