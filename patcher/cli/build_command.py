"""``patch-model RECIPE``: the whole build."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from patcher.cli.options import quiet as quiet_option
from patcher.cli.options import refuse_both

if TYPE_CHECKING:
    from patcher.build.job import Job
    from patcher.build.planning import BuildPlan
    from patcher.build.result import BuildResult
    from patcher.capture.processes.messages import Processes


@click.command("build", short_help="Build what a recipe describes.")
@click.argument("recipe", metavar="RECIPE", type=click.Path(path_type=Path))
@click.option("-o", "--output", metavar="DIR", type=click.Path(path_type=Path), help="The folder to write.")
@click.option(
    "--set", "overrides", metavar="KEY=VALUE", multiple=True, help="Change a recipe key: vectors.0.coefficient=2."
)
@click.option("--dry-run", is_flag=True, help="Check everything and print the plan; load no weights, write nothing.")
@click.option("--force", is_flag=True, help="Replace the output if patch-model wrote it. Skips no check.")
@click.option(
    "--link",
    is_flag=True,
    help="Place unchanged weight files as hard links to the base's: no bytes are copied, but whoever writes to one in "
    "the output writes to the base.",
)
@click.option(
    "--strict", is_flag=True, help="Exit 1 if the effect is not beyond random vectors, or the damage beyond the guard."
)
@click.option("--no-hash", is_flag=True, help="Do not record the hashes of the base's files.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
@click.option("--no-cache", is_flag=True, help="Read all activations anew, and keep none for the next run.")
@quiet_option
@click.option(
    "-v", "--verbose", is_flag=True, help="Also say how activations are read: what is shared, cached, streamed."
)
@click.pass_obj
def build(began: float | None, /, recipe: Path, dry_run: bool, **options: Any) -> None:
    """Compute the steering vectors of RECIPE (a YAML file), bake them into a copy of the model, and verify the copy.

    Exit status: 0 the folder is there and verified, 1 a check failed, 2 something in the input is wrong, 3 the Hub,
    the disk or the memory failed. Unless it is 0, no output folder appears.
    """
    from patcher.capture.processes.launch import world

    here = world()
    if not here.several or dry_run:
        _build(recipe, began, dry_run=dry_run, processes=None, **options)
        return

    from patcher.capture.processes.messages import Processes, one_voice
    from patcher.capture.processes.runner import assist

    processes = Processes(here)
    with one_voice(processes):
        if here.rank == 0:
            _build(recipe, began, dry_run=False, processes=processes, **options)
        else:
            assist(processes)


def _build(
    recipe: Path,
    began: float | None,
    *,
    output: Path | None,
    overrides: tuple[str, ...],
    dry_run: bool,
    force: bool,
    as_json: bool,
    no_cache: bool,
    link: bool,
    no_hash: bool,
    strict: bool,
    quiet: bool,
    verbose: bool,
    processes: Processes | None,
) -> None:
    refuse_both(verbose, quiet)
    from patcher.build.early_checks import check_early, is_remote
    from patcher.cli.progress import progress
    from patcher.recipe.file import load_recipe

    loaded = load_recipe(recipe, overrides)
    remote = is_remote(loaded.recipe, output)
    folder = output or Path(loaded.recipe.output or f"{loaded.recipe.model_name}-steered")
    if remote:
        _refuse_options({"--force": force, "--link": link, "--no-hash": no_hash, "--strict": strict})
    check_early(loaded, None if remote else folder, force=force)

    # These import torch.
    from patcher.build.job import Job
    from patcher.cli.plan_report import print_plan
    from patcher.cli.report import print_build
    from patcher.progress.clock import Clock

    with ExitStack() as stack:
        if remote:
            place = stack.enter_context(tempfile.TemporaryDirectory(prefix="patch-model-remote-"))
            folder = Path(place).resolve() / "build"
        with progress(verbose, quiet) as say:
            clock, cache = Clock(began), not no_cache
            job = Job(loaded, folder, say, say.note, force=force, cache=cache, processes=processes, clock=clock)
            if dry_run:
                planned = _planned(job, remote=remote)
            elif remote:
                from patcher.build.remote import remote_build

                result = remote_build(job)
            else:
                result = _here(job, link=link, hash=not no_hash, strict=strict)
    if not dry_run:
        print_build(result, to_stderr=as_json, linked=link)
    elif not as_json:
        print_plan(planned)
    if as_json:
        click.echo(json.dumps(planned.as_json() if dry_run else result.as_json()))


def _here(job: Job, *, link: bool, hash: bool, strict: bool) -> BuildResult:
    from patcher.build.local import build as run

    swept = None
    if any(spec.swept for spec in job.recipe.vectors):
        from patcher.sweep.auto import fill_in

        require_alone(job.processes, job.loaded.path)
        job, swept = fill_in(job)
    return run(job, link=link, hash=hash, strict=strict, sweep=swept)


def _planned(job: Job, *, remote: bool) -> BuildPlan:
    if remote:
        from patcher.build.remote_planning import plan_remote_build

        return plan_remote_build(job)
    from patcher.build.planning import plan_build
    from patcher.build.small_streams import with_embedding_rows

    return with_embedding_rows(job, plan_build(job))


def _refuse_options(given: Mapping[str, bool]) -> None:
    for option, asked in given.items():
        if asked:
            raise click.UsageError(f"{option} is about a folder here; `output: null` makes the copy on the Hub")


def require_alone(processes: Processes | None, recipe: Path) -> None:
    """Refuse a sweep in a launch of several processes."""
    if processes is not None:
        from patcher.errors import InputError

        raise InputError(
            "a sweep runs in one process, and `auto` in a recipe asks for one",
            where=f"{recipe.name}: {processes.world.size} processes",
            remedy="run patch-model sweep first, without torchrun, and build the recipe that it writes",
            code="parallel",
        )
