"""What a build writes for people: the manifest, the model card and its pictures."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from patcher.card.card import render_card
from patcher.checkpoint.source import Source
from patcher.checkpoint.steering_files import CARD, GENERATIONS
from patcher.patched.evaluation import Evaluation
from patcher.patched.schema import Manifest
from patcher.patched.writing import write_manifest
from patcher.report.pictures.drawing import can_draw
from patcher.vectors.persona import generations_text

PICTURES = {"by_coefficient": "steering_by_coefficient.png", "shifted_tokens": "steering_shifted_tokens.png"}
"""Name of a picture in :mod:`patcher.report.pictures` -> its file beside the card."""
NOT_DRAWN = "the card has no pictures: matplotlib is not installed (pip install 'patch-model[plots]')"


def write_texts(stage: Path, manifest: Manifest, source: Source, records: Sequence[Mapping[str, Any]]) -> int:
    """Write ``steering.json``, the card, its pictures and the responses of `method: persona`.

    Args:
        stage: the folder that becomes the output.
        records: of `method: persona`, every response.

    Returns:
        The number of bytes written.
    """
    card = source.folder / CARD
    base_card = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else None
    licences = [item.name for item in sorted(stage.iterdir()) if item.name.lower().startswith(("licen", "notice"))]
    wanted = manifest.resolved["evaluate"]["pictures"]
    pictures = draw_pictures(stage, manifest.evaluation) if wanted else []
    texts = {
        CARD: render_card(manifest, base_card, licences, pictures=list(pictures)),
        **({GENERATIONS: generations_text(records)} if records else {}),
    }
    written = write_manifest(stage, manifest)
    for name, text in texts.items():
        written += (stage / name).write_bytes(text.encode())
    return written + sum((stage / name).stat().st_size for name in pictures)


def draw_pictures(stage: Path, evaluation: Evaluation | None) -> list[str]:
    """Draw what was measured, if there is anything to draw and something to draw it with.

    Returns:
        The names of the files, in the order of the card.
    """
    if evaluation is None or not (evaluation.curve or evaluation.shifted) or not can_draw():
        return []
    from patcher.report.pictures.drawing import draw_all

    measured = {
        "measure": evaluation.measure,
        "grid": evaluation.curve,
        "random_grid": evaluation.random_curve,
        "recommended": _built(evaluation.curve) if evaluation.curve else None,
        "guard": {"measure": "kl", "unit": "nats a token", "limit": evaluation.guard and evaluation.guard.kl_limit},
        "shifted": evaluation.shifted,
    }
    scratch = stage / ".pictures"
    try:
        wanted = [name for name in PICTURES if evaluation.curve or name != "by_coefficient"]
        drawn = draw_all(measured, scratch, names=wanted, dark=False)
        for name, path in drawn.items():
            path.replace(stage / PICTURES[name])
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return [PICTURES[name] for name in drawn]


def _built(curve: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The cell of the curve that is baked in: the fourth of its multiples, 1."""
    from patcher.evaluate.side_effects import FACTORS

    cell = curve[FACTORS.index(1.0)]
    return {"layer": cell["layer"], "coefficient": cell["coefficient"]}
