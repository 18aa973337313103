"""Take the steering out again: from a patched folder back to its base, bit for bit where the route allows it.

Nothing but the patched folder is needed where every value that was overwritten is kept in it; else the base's own
files are taken, after their hashes have been checked.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from patcher.card.card import render_card
from patcher.checkpoint.copying import place_file
from patcher.checkpoint.folder import INDEX, CheckpointFolder
from patcher.checkpoint.hashes import differing
from patcher.checkpoint.safetensors_file import read_header
from patcher.checkpoint.slices import SliceOrder
from patcher.checkpoint.staging import check_output, scratch_folder, staged_folder
from patcher.checkpoint.steering_files import CARD, ORIGINAL_PREFIX, VECTORS, numbered
from patcher.checkpoint.undo import Originals, restore
from patcher.disk.links import require_inside
from patcher.errors import CheckFailed, InputError
from patcher.patched.base import recorded_base, require_recorded
from patcher.patched.history import give_back_history
from patcher.patched.reading import read_manifest
from patcher.patched.schema import Manifest, Patch, Undo
from patcher.progress.stage import Say


@dataclass
class Unpatched:
    """What came back.

    Attributes:
        output: the folder that was written.
        base: the name of the model that it holds.
        removed: the vectors that were taken out: {name, layer}, the latest patch first.
        left: vectors of earlier patches that are still in it.
        identical: files that are byte for byte the base's, by their recorded hashes.
        unchecked: files without a recorded hash.
        different: files besides the weights that are not byte for byte the base's.
        missing: files of the base that are not given back.
        notes: what the user should know.
        bytes_written: to the disk.
    """

    output: Path
    base: str
    removed: list[dict[str, Any]]
    left: list[dict[str, Any]]
    identical: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    different: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    bytes_written: int = 0

    def as_json(self) -> dict[str, Any]:
        return {**vars(self), "output": str(self.output)}


def unpatch(
    folder: Path,
    output: Path,
    *,
    base: str | None = None,
    every: bool = False,
    link: bool = False,
    say: Say = print,
) -> Unpatched:
    """Write the base of a patched folder.

    Args:
        folder: what a build wrote; it is not changed.
        output: the folder to make.
        base: the base itself (a folder or a Hub id); its files are then taken, and nothing is computed.
        every: undo all patches of a folder that was patched several times, and not only the last one.
        link: place files of which no byte changes as hard links.

    Raises:
        InputError: the folder is not a patched one, keeps too little to be taken back by itself, or the base given is
            not the one that it was made from.
        CheckFailed: the weights did not come back as they were; nothing is left of the output.
        OutsideError: the disk or the Hub failed.
    """
    manifest = read_manifest(folder)
    patches = manifest.patches
    undone = patches[::-1] if every else patches[-1:]
    earlier = patches[: len(patches) - len(undone)]
    check_output(output, force=False, inputs=(folder,))
    result = Unpatched(output, undone[-1].base.model, _edits(undone), _edits(earlier[::-1]))
    with staged_folder(output) as stage:
        if base is None:
            say("taking the steering out")
            result.bytes_written = _undo(folder, stage, undone, len(patches), output, link=link)
        else:
            result.bytes_written = _take(undone[-1], stage, base, output, link=link, say=say)
        _check(stage, undone[-1], result, say)
        if earlier:
            left = give_back_history(folder, stage, earlier)
            _write_card(folder, stage, left)
            result.notes.append(f"the folder was patched {len(patches)} times; an earlier patch is still in the result")
    return result


def _undo(folder: Path, stage: Path, undone: Sequence[Patch], patches: int, output: Path, *, link: bool) -> int:
    kept = [_kept(patch) for patch in undone]
    with ExitStack() as stack:
        current = folder
        for step, (patch, undo) in enumerate(zip(undone, kept, strict=True), 1):
            last = step == len(undone)
            target = stage if last else stack.enter_context(scratch_folder(output))
            vectors = folder / (VECTORS if step == 1 else numbered(VECTORS, patches - step + 1))
            written = restore(
                CheckpointFolder(current),
                target,
                undo=undo.as_json(),
                renamed=patch.route.renamed,
                grown={name: SliceOrder.from_json(order.as_json()) for name, order in patch.route.grown.items()},
                originals=_originals(vectors),
                link=link or not last,
            )
            current = target
    return written


def _take(patch: Patch, stage: Path, given: str, output: Path, *, link: bool, say: Say) -> int:
    source = recorded_base(patch, given, say)
    check_output(output, force=False, inputs=(source.folder,))
    require_recorded(source.folder, patch, say)
    written = 0
    for record in patch.base.files or []:
        name = Path(record.name)
        if name.suffix not in (".safetensors", ".bin"):
            require_inside(source.folder / name, source.folder)
        (stage / name).parent.mkdir(parents=True, exist_ok=True)
        linked = link and name.suffix == ".safetensors"
        written += place_file(source.folder / name, stage / name, link=linked).written
    return written


def _kept(patch: Patch) -> Undo:
    """What the folder keeps of its base.

    Raises:
        InputError: too little to be taken back by itself.
    """
    undo, base = patch.undo, patch.base
    if base.adapter:
        why = f"the adapter `{base.adapter.name}` was merged into the base's weights, which are not kept"
    elif base.stripped:
        shown = ", ".join(f"`{text}`" for text in base.stripped)
        why = f"the names of the base's tensors contain {shown}, which the copy's do not have"
    elif undo is None:
        why = "the folder was written without a record of what its base was"
    elif undo.lost:
        count, first = len(undo.lost), undo.lost[0]
        why = f"{count} of the base's tensors were made into others and are not kept, such as `{first}`"
    else:
        return undo
    path = base.path
    here = path if path and Path(path).is_dir() else f"{base.model}@{base.revision}" if base.hub else "PATH"
    raise InputError(
        f"the base cannot be taken out of the folder alone: {why}",
        where=f"steering.json: route {patch.route.name}",
        remedy=f"give the base, whose files are then taken: --base {here}",
        code="base_needed",
    )


def _originals(vectors: Path) -> Originals:
    if not vectors.is_file():
        return {}
    found = read_header(vectors).items()
    return {name[len(ORIGINAL_PREFIX) :]: info for name, info in found if name.startswith(ORIGINAL_PREFIX)}


def _check(stage: Path, patch: Patch, result: Unpatched, say: Say) -> None:
    """Hold the result to the hashes of the base's files."""
    records = patch.base.files or []
    wrong = set(differing(stage, [record.as_json() for record in records], say, "checking that the base is back"))
    for record in records:
        name = record.name
        if not (stage / name).is_file():
            result.missing.append(name)
        elif name in wrong:
            result.different.append(name)
        elif record.sha256 is None:
            result.unchecked.append(name)
        else:
            result.identical.append(name)
    if any(name.startswith("pytorch_model") for name in result.missing):
        result.notes.append("the base's weights are .bin files; here the same tensors are safetensors, unchecked")
    lost = [name for name in (*result.missing, *result.different) if _holds_weights(name)]
    if lost:
        raise CheckFailed(
            "the base did not come back as it was, so nothing was written",
            where=lost[0],
            found="no such file" if lost[0] in result.missing else "another content than the recorded hash",
            remedy="the folder was changed since it was written; take the files of the base: --base PATH",
            code="unpatch",
        )
    if result.unchecked:
        result.notes.append(
            "the hashes of the base's files were not recorded (--no-hash), so their content is unchecked"
        )
    if '"auto_map"' in str(patch.undo and patch.undo.as_json().get("config")):
        result.notes.append(
            "the base's config.json names Python code of its own, which the patched folder does not have"
        )


def _holds_weights(name: str) -> bool:
    return name.endswith(".safetensors") or name == INDEX


def _write_card(folder: Path, stage: Path, manifest: Manifest) -> None:
    """The card of the earlier patch; licence and languages are the base's in all of them."""
    card = folder / CARD
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else None
    licences = [item.name for item in sorted(stage.iterdir()) if item.name.lower().startswith(("licen", "notice"))]
    (stage / CARD).write_text(render_card(manifest, text, licences), encoding="utf-8")


def _edits(patches: Sequence[Patch]) -> list[dict[str, Any]]:
    return [{"name": edit.name, "layer": edit.layer} for patch in patches for edit in patch.edits]
