"""``patch-model diff BASE DIR``: what really differs between two checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from patcher.cli.options import quiet as quiet_option

if TYPE_CHECKING:
    from collections.abc import Mapping

    from patcher.checkpoint.difference import Difference, TensorChange

_LONG = 20


@click.command("diff", short_help="List which tensors and config keys differ between a base and a copy.")
@click.argument("base", metavar="BASE")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--every", is_flag=True, help="Name every tensor, also where there are many alike.")
@quiet_option
@click.option("--json", "as_json", is_flag=True, help="Print {same, tensors, config, bytes_compared} on stdout.")
def diff(base: str, folder: Path, every: bool, quiet: bool, as_json: bool) -> None:
    """Compare the checkpoint DIR with BASE (a folder or a Hub id), tensor by tensor and key by key.

    Bytes are compared, not what steering.json says of them; it is asked only which tensors have a new name. Files that
    are hard links of each other are known to be the same. Nothing is loaded whole.
    """
    from patcher.checkpoint.difference import compare
    from patcher.checkpoint.folder import CheckpointFolder
    from patcher.checkpoint.prepare import find_model
    from patcher.checkpoint.steering_files import MANIFEST
    from patcher.checkpoint.stored_names import renamed_further
    from patcher.cli.progress import progress
    from patcher.patched.reading import read_manifest

    with progress(quiet=quiet) as say:
        say("comparing")
        second = CheckpointFolder(folder)
        first = CheckpointFolder(find_model(base, Path.cwd(), weights=True, where="BASE", say=say).folder)
        renamed = None
        if (folder / MANIFEST).is_file():
            patch = read_manifest(folder)
            renamed = {**patch.route.renamed, **renamed_further(first, patch.base.stripped or (), patch.route.renamed)}
        found = compare(first, second, renamed)
    if as_json:
        click.echo(json.dumps(found.as_json()))
        return
    _print(found, every)


def _print(found: Difference, every: bool) -> None:
    for sign, word, changes in (("+", "added", found.added), ("-", "removed", found.removed)):
        _print_lines([f"{sign} {_described(change)}" for change in changes], word, every)
    _print_lines([f"~ {_described(change)}{_how_far(change)}" for change in found.changed], "changed", every)
    _print_lines([f"> {old} is {new}" for old, new in found.renamed.items()], "renamed", every)
    lines: Mapping[str, Any] = {
        **{f"+ config.json: {key} = {_value(value)}": None for key, value in found.config_added.items()},
        **{f"- config.json: {key} (was {_value(value)})": None for key, value in found.config_removed.items()},
        **{f"~ config.json: {key} = {_value(new)} (was {_value(old)})": None
           for key, (old, new) in found.config_changed.items()},
    }  # fmt: skip
    for line in lines:
        click.echo(line)
    counts = [
        (found.added, "added"),
        (found.removed, "removed"),
        (found.changed, "changed"),
        (found.renamed, "renamed"),
    ]
    parts = [f"{len(group)} {word}" for group, word in counts if group]
    click.echo(
        f"tensors: {', '.join([*parts, f'{found.same} the same'])}; config.json: {len(lines) or 'no'} keys differ"
    )


def _print_lines(lines: list[str], word: str, every: bool) -> None:
    shown = lines if every or len(lines) <= _LONG else lines[: _LONG // 2]
    for line in shown:
        click.echo(line)
    if len(shown) < len(lines):
        click.echo(f"  ... and {len(lines) - len(shown)} more that are {word} (--every names them)")


def _described(change: TensorChange) -> str:
    dtype, shape = (before if after is None or before == after else after if before is None else f"{before} -> {after}"
                    for before, after in (change.dtype, change.shape))  # fmt: skip
    was = f" (was {change.was})" if change.was else ""
    return f"{change.name}{was} {dtype} {shape}"


def _how_far(change: TensorChange) -> str:
    if change.elements is None:
        return ""
    far = "no finite number" if change.max_abs_difference is None else f"{change.max_abs_difference:.6g}"
    return f": {change.elements} numbers differ, by at most {far}"


def _value(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."
