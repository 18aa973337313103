"""The folder of a sweep's results: numbers as JSON and CSV, the recipe with the choice, pictures, a report."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from patcher.build.job import Job
from patcher.disk.failures import told_as
from patcher.disk.whole_files import whole_file
from patcher.recipe.rewriting import chosen_recipe, moved_text
from patcher.report.pictures.drawing import PICTURES as DRAWINGS
from patcher.report.pictures.drawing import dark_of, draw_all
from patcher.sweep.file_names import PICTURES, RECIPE, REPORT, RESULT, TABLE
from patcher.sweep.on_base import STAGES, Swept


def remove_results(folder: Path) -> None:
    """Remove what an older sweep wrote beside its cells, so that nothing in the folder is of another one.

    Raises:
        OutsideError: something cannot be removed.
    """
    with told_as("older results cannot be removed", folder):
        for name in (RESULT, TABLE, RECIPE, REPORT):
            (folder / name).unlink(missing_ok=True)
        for name in DRAWINGS:
            picture = folder / PICTURES / f"{name}.png"
            picture.unlink(missing_ok=True)
            dark_of(picture).unlink(missing_ok=True)


def write_results(swept: Swept, job: Job, *, pictures: bool) -> dict[str, Path]:
    """Write everything beside the finished cells.

    Args:
        job: of the sweep.
        pictures: whether pictures and the report are made, which needs the extra `plots`.

    Returns:
        The pictures on light paper, by name.

    Raises:
        MissingExtraError: pictures are wanted, and matplotlib is not there.
        OutsideError: something cannot be written.
    """
    folder = job.output
    with told_as("the results cannot be written", folder):
        _replace(folder / TABLE, table(swept.data))
        if swept.chosen is not None:
            chosen = chosen_recipe(swept.recipe, swept.vector, *swept.chosen)
            _replace(folder / RECIPE, moved_text(job.loaded, chosen, folder))
        else:
            (folder / RECIPE).unlink(missing_ok=True)
        drawn: dict[str, Path] = {}
        if pictures:
            from patcher.report.page.page import write_report

            job.say("drawing")
            with job.clock.time("pictures"):
                drawn = draw_all(swept.data, folder / PICTURES)
                write_report(swept.data, drawn, folder / REPORT)
        swept.data["timings"] = job.clock.timings(STAGES)
        # Last: where it is, everything is.
        _replace(folder / RESULT, json.dumps(swept.data, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return drawn


def table(data: Mapping[str, Any]) -> str:
    """The grid as CSV, a line a cell."""
    file = io.StringIO()
    columns = list(data["grid"][0])
    writer = csv.DictWriter(file, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(data["grid"])
    return file.getvalue()


def _replace(path: Path, text: str) -> None:
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")
