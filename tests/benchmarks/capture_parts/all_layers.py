"""What reading every layer costs beside a forward pass that reads none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from capture_parts.setting import Runs, Setting, progress
from capture_parts.tables import Table, mebibytes, seconds
from capture_parts.worker_process import WorkerProcess

AIM = 1.15


def table(pairs: Path, ours: WorkerProcess, setting: Setting, record: dict[str, Any]) -> Table:
    layers = list(range(setting.shape.blocks))
    ours.ask("batch", pairs=str(pairs), layer=layers[-1])
    reading, stock, blocks = Runs(), Runs(), []
    for turn in range(setting.repeats):
        reading.answers.append(ours.ask("capture", pairs=str(pairs), layer=layers))
        blocks.append(reading.answers[-1]["stages"]["the blocks"])
        stock.answers.append(ours.ask("stock_forward"))
        progress(f"all layers, turn {turn + 1} of {setting.repeats}: {reading.answers[-1]['wall']:.2f} s")
    ratios = {"whole": reading.best("wall") / stock.best("wall"), "blocks": min(blocks) / stock.best("wall")}
    record["all_layers"] = ratios
    return Table(
        f"All {len(layers)} layers in one pass",
        ("", "wall s, best", "CPU s, best", "peak MiB", "wall / stock forward"),
        [
            _row("stock forward, nothing read, one logit row a prompt row", stock, 1.0),
            _row("every layer read: pairs to vectors", reading, ratios["whole"]),
            ["of that, the blocks", seconds(min(blocks)), "", "", f"{ratios['blocks']:.2f}"],
        ],
        [f"The same batches, in turns. The aim is at most {AIM}."],
    )


def _row(name: str, runs: Runs, ratio: float) -> list[str]:
    return [name, seconds(runs.best("wall")), seconds(runs.best("cpu")), mebibytes(runs.memory()), f"{ratio:.2f}"]
