"""How our time grows with pairs, prompts, layers and the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from capture_parts.material import make_checkpoint, make_pairs
from capture_parts.setting import Runs, Setting, progress
from capture_parts.tables import Table, seconds
from capture_parts.worker_process import WorkerProcess


@dataclass(frozen=True)
class Point:
    """What is run once more, and which of it differs."""

    grows: str
    pairs: int
    tokens: int
    layer: int
    half: bool = False


def points(setting: Setting) -> list[Point]:
    growing = setting.growing
    pairs, tokens, layer = growing.pairs[0], growing.tokens[1], growing.layers[1]
    return [
        *(Point("pairs", count, tokens, layer) for count in growing.pairs),
        *(Point("prompt", pairs, length, layer) for length in growing.tokens),
        *(Point("layer", pairs, tokens, depth) for depth in growing.layers),
        Point("model", pairs, tokens, layer, half=True),
        Point("model", pairs, tokens, layer),
    ]


def table(ours: WorkerProcess, dtype: str, setting: Setting, record: dict[str, Any]) -> Table:
    folder = make_checkpoint(setting.scratch / "half", setting.shape.half, [dtype], setting.seed)[dtype]
    measured: dict[tuple[int, int, int, bool], Runs] = {}
    work: dict[tuple[int, int, int, bool], dict[str, Any]] = {}
    with setting.start("ours", folder, dtype) as half:
        for turn in range(setting.repeats):
            done = set()
            for point in points(setting):
                key = (point.pairs, point.tokens, point.layer, point.half)
                if key in done:
                    continue
                done.add(key)
                worker = half if point.half else ours
                file = setting.scratch / f"grown-{point.pairs}-{point.tokens}.json"
                pairs = str(make_pairs(file, point.pairs, (point.tokens, point.tokens), setting.seed))
                if turn == 0:
                    work[key] = worker.ask("count", pairs=pairs, layer=point.layer)
                    if point.half:
                        worker.ask("capture", pairs=pairs, layer=point.layer)  # its first
                answer = worker.ask("capture", pairs=pairs, layer=point.layer)
                measured.setdefault(key, Runs()).answers.append(answer)
            progress(f"growth, turn {turn + 1} of {setting.repeats}")
    rows = []
    for point in points(setting):
        key = (point.pairs, point.tokens, point.layer, point.half)
        fastest, operations = measured[key].fastest, work[key]["linear"] + work[key]["attention"]
        blocks = fastest["stages"]["the blocks"]
        rows.append(
            [
                point.grows,
                str(point.pairs),
                str(point.tokens),
                str(point.layer),
                "half as wide" if point.half else "the model",
                seconds(fastest["wall"]),
                seconds(blocks),
                f"{fastest['tokens']:,}",
                f"{fastest['tokens'] / blocks:,.0f}",
                f"{operations / blocks / 1e9:,.0f}",
            ]
        )
    record["growth"] = rows
    return Table(
        f"Growth ({dtype})",
        (
            "grows",
            "pairs",
            "tokens a prompt",
            "layer",
            "model",
            "wall s, best",
            "of that, the blocks",
            "tokens run",
            "tokens/s in the blocks",
            "useful GFLOP/s",
        ),
        rows,
        [
            f"Half as wide: {setting.shape.half}. Tokens run include what fills up rows and the prompt that is checked "
            "alone; the last column counts only the arithmetic that the floor counts.",
        ],
    )
