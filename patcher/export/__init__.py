"""The same edits in other files: a bare vector, a control vector of llama.cpp, a PEFT adapter.

A new format is one module with ``SUFFIX``, ``is_ours``, ``write`` and ``use``, and one entry here. Modules are imported
when they are needed, so that the command line can list them without torch.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from patcher.export.edits import Format

FORMATS: Mapping[str, str] = {
    "vector": "safetensors, one fp32 tensor a layer; any recipe reads it with `method: file`",
    "control-vector": "GGUF, for llama.cpp's --control-vector and for repeng",
    "peft": "a LoRA adapter with a bias and nothing else, for the base model",
}
"""Format -> what it is; its module has the same name."""


@dataclass(frozen=True)
class Exported:
    """What an export wrote.

    Attributes:
        output: the file or folder.
        format: its format's name.
        layers: layer of the base -> names of the vectors that add up there.
        bytes_written: size of all files.
        use: lines that use it.
        notes: what the user should know.
    """

    output: Path
    format: str
    layers: Mapping[int, list[str]]
    bytes_written: int
    use: list[str]
    notes: list[str]

    def as_json(self) -> dict[str, Any]:
        return {
            "output": str(self.output),
            "format": self.format,
            "layers": [{"layer": layer, "vectors": names} for layer, names in self.layers.items()],
            "bytes_written": self.bytes_written,
            "use": self.use,
            "notes": self.notes,
        }


def export_folder(
    folder: Path, format: str, output: Path | None = None, *, force: bool = False, trust_remote_code: bool = False
) -> Exported:
    """Write the edits of a patched folder as another kind of file; the folder is only read.

    Args:
        folder: what a build wrote.
        format: a key of :data:`FORMATS`.
        output: the file or folder to write; by default the patched folder's name with the format, where we are.
        force: replace an earlier export of the same format.
        trust_remote_code: allow code that comes with the base to run, where a format has to know its class.

    Raises:
        InputError: not a patched folder, the output is in the way, or the format cannot hold these edits.
        MissingExtraError: the format needs a package that is not installed.
        CheckFailed: stock PEFT does not do with the adapter what a hook does.
        OutsideError: the disk failed; nothing is left.
    """
    from patcher.checkpoint.staging import OutputKind, check_output, staged_output
    from patcher.export.edits import read_edits

    chosen = cast("Format", importlib.import_module(f"patcher.export.{format.replace('-', '_')}"))
    output = output or Path(f"{folder.resolve().name}-{format}{chosen.SUFFIX}")
    kind = OutputKind(
        is_ours=chosen.is_ours,
        overlaps="the export overlaps the patched folder, which is not changed",
        exists="the output exists",
        foreign="--force replaces only an earlier export of the same format, and this is none",
        elsewhere="choose another place (--output)",
    )
    check_output(output, force=force, inputs=(folder,), kind=kind)
    edits = read_edits(folder, trust_remote_code=trust_remote_code)
    with staged_output(output, kind, force=force) as stage:
        notes = chosen.write(edits, stage)
        files = [stage] if stage.is_file() else [item for item in stage.rglob("*") if item.is_file()]
        size = sum(item.stat().st_size for item in files)
    return Exported(output, format, edits.names, size, chosen.use(edits, output), [*edits.notes, *notes])
