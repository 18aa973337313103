"""``patch-model stacks``: which stock stacks are found, and ``stacks install``."""

from __future__ import annotations

import json
from pathlib import Path

import click

from patcher.cli.options import quiet as quiet_option
from patcher.stacks.names import LLAMA_CPP, VLLM


@click.group("stacks", invoke_without_command=True, short_help="Which stock stacks are found here; install one.")
@click.option("--json", "as_json", is_flag=True, help="Print {stacks: [...]} on stdout.")
@click.pass_context
def stacks(context: click.Context, as_json: bool) -> None:
    """List the stacks that `patch-model verify --stack NAME` can run, with their versions and where they were found.

    PATCH_MODEL_VLLM and PATCH_MODEL_LLAMA_CPP name environments of your own; `stacks install` makes one.
    """
    if context.invoked_subcommand is not None:
        return
    from patcher.stacks.environments import Environment, all_found

    listed: list[dict[str, str | None]] = []
    for item in all_found():
        if isinstance(item, Environment):
            found = {"version": item.version, "source": item.source, "path": str(item.path), "remedy": None}
        else:
            found = {"version": None, "source": item.why, "path": None, "remedy": item.remedy}
        listed.append({"stack": item.stack, **found})
    if as_json:
        click.echo(json.dumps({"stacks": [{**row, "installed": row["version"] is not None} for row in listed]}))
        return
    for row in listed:
        where = f"{row['source']}: {row['path']}" if row["path"] else f"{row['source']}\n  to have it: {row['remedy']}"
        click.echo(f"{row['stack']} {row['version'] or 'is not installed'}\n  {where}")


@stacks.command("install", short_help="Install vllm or llama.cpp into an environment of its own.")
@click.argument("name", type=click.Choice([VLLM, LLAMA_CPP]))
@click.option("--into", metavar="PATH", type=click.Path(path_type=Path), help="The folder to make; default: the cache.")
@click.option("--gpu/--cpu", default=None, help="vLLM for CUDA or for a CPU; default: CUDA where nvidia-smi is.")
@quiet_option
@click.option("--json", "as_json", is_flag=True, help="Print {stack, version, path} on stdout.")
def install(name: str, into: Path | None, gpu: bool | None, quiet: bool, as_json: bool) -> None:
    """Make a virtual environment for the stack NAME with pip, so that its pins clash with nothing.

    It is found again in the cache folder (PATCH_MODEL_CACHE, else ~/.cache/patch-model); of one made elsewhere with
    --into, PATCH_MODEL_VLLM or PATCH_MODEL_LLAMA_CPP says where it is.
    """
    from patcher.cli.progress import progress
    from patcher.stacks.environments import VARIABLES
    from patcher.stacks.installing import install as install_stack

    with progress(quiet=quiet) as say:
        found = install_stack(name, into, gpu=gpu, say=say)
    if as_json:
        click.echo(json.dumps({"stack": found.stack, "version": found.version, "path": str(found.path)}))
        return
    click.echo(f"{found.stack} {found.version}: {found.path}")
    if into is not None:
        click.echo(f"to use it: export {VARIABLES[name]}={into}")
