"""``patch-model reproduce DIR``: the same folder again, from its own record."""

from __future__ import annotations

import json
from pathlib import Path

import click

from patcher.cli.options import quiet as quiet_option


@click.command("reproduce", short_help="Build a patched folder again from its own record, and compare.")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--base", metavar="PATH", help="The base model, if it has moved: a folder or a Hub id.")
@click.option("--adapter", metavar="PATH", help="The adapter that was merged, if it has moved.")
@click.option(
    "--inputs",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="What paths in the recipe are relative to, if that has moved.",
)
@click.option("--trust-remote-code", is_flag=True, help="Allow code that comes with the base model to run.")
@quiet_option
@click.option("--json", "as_json", is_flag=True, help="Print {reproduced, identical, different, ...} on stdout.")
def reproduce(
    folder: Path,
    base: str | None,
    adapter: str | None,
    inputs: Path | None,
    trust_remote_code: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Build DIR once more in a temporary folder beside it, from the recipe and the base in its steering.json.

    Exit status 0 if every file but the card is byte for byte the same, and steering.json says the same of vectors,
    route and base; 1 if not. The keys of a safetensors header may come in another order. DIR is not changed, and
    nothing is published.
    """
    from patcher.patched.reading import read_manifest

    # Before torch is imported.
    read_manifest(folder)

    from patcher.build import reproduce as work
    from patcher.cli.progress import progress

    with progress(quiet=quiet) as say:
        result = work.reproduce(
            folder, base=base, adapter=adapter, inputs=inputs, trust_remote_code=trust_remote_code, say=say
        )
    if as_json:
        click.echo(json.dumps(result.as_json()))
    else:
        for name, apart in result.different.items():
            far = "" if apart is None else f", numbers by at most {apart:.3g}"
            click.echo(f"differs: {name}{far}", err=True)
        for title, names in (
            ("not built again", result.missing),
            ("not in the folder", result.unexpected),
            ("steering.json says otherwise", result.manifest),
        ):
            if names:
                click.echo(f"{title}: {', '.join(names)}", err=True)
        for note in result.notes:
            click.echo(f"note: {note}", err=True)
        if result.reordered:
            click.echo(
                f"the same tensors, keys of the header in another order: {', '.join(result.reordered)}", err=True
            )
        count = len(result.identical)
        words = f"reproduced: {count} files are byte for byte the same"
        click.echo(words if result.same else f"not reproduced; {count} files are byte for byte the same", err=True)
    if not result.same:
        raise click.exceptions.Exit(1)
