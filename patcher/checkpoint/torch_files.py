"""Files of ``torch.save``, looked at before torch reads them."""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path

_ZIP = b"PK\x03\x04"


def require_uncompressed(path: Path) -> None:
    """Refuse a zip file that torch did not write: its own are never compressed, and torch unpacks a bomb in memory.

    Raises:
        ValueError: it is compressed, or its list of contents lies.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        if file.read(len(_ZIP)) != _ZIP:
            # The format before PyTorch 1.6, or none; torch looks at the same bytes.
            return
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, EOFError, struct.error) as error:
        raise ValueError(f"a damaged zip file: {error}") from None
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise ValueError("a zip file with compressed contents, which torch does not write")
    claimed, size = sum(member.file_size for member in members), path.stat().st_size
    if claimed > size:
        raise ValueError(f"a zip file of {size:,} bytes that claims contents of {claimed:,}")
