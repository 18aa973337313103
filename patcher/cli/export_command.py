"""``patch-model export DIR --format FORMAT``: the same edits in another kind of file."""

from __future__ import annotations

import json
from pathlib import Path

import click

from patcher.cli.options import quiet as quiet_option
from patcher.export import FORMATS, export_folder
from patcher.progress.stage import doing


@click.command("export", short_help="Write the same edits as a vector file, a control vector or a PEFT adapter.")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "--format",
    "format",
    type=click.Choice(list(FORMATS)),
    required=True,
    help="; ".join(f"{name}: {line}" for name, line in FORMATS.items()) + ".",
)
@click.option(
    "--output", metavar="PATH", type=click.Path(path_type=Path), help="Default: <DIR's name>-<format>, in this folder."
)
@click.option("--force", is_flag=True, help="Replace an earlier export of the same format.")
@click.option("--trust-remote-code", is_flag=True, help="Allow code that comes with the base model to run.")
@quiet_option
@click.option("--json", "as_json", is_flag=True, help="Print {output, format, layers, bytes_written, use, notes}.")
def export(
    folder: Path, format: str, output: Path | None, force: bool, trust_remote_code: bool, quiet: bool, as_json: bool
) -> None:
    """Write the edits of the patched folder DIR for other software, which adds them to the base model at run time.

    What is written is what the base's residual stream gains after each block, coefficient and scale included. DIR is
    not changed.
    """
    from patcher.patched.reading import read_manifest

    # Before torch is imported.
    read_manifest(folder)

    from patcher.cli.progress import progress

    with progress(quiet=quiet) as say, doing(say, f"exporting as {format}"):
        result = export_folder(folder, format, output, force=force, trust_remote_code=trust_remote_code)
    if as_json:
        click.echo(json.dumps(result.as_json()))
        return
    for layer, names in result.layers.items():
        place = f"after block {layer}" if layer >= 0 else "before block 0"
        click.echo(f"{place}: {' + '.join(names)}", err=True)
    for note in result.notes:
        click.echo(f"note: {note}", err=True)
    click.echo(f"written: {result.output} ({result.bytes_written:,} bytes)", err=True)
    click.echo("use it:", err=True)
    for line in result.use:
        click.echo(f"  {line}", err=True)
