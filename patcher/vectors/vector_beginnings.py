"""Whether a file that is to hold a vector begins as its name says; what is in it takes torch to read."""

from __future__ import annotations

import json
from pathlib import Path

from patcher.checkpoint.safetensors_header import read_header
from patcher.disk.lfs import refuse_pointer
from patcher.errors import InputError

_BEGINNINGS = {"npy": b"\x93NUMPY", "npz": b"PK\x03\x04", "gguf": b"GGUF"}
_REMEDY = "the file may be truncated: fetch or save it again"


def check_beginning(path: Path) -> None:
    """Look at the first bytes of a vector file, or at the header of a safetensors file.

    Raises:
        InputError: the file is empty, cut off, a pointer of Git LFS, or of another kind than its name says.
    """
    if not path.is_file():
        return
    refuse_pointer(path)
    kind = path.suffix.lower().removeprefix(".")
    try:
        if path.stat().st_size == 0:
            raise ValueError("it is empty")
        if kind == "safetensors":
            read_header(path)
        elif kind == "json":
            json.loads(path.read_bytes())
        elif kind in _BEGINNINGS:
            with path.open("rb") as file:
                if not file.read(8).startswith(_BEGINNINGS[kind]):
                    raise ValueError(f"it does not begin as a .{kind} file does")
    except InputError as error:
        raise _broken(path, kind, error.problems[0].message) from None
    except (OSError, ValueError, RecursionError) as error:
        raise _broken(path, kind, error) from None


def _broken(path: Path, kind: str, why: object) -> InputError:
    return InputError(f"this cannot be read as a {kind} file", where=str(path), found=why, remedy=_REMEDY)
