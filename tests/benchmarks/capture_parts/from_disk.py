"""From the checkpoint on the disk to the vector: the model loaded, or streamed block by block."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from capture_parts.contenders import cosine
from capture_parts.setting import Runs, Setting, progress
from capture_parts.tables import Table, mebibytes, seconds

MODES = {"memory": "the model in memory", "stream": "streamed, a block at a time"}


def table(pairs: Path, folder: Path, dtype: str, setting: Setting, record: dict[str, Any]) -> Table:
    runs = {mode: Runs() for mode in MODES}
    vectors = {}
    with ExitStack() as stack:
        workers = {mode: stack.enter_context(setting.start("from_disk", folder, dtype)) for mode in MODES}
        for turn in range(setting.repeats + 1):
            for mode, worker in workers.items():
                answer = worker.ask("capture", pairs=str(pairs), layer=setting.layer, mode=mode)
                vectors[mode] = worker.vector()
                if turn > 0:  # the first is the warm-up
                    runs[mode].answers.append(answer)
            progress(f"{dtype}, from the disk, turn {turn} of {setting.repeats}")
    agreement = cosine(vectors["memory"], vectors["stream"])
    record["from_disk"] = {"cosine": agreement, "runs": {mode: runs[mode].answers for mode in MODES}}
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return Table(
        f"From the disk to the vector at layer {setting.layer}",
        ("", "wall s, best", "CPU s, best", "peak MiB", "MiB read or mapped", "wall / in memory"),
        [
            [
                name,
                seconds(runs[mode].best("wall")),
                seconds(runs[mode].best("cpu")),
                mebibytes(runs[mode].memory("rise")),
                mebibytes(runs[mode].answers[-1]["bytes_read"]),
                f"{runs[mode].best('wall') / runs['memory'].best('wall'):.2f}",
            ]
            for mode, name in MODES.items()
        ],
        [
            f"Loading is part of it here, so memory is all that the run adds to a process that holds no model. The "
            f"checkpoint has {mebibytes(size)} MiB and lies in the file cache; of a mapped file only the pages that "
            f"were used count as memory. Cosine of the two vectors: {agreement:.6f}.",
        ],
    )
