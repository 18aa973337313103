"""``patch-model sweep``: which layer, and how much."""

from __future__ import annotations

import json
from pathlib import Path

import click

from patcher.cli.options import quiet as quiet_option
from patcher.cli.options import refuse_both


@click.command("sweep", short_help="Find a layer and a coefficient.")
@click.argument("recipe", metavar="RECIPE", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", metavar="DIR", type=click.Path(path_type=Path), help="The results. Default: <model>-sweep."
)
@click.option(
    "--set", "overrides", metavar="KEY=VALUE", multiple=True, help="Change a recipe key: sweep.layers=[4,8,12]."
)
@click.option("--force", is_flag=True, help="Start anew where DIR holds another sweep.")
@click.option("--no-pictures", is_flag=True, help="Only numbers; without this, the extra `plots` is needed.")
@click.option("--no-cache", is_flag=True, help="Read all activations anew, and keep none for the next run.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
@quiet_option
@click.option("-v", "--verbose", is_flag=True, help="Also say how the numbers are computed.")
@click.pass_obj
def sweep(
    began: float | None,
    recipe: Path,
    output: Path | None,
    overrides: tuple[str, ...],
    force: bool,
    no_pictures: bool,
    no_cache: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    """Try the vector of RECIPE at several layers and coefficients, and recommend one cell under a guard against damage.

    The vector is made of one part of the pairs, and the cell is chosen on another, corrected for the number of cells.
    It is recommended if a third part confirms it, beyond random vectors of equal norm and beyond the values that people
    take without a search. Finished cells are kept: an interrupted sweep goes on, and one with other layers,
    coefficients or another guard measures only what is not there yet. DIR gets the grid (sweep.json, sweep.csv),
    pictures, report.html, and recipe.yaml with the recommended values, ready to be built.

    Exit status: 0 a cell is recommended, 1 nothing is recommended (a fixed default that is confirmed is named), 2
    something in the input is wrong, 3 the Hub, the disk or the memory failed.
    """
    refuse_both(verbose, quiet)
    from patcher.build.early_checks import check_early
    from patcher.cli.progress import progress
    from patcher.recipe.file import load_recipe

    loaded = load_recipe(recipe, overrides)
    check_early(loaded, None)
    if not no_pictures:
        from patcher.report.pictures.drawing import require_plots

        require_plots("--no-pictures for the numbers alone")

    from patcher.build.job import Job
    from patcher.cli.sweep_report import print_sweep
    from patcher.progress.clock import Clock
    from patcher.sweep.files import write_results
    from patcher.sweep.pipeline import sweep as run

    output = output or Path(f"{loaded.recipe.model_name}-sweep")
    with progress(verbose, quiet) as say:
        job = Job(loaded, output, say, say.note, force=force, cache=not no_cache, clock=Clock(began))
        found = run(job)
        try:
            write_results(found, job, pictures=not no_pictures)
        except KeyboardInterrupt:
            kept = f"interrupted; all cells are kept in {output}: the same command goes on from there"
            raise KeyboardInterrupt(kept) from None
    print_sweep(found.data, output, to_stderr=as_json, pictures=not no_pictures)
    if as_json:
        click.echo(json.dumps({"output": str(output), **found.data}))
    if found.chosen is None:
        raise click.exceptions.Exit(1)
