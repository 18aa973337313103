"""Xet storage in a folder: what ``local://`` makes of a folder for the real storage library."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

from support.hub_store import Blob

_HEADER, _ENTRY = 48, 48
_HAS_VERIFICATION, _HAS_SHA256 = 1 << 31, 1 << 30
_EXPIRY = 4_000_000_000

_STORE = f"""
import sys, hf_xet
with hf_xet.XetSession().new_upload_commit(endpoint=sys.argv[1], token="t", token_expiry_unix_secs={_EXPIRY}) as commit:
    commit.start_upload_file(sys.argv[2], sha256=hf_xet.COMPUTE_SHA256)
"""


class LocalXet:
    """Content-addressed storage that the clients' ``hf_xet`` reads and writes itself.

    One process at a time may have it open, and a client keeps it open until it ends. So the server, which is another,
    reads copies of it, and what is to be there at first is stored before the first client starts.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.url = folder, f"local://{folder}"

    def store(self, path: Path) -> None:
        """Put a file there, by a process of its own."""
        environment = {**os.environ, "HF_HOME": str(self.folder / "home")}
        subprocess.run([sys.executable, "-c", _STORE, self.url, str(path)], check=True, env=environment)

    def hash_of(self, blob: Blob) -> str:
        """Xet's name of a content that is there."""
        return self._known()[blob.sha256][0]

    def content_of(self, sha256: str) -> bytes | None:
        """What was uploaded under this SHA-256, put together again from its chunks."""
        import hf_xet

        if sha256 not in self._known():
            return None
        with tempfile.TemporaryDirectory() as scratch:
            view = Path(scratch) / "view"
            shutil.copytree(self.folder, view)
            target = Path(scratch) / "file"
            access = {"endpoint": f"local://{view}", "token": "t", "token_expiry_unix_secs": _EXPIRY}
            with hf_xet.XetSession().new_file_download_group(**access) as group:
                group.start_download_file(hf_xet.XetFileInfo(*self._known()[sha256]), str(target))
            return target.read_bytes()

    def _known(self) -> dict[str, tuple[str, int]]:
        """Xet's names, and the sizes, by SHA-256, from the lists of files that uploads leave."""
        names: dict[str, tuple[str, int]] = {}
        for path in self.folder.glob("xet/xorbs/shards/*.mdb"):
            data, at = path.read_bytes(), _HEADER
            while data[at : at + 32] != b"\xff" * 32:
                name = _hex(data[at : at + 32])
                flags, segments = struct.unpack_from("<2I", data, at + 32)
                size = sum(struct.unpack_from("<I", data, at + _ENTRY * (1 + n) + 36)[0] for n in range(segments))
                at += _ENTRY * (1 + segments * (2 if flags & _HAS_VERIFICATION else 1))
                if flags & _HAS_SHA256:
                    names[_hex(data[at : at + 32])] = name, size
                    at += _ENTRY
        return names


def _hex(stored: bytes) -> str:
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", stored))
