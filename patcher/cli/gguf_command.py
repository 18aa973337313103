"""``patch-model gguf SRC.gguf OUT.gguf --from DIR``: vectors into a GGUF file of any quantisation."""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path
from typing import Literal

import click

from patcher.cli.options import quiet as quiet_option


@click.command("gguf", short_help="Add the vectors of a patched folder to a GGUF file of any quantisation.")
@click.argument("source", metavar="SRC.gguf", type=click.Path(path_type=Path))
@click.argument("output", metavar="[OUT.gguf]", type=click.Path(path_type=Path), required=False)
@click.option("--from", "folder", metavar="DIR", type=click.Path(path_type=Path), help="A folder of patch-model's.")
@click.option("--vector", metavar="FILE", type=click.Path(path_type=Path), help="A vector file instead.")
@click.option("--layer", metavar="K", type=click.IntRange(min=0), help="With --vector: the block that is steered.")
@click.option("--coefficient", metavar="C", type=float, default=None, help="With --vector: times this (default 1).")
@click.option("--tensor", metavar="NAME", help="With --vector: which of the file's tensors.")
@click.option("--row", metavar="I", type=int, help="With --vector: which row of the tensor.")
@click.option("--feature", metavar="I", type=click.IntRange(min=0), help="With --vector: which feature of an SAE.")
@click.option(
    "--layout",
    type=click.Choice(["blocks", "hidden_states", "columns"]),
    help="With --vector: what the tensor's rows are, if their number does not say.",
)
@click.option("--add", is_flag=True, help="Let the vectors add up with those that an earlier patch put there.")
@click.option("--link", is_flag=True, help="Place unchanged files of a split model as hard links.")
@click.option("--in-place", is_flag=True, help="Patch SRC itself, without a copy (ext4 and xfs).")
@click.option("--force", is_flag=True, help="Replace an earlier output of this command.")
@quiet_option
@click.option("--json", "as_json", is_flag=True, help="Print what was written, as one object, on stdout.")
def gguf(
    source: Path,
    output: Path | None,
    folder: Path | None,
    vector: Path | None,
    layer: int | None,
    coefficient: float | None,
    tensor: str | None,
    row: int | None,
    feature: int | None,
    layout: Literal["blocks", "hidden_states", "columns"] | None,
    add: bool,
    link: bool,
    in_place: bool,
    force: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Write SRC.gguf, the base model, with steering vectors in it as OUT.gguf, for stock llama.cpp.

    Each vector becomes `blk.K.ffn_down.bias` (or is added to the one that is there); no other tensor changes by a
    byte, whatever its quantisation. Qwen2, Phi-3 and others whose loader has no such bias are renamed to llama, which
    reorders whole rows. SRC is not changed, and of a split model it is the first file.
    """
    if (folder is None) == (vector is None):
        raise click.UsageError("give either --from DIR, or --vector FILE --layer K")
    if vector is None and any(given is not None for given in (layer, coefficient, tensor, row, feature, layout)):
        raise click.UsageError("--layer, --coefficient, --tensor, --row, --feature and --layout go with --vector")
    if sum(given is not None for given in (row, feature, None if layout == "columns" else layout)) > 1:
        raise click.UsageError("give only one of --row, --feature and --layout")
    if vector is not None and layer is None:
        raise click.UsageError("--vector needs --layer K")
    if (output is None) != in_place:
        raise click.UsageError("give either OUT.gguf, or --in-place")
    if in_place and (link or force):
        raise click.UsageError("--link and --force go with OUT.gguf")

    from patcher.checkpoint.gguf.in_place import finish_interrupted
    from patcher.checkpoint.gguf.model import read_model
    from patcher.cli.progress import progress
    from patcher.gguf.edits import edit_of_file, edits_of_folder
    from patcher.gguf.patch import check_target, patch_in_place, write_patched
    from patcher.gguf.slots import block_count
    from patcher.progress.stage import doing
    from patcher.vectors.files.asked import Asked, SteeredModel

    started = time.perf_counter()
    if in_place:
        for path in finish_interrupted(source):
            click.echo(f"finished an interrupted patch: {path}", err=True)
    model = read_model(source)
    hidden = model.number("embedding_length")
    if output is not None:
        check_target(model, output, force=force)
    if folder is not None:
        edits = edits_of_folder(folder, hidden, block_count(model))
    else:
        assert vector is not None and layer is not None
        asked = Asked(tensor, None if row is None else (row,), feature, layout)
        steered = SteeredModel(hidden, block_count(model), (model.architecture,))
        edits = [edit_of_file(vector, layer=layer, model=steered, coefficient=coefficient, asked=asked)]
    with progress(quiet=quiet) as say:
        if output is None:
            with doing(say, f"patching {source.name}"):
                result = patch_in_place(model, edits, add=add)
        else:
            result = write_patched(model, edits, output, add=add, link=link, force=force, say=say)
    if as_json:
        body = result.as_json()
        body["seconds"] = time.perf_counter() - started
        body["peak_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        click.echo(json.dumps(body))
        return
    if result.plan.relabelled:
        click.echo(f"relabelled: {result.plan.relabelled} as {result.plan.architecture}", err=True)
    for edit in result.edits:
        slot = result.plan.slots[edit.layer]
        how = "created" if slot.existing is None else "added to"
        click.echo(f"{edit.name}: norm {edit.vector.norm():.4g}, {how} {slot.name}", err=True)
    for note in result.plan.notes:
        click.echo(f"note: {note}", err=True)
    click.echo("checked: header and new values read back; llama.cpp itself was not run", err=True)
    click.echo(f"{'patched' if in_place else 'written'}: {result.files[0]}", err=True)
