"""Symlinks in a folder that came from elsewhere: which of them may be followed into what is copied or published.

Weights may be linked from anywhere: what is not a whole weight file is refused, so that nothing else can pass for one.
Any text passes for a licence, and most for a tokenizer. A link such as ``LICENSE -> ~/.ssh/id_rsa`` in a checkpoint
that was unpacked from an archive would carry a secret into the copy, and from there to the Hub. Links to such
files are followed in three cases alone:

- inside of their folder;
- from a snapshot of the Hub's cache to the blobs beside it;
- to files that any cache of that kind named by their hash (older clients linked to them from everywhere).
"""

from __future__ import annotations

import re
from pathlib import Path

from patcher.errors import InputError

_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


def require_inside(path: Path, folder: Path) -> None:
    """Refuse a file of ``folder`` that is a link, or lies behind one, to somewhere else.

    Raises:
        InputError: with where it leads.
    """
    root, target = folder.resolve(), path.resolve()
    if target.is_relative_to(root) or _is_blob(target, root):
        return
    raise InputError(
        "this file is a link that leads out of the folder, so its content is not copied",
        where=str(path),
        found=f"a link to {target}",
        remedy="if it is meant to be there, replace the link by the file itself",
        code="link",
    )


def _is_blob(target: Path, root: Path) -> bool:
    if target.parent.name != "blobs":
        return False
    # The blobs' folder is taken as it is: one that is a link itself is no part of a cache that the Hub's client made.
    beside = root.parent.name == "snapshots" and target.parent == root.parent.parent / "blobs"
    return beside or _HASH.fullmatch(target.name) is not None
