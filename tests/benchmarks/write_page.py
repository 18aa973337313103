"""The page docs/performance-write.md."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

from capture_parts.tables import Table

INTRODUCTION = """\
`patch-model` is the write step of a build: from the vector to the finished folder under its name. Unless it says
otherwise, everything is synced: files and folders are on the disk when the time is taken, as a build leaves them.
`cp -r` and `save_pretrained` are followed by the same syncs, and stand there without them as well. The checkpoint is a
Llama of random numbers in bf16, in four shards; the edit adds a bias to every MLP (the `flag` route). Times begin when
everything is imported. Each is a process of its own; they take turns, in another order every time, and the base is in
memory before each turn. MB written are those of the files that the copy does not share with the base. Memory is the
most that was resident, less that of a process that only imports torch.
"""


def page(
    facts: Sequence[tuple[str, str]],
    tables: Sequence[Table],
    published: Sequence[tuple[int, Mapping[str, Any]]],
    command: str,
) -> str:
    """Markdown, from ``published``: (bytes of the base, what :func:`write_hub.published` gave)."""
    today = datetime.datetime.now(datetime.timezone.utc).date()
    rows = [
        [f"{size / 1e9:.2f} GB", f"{hub['size']:,}", f"{hub['sent']:,}", hub["method"], "yes" if hub["whole"] else "NO"]
        for size, hub in published
    ]
    columns = ["base", "bytes of the folder", "bytes sent", "way", "whole on the Hub"]
    sent = Table("Bytes sent to the Hub", columns, rows)
    parts = [
        "# Performance: writing a copy",
        f"Measured on {today} by one run of",
        f"```\n{command}\n```",
        "which writes this page.",
        INTRODUCTION.strip(),
        "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in facts)]),
        *(table.markdown() for table in tables),
        sent.markdown(),
        "The Hub is the tests' own, on this machine, spoken to by the real client. The base is there, and the copy was "
        "made of it. Bytes sent are the bodies of all requests.",
    ]
    return "\n\n".join(parts) + "\n"
