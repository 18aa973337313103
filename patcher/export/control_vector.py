"""A GGUF control vector: ``direction.N`` (F32, [hidden]) is what llama.cpp adds after its 0-based block N.

repeng numbers its layers the same way and reads the same file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from patcher.checkpoint.gguf.file import read_gguf
from patcher.errors import InputError, MissingExtraError
from patcher.export.edits import Edits

SUFFIX = ".gguf"
ARCHITECTURE = "controlvector"


def is_ours(path: Path) -> bool:
    """Whether it is a control vector."""
    try:
        return read_gguf(path).scalar("general.architecture") == ARCHITECTURE
    except InputError:
        return False


def write(edits: Edits, target: Path) -> list[str]:
    """Write one direction a layer: exactly what the residual stream gains, also where a model scales its MLP.

    Raises:
        InputError: an edit of block 0 or of the embedding, where llama.cpp adds none.
        MissingExtraError: without the ``gguf`` package.
    """
    gguf = _package()
    early = [layer for layer in edits.vectors if layer < 1]
    if early:
        places = " and ".join("before block 0" if layer < 0 else f"after block {layer}" for layer in early)
        raise InputError(
            f"llama.cpp adds no control vector {places}: it loads no file with `direction.0`",
            where="--format control-vector",
            found="layers " + ", ".join(map(str, edits.vectors)),
            remedy="convert the patched folder itself to GGUF: there the vector is part of the weights",
        )
    writer = gguf.GGUFWriter(target, ARCHITECTURE)
    writer.add_string(f"{ARCHITECTURE}.model_hint", edits.model_type)
    writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(edits.vectors))
    for layer, vector in edits.vectors.items():
        writer.add_tensor(f"direction.{layer}", vector.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return ["it is added at run time, to a GGUF of the base: not to one of the patched folder, which has it already"]


def use(edits: Edits, output: Path) -> list[str]:
    """The command of llama.cpp."""
    return [f"llama-cli -m {Path(edits.base).name}.gguf --control-vector {output}"]


def _package() -> Any:
    try:
        import gguf
    except ImportError:
        raise MissingExtraError("gguf", "gguf", "exporting a control vector") from None
    return gguf
