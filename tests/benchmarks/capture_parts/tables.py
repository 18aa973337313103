"""Tables of results, and what they were measured on."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Table:
    """A table with a title, what is to be known about it, and its cells as texts."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()

    def markdown(self) -> str:
        """With columns that line up, so that it can be read as it is."""
        cells = [list(self.columns), *map(list, self.rows)]
        widths = [max(len(row[column]) for row in cells) for column in range(len(self.columns))]
        lines = [
            "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
            for row in cells
        ]
        lines.insert(1, "| " + " | ".join("-" * width for width in widths) + " |")
        return "\n".join([f"### {self.title}", "", *lines, *(f"\n{note}" for note in self.notes)])


def seconds(value: float) -> str:
    return f"{value:.2f}" if value >= 0.1 else f"{value:.3f}"


def mebibytes(value: int | None) -> str:
    return "not known" if value is None else f"{value / 2**20:,.0f}"


def machine() -> list[tuple[str, str]]:
    """The machine's CPU, cores and memory, and how busy it is."""
    cpuinfo = _text("/proc/cpuinfo").splitlines()
    names = [line.partition(":")[2].strip() for line in cpuinfo if line.startswith("model name")]
    total = next((int(line.split()[1]) for line in _text("/proc/meminfo").splitlines() if "MemTotal" in line), 0)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return [
        ("CPU", f"{names[0] if names else platform.processor()} ({torch.backends.cpu.get_cpu_capability()})"),
        ("cores", str(cores)),
        ("memory", f"{total / 2**20:.1f} GiB"),
        ("system", f"{platform.system()} {platform.release()}"),
        ("load when it began", load()),
    ]


def load() -> str:
    """The machine's load over the last 1, 5 and 15 minutes."""
    return " ".join(f"{average:.2f}" for average in os.getloadavg())


def versions(found: Mapping[str, Mapping[str, str]], repository: Path) -> list[tuple[str, str]]:
    """Of this package (its commit), and of what each contender ran on."""
    commit = subprocess.run(
        ["git", "--no-optional-locks", "-C", str(repository), "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
    )
    rows = [("patch-model", commit.stdout.strip() or "not a git checkout")]
    for name, packages in found.items():
        rows.append((name, ", ".join(f"{package} {version}" for package, version in packages.items())))
    return rows


def document(facts: Sequence[tuple[str, str]], sections: Sequence[tuple[str, Sequence[Table]]], command: str) -> str:
    """The page docs/performance-capture.md."""
    today = datetime.datetime.now(datetime.timezone.utc).date()
    lines = [
        "# Performance: reading activations",
        "",
        f"Measured on {today} by one run of",
        "",
        "```",
        "tests/published_environments.sh        # once: the environments of the other libraries",
        command,
        "```",
        "",
        "which writes this page. All contenders have the same model (random weights), pairs, layer and threads. Each",
        "is a process of its own that loads the model, warms up on two pairs, and then takes its turn: ours, the",
        "others, ours, the others. CPU seconds are user and system time of all threads. Peak memory is resident memory",
        "beyond what the process had when its model was loaded.",
        "",
        "| | |",
        "| --- | --- |",
        *(f"| {name} | {value} |" for name, value in facts),
    ]
    for title, tables in sections:
        lines += ["", f"## {title}"]
        for table in tables:
            lines += ["", table.markdown()]
    return "\n".join(lines) + "\n"


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
