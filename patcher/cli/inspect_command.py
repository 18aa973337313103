"""``patch-model inspect MODEL``: which routes an architecture has."""

from __future__ import annotations

import json

import click

from patcher.cli.options import quiet as quiet_option
from patcher.stacks.names import STACKS


@click.command("inspect", short_help="Which routes a model's architecture has, for which stacks, at what cost.")
@click.argument("model", metavar="[MODEL]", required=False)
@click.option("--all", "everything", is_flag=True, help="Every language model of the installed transformers.")
@click.option("--layer", "layers", type=int, multiple=True, metavar="K", help="Block to steer (-1: the embedding).")
@click.option("--targets", metavar="LIST", help=f"Stacks that must read the route: {','.join(STACKS)}.")
@click.option("--exact/--no-exact", default=True, help="--no-exact also allows the fitted route.")
@click.option("--prefer", type=click.Choice(["stacks", "free", "same_model_type"]), default="stacks", show_default=True)
@click.option("--route", default="auto", metavar="NAME", help="Force one.")
@click.option("--trust-remote-code", is_flag=True, help="Allow code that comes with the model to run.")
@quiet_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def inspect(
    model: str | None,
    everything: bool,
    layers: tuple[int, ...],
    targets: str | None,
    exact: bool,
    prefer: str,
    route: str,
    trust_remote_code: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Print every route of MODEL: exact or fitted, its run-time cost, the stacks that read it; or why it does not fit.

    MODEL is a checkpoint folder, a Hub id (only its config.json is downloaded) or an architecture by name, such as
    `qwen3` or `Qwen3ForCausalLM`, under its default config. No weights are read. --all
    takes several minutes, and a second once all was looked at.

    Exit status: 0 it was looked at, 2 something in the input is wrong, 3 the Hub or the disk failed.
    """
    if (model is None) == (not everything):
        raise click.UsageError("give a MODEL, or --all", click.get_current_context())
    wanted = "auto" if targets is None else [name.strip() for name in targets.split(",")]
    unknown = [] if targets is None else [name for name in wanted if name not in STACKS]
    if unknown:
        raise click.UsageError(f"--targets: no such stack: `{unknown[0]}` (there are {', '.join(STACKS)})")

    from patcher.cli.progress import progress

    asked = {
        "layers": layers,
        "targets": wanted,
        "exact": exact,
        "prefer": prefer,
        "route": route,
        "trust_remote_code": trust_remote_code,
        "every_route": not everything,
    }
    if model is None:
        from patcher.cli.all_report import print_all
        from patcher.routes.all_architectures import inspect_all

        with progress(quiet=quiet) as say:
            each = inspect_all(asked, say)
        if as_json:
            click.echo(json.dumps({"architectures": each}))
        else:
            print_all(each)
        return

    from patcher.build.small_streams import inspected_with_embedding_rows
    from patcher.cli.inspect_report import print_inspection
    from patcher.routes.inspection import Demands, inspect_model

    with progress(quiet=quiet) as say:
        say("looking at the architecture")
        found = inspected_with_embedding_rows(inspect_model(model, Demands(**asked)))  # type: ignore[arg-type]
    if as_json:
        click.echo(json.dumps(found.as_json()))
    else:
        print_inspection(found)
