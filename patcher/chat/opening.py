"""The base in memory and the vectors for it: of a patched folder, of a recipe, or of what a sweep chose."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from patcher.architectures.analysis import Architecture
from patcher.architectures.quantised import quantisation_of
from patcher.build.base_run import BaseRun
from patcher.build.job import Job
from patcher.build.planning import plan_build, with_weights
from patcher.capture.model import load_causal_lm, pick_device, pick_dtype, require_tokenizer
from patcher.capture.opened import OpenedBase, choose_mode
from patcher.capture.reader import ResidualReader
from patcher.chat.given import recipe_or_folder, require_recipe_options
from patcher.chat.prompting import reading_of
from patcher.chat.steering import Steering, named_layers
from patcher.chat.writing import Writer
from patcher.checkpoint.folder import CheckpointFolder
from patcher.checkpoint.prepare import PreparedBase, prepared_base, read_config, temporary_base
from patcher.errors import InputError
from patcher.evaluate.scoring import Vectors
from patcher.pairs.templates import Reading, has_template, require_known, source_notes
from patcher.patched.base import recorded_adapter, recorded_base, require_recorded
from patcher.patched.reading import read_manifest
from patcher.patched.stored import read_stored
from patcher.progress.stage import Say
from patcher.recipe.file import load_recipe
from patcher.vectors.prepared import PreparedVector
from patcher.vectors.steering_vector import sum_by_layer

Result = TypeVar("Result")
_CHAT = "chat needs one"


@dataclass(frozen=True)
class Options:
    """How models are opened; ``None`` is what the folder or the recipe says.

    Attributes:
        base, adapter: where they are now, for a patched folder.
        overrides: ``key=value`` for a recipe.
        baked: load the patched folder itself beside the base, instead of a hook on the base.
        cache: whether a recipe's activations that were captured before are taken again.
        switches: of the chat template, set over those that the vector was made with.
    """

    base: str | None = None
    adapter: str | None = None
    overrides: tuple[str, ...] = ()
    device: str | None = None
    dtype: str | None = None
    trust_remote_code: bool = False
    baked: bool = False
    cache: bool = True
    switches: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Opened:
    """What writes, and what is added to it.

    Attributes:
        name: of the base, for people.
        base: the base model.
        patched: the patched folder itself, where it was asked for.
        steering: the vectors.
        notes: what the user should know.
        reading: how the chat template is read.
    """

    name: str
    base: Writer
    patched: Writer | None
    steering: Steering
    notes: tuple[str, ...]
    reading: Reading


def with_opened(path: Path, options: Options, use: Callable[[Opened], Result], say: Say) -> Result:
    """Call ``use`` with the opened models; after it their memory is free again.

    Args:
        path: a patched folder, a recipe, or the folder of a sweep, whose chosen recipe is taken.

    Raises:
        InputError: it is none of these, or what it needs is not there.
        OutsideError: the Hub, the disk or the memory failed.
    """
    path = recipe_or_folder(path)
    if path.is_file():
        return _with_recipe(path, options, use, say)
    return _with_folder(path, options, use, say)


def _with_folder(folder: Path, options: Options, use: Callable[[Opened], Result], say: Say) -> Result:
    if options.overrides:
        raise InputError("a patched folder has no keys to set", where="--set", remedy="give its recipe instead")
    manifest = read_manifest(folder)
    vectors = {layer: held.stored for layer, held in read_stored(folder, manifest).items()}
    source = recorded_base(manifest, options.base, say)
    require_recorded(source.folder, manifest, say)
    merged = recorded_adapter(manifest, options.adapter)
    trusted = options.trust_remote_code
    with ExitStack() as stack:
        stripped = manifest.base.stripped or ()
        reference = stack.enter_context(temporary_base(source, merged, trust_remote_code=trusted, stripped=stripped))
        say("reading the model's config")
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="patch-model-chat-")))
        architecture = Architecture(read_config(reference, trust_remote_code=trusted), trust_remote_code=trusted)
        # Of the copy, because that is safetensors in any case; the base has the same tensors.
        like = PreparedBase(CheckpointFolder(folder), reference, merged)
        base = _loaded(reference, like, options, scratch, architecture, say, "the base", hooked=True)
        patched = fixed = None
        if options.baked:
            fixed = InputError(
                "with --baked the patched folder itself is run, and its vector is fixed",
                where="--baked",
                remedy="leave --baked out: a hook on the base then adds the vector, at any coefficient",
                code="baked",
            )
            patched = _loaded(folder, like, options, scratch, architecture, say, "the patched folder", hooked=False)
        route = manifest.route
        notes: tuple[str, ...] = ()
        if not route.exact and not options.baked:
            notes = (f"route {route.name} is fitted: the folder comes close to this hook; --baked shows the folder",)
        notes += tuple(source_notes(base.tokenizer)) if has_template(base.tokenizer) else ()
        steering = Steering(
            vectors=vectors,
            coefficients={edit.name: edit.coefficient or 1.0 for edit in manifest.edits},
            origin="baked",
            block_count=architecture.block_count,
            move=lambda layer: _carried(vectors, layer),
            moved="the same vector is added there; a recipe's would be computed for that layer",
            fixed=fixed,
        )
        reading = _reading(list(manifest.resolved.get("vectors") or []), options, base)
        return use(Opened(source.name, base, patched, steering, notes, reading))


def _reading(vectors: Sequence[Mapping[str, Any]], options: Options, writer: Writer) -> Reading:
    if options.switches:
        require_known(options.switches, writer.tokenizer, "--switch")
    return reading_of(vectors, options.switches)


def _carried(vectors: Vectors, layer: int) -> Vectors:
    if len(vectors) > 1:
        raise InputError(
            "the folder has a vector of its own for each of several layers, and these are not moved",
            where="layer",
            found=named_layers(tuple(sorted(vectors))),
            remedy="give its recipe instead: vectors are then computed for the layer",
        )
    return dict.fromkeys([layer], *vectors.values())


def _loaded(
    folder: Path,
    like: PreparedBase,
    options: Options,
    scratch: Path,
    architecture: Architecture,
    say: Say,
    what: str,
    *,
    hooked: bool,
) -> Writer:
    count = like.loaded_count(architecture)
    device = pick_device(options.device or "auto")
    dtype = pick_dtype(options.dtype or "auto", count, like.stored_dtype, device)
    mode = choose_mode(
        "auto",
        size=count * dtype.itemsize,
        device=device,
        quantised=quantisation_of(like.checkpoint.config) is not None,
        whole="chat",
    )
    how = " (what does not fit stays on the disk)" if mode == "spread" else ""
    say(f"loading {what}{how} ({str(dtype).removeprefix('torch.')}, {device})")
    model, tokenizer = load_causal_lm(
        folder,
        dtype=dtype,
        device="auto" if mode == "spread" else device,
        offload=scratch / what.replace(" ", "-") if mode == "spread" else None,
        trust_remote_code=options.trust_remote_code,
    )
    return Writer(model, architecture.blocks if hooked else "", require_tokenizer(tokenizer, _CHAT, str(folder)))


def _with_recipe(path: Path, options: Options, use: Callable[[Opened], Result], say: Say) -> Result:
    require_recipe_options(path, base=options.base, adapter=options.adapter, baked=options.baked)
    loaded = load_recipe(path, options.overrides)
    asked = {key: getattr(options, key) for key in ("device", "dtype", "trust_remote_code")}
    loaded = loaded.changed(**{key: value for key, value in asked.items() if value})
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="patch-model-chat-"))) / "chat"
        job = Job(loaded, place, say, cache=options.cache)
        planned = with_weights(job, plan_build(job, writes=False))
        base = stack.enter_context(
            prepared_base(planned.source, loaded, place, say, planned.adapter, planned.reading.stripped)
        )
        run = BaseRun.of(job, planned, base)

        def work(opened: OpenedBase, reader: ResidualReader) -> Result:
            prepared = run.answered(opened)
            count = planned.architecture.block_count

            def find(vectors: list[PreparedVector]) -> Vectors:
                return sum_by_layer(run.find_vectors(vectors, reader, opened.tokenizer))

            steering = Steering(
                vectors=find(prepared),
                coefficients={spec.name: spec.factor for spec in loaded.recipe.vectors},
                origin="recipe",
                block_count=count,
                move=lambda layer: find([entry.at_layers([layer], count) for entry in prepared]),
                moved="the vector is the one that the recipe's pairs (or file) give there",
            )
            swept = [spec.name for spec in loaded.recipe.vectors if spec.swept]
            notes = [f"vector `{name}`: no sweep has chosen yet; this is a stand-in for `auto`" for name in swept]
            notes += [*planned.reading.notes, *base.notes, *(note for entry in prepared for note in entry.notes)]
            tokenizer = require_tokenizer(opened.tokenizer, _CHAT, str(planned.source.folder))
            writer = Writer(opened.model, planned.architecture.blocks, tokenizer)
            reading = _reading([entry.spec.model_dump(mode="json") for entry in prepared], options, writer)
            return use(Opened(planned.source.name, writer, None, steering, tuple(notes), reading))

        return run.run(work, whole="chat")
