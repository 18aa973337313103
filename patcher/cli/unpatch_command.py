"""``patch-model unpatch DIR OUT``: the base back."""

from __future__ import annotations

import json
from pathlib import Path

import click

from patcher.cli.options import quiet as quiet_option


@click.command("unpatch", short_help="Take the steering out of a patched folder again.")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.argument("output", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--base", metavar="PATH", help="The base (a folder or a Hub id), where DIR alone does not give it back.")
@click.option("--all", "every", is_flag=True, help="Undo every patch of a folder that was patched several times.")
@click.option("--link", is_flag=True, help="Place unchanged weight files as hard links.")
@quiet_option
@click.option("--json", "as_json", is_flag=True, help="Print what came back, as one object, on stdout.")
def unpatch(folder: Path, output: Path, base: str | None, every: bool, link: bool, quiet: bool, as_json: bool) -> None:
    """Write the base of the patched folder DIR as the folder OUT; of several patches, the last one is undone.

    What comes back is compared with the hashes that DIR keeps of its base's files: exit status 1, and no OUT, if the
    weights are not byte for byte the base's. DIR is not changed.
    """
    from patcher.patched.reading import read_manifest

    # Before torch is imported.
    read_manifest(folder)

    from patcher.build import unpatch as work
    from patcher.cli.progress import progress

    with progress(quiet=quiet) as say:
        result = work.unpatch(folder, output, base=base, every=every, link=link, say=say)
    if as_json:
        click.echo(json.dumps(result.as_json()))
        return
    for edit in result.removed:
        click.echo(f"taken out: {edit['name']}, layer {edit['layer']}", err=True)
    click.echo(f"byte for byte the base's: {', '.join(result.identical) or 'nothing that could be checked'}", err=True)
    for title, names in (("not checked", result.unchecked), ("differ", result.different), ("not here", result.missing)):
        if names:
            click.echo(f"{title}: {', '.join(names)}", err=True)
    for note in result.notes:
        click.echo(f"note: {note}", err=True)
    click.echo(f"written: {result.output} ({result.base}, {result.bytes_written:,} bytes)", err=True)
