"""What a build writes for people: the manifest, the model card and its pictures."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from patcher.card.card import render_card
from patcher.card.markdown import card_template
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


def prepare_texts(folder: Path, manifest: Manifest) -> list[Path]:
    """Do what the texts need and no verification changes, in a thread, while another process verifies.

    Args:
        folder: an empty one, on the disk of the output.

    Returns:
        The pictures, in the order of the card.
    """
    if sys.platform == "linux":
        # There, threads have priorities of their own. The verification computes on all cores, and is waited for.
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
    card_template()
    return draw_pictures(folder, manifest.evaluation) if manifest.resolved["evaluate"]["pictures"] else []


def write_texts(
    stage: Path,
    manifest: Manifest,
    source: Source,
    records: Sequence[Mapping[str, Any]],
    pictures: Sequence[Path],
) -> int:
    """Write ``steering.json``, the card, its pictures and the responses of `method: persona`.

    Args:
        stage: the folder that becomes the output.
        records: of `method: persona`, every response.
        pictures: what :func:`prepare_texts` drew; they are moved.

    Returns:
        The number of bytes written.
    """
    card = source.folder / CARD
    base_card = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else None
    licences = [item.name for item in sorted(stage.iterdir()) if item.name.lower().startswith(("licen", "notice"))]
    placed = [picture.replace(stage / picture.name) for picture in pictures]
    texts = {
        CARD: render_card(manifest, base_card, licences, pictures=[picture.name for picture in placed]),
        **({GENERATIONS: generations_text(records)} if records else {}),
    }
    written = write_manifest(stage, manifest)
    for name, text in texts.items():
        written += (stage / name).write_bytes(text.encode())
    return written + sum(picture.stat().st_size for picture in placed)


def draw_pictures(folder: Path, evaluation: Evaluation | None) -> list[Path]:
    """Draw what was measured into ``folder``, if there is anything to draw and something to draw it with.

    Returns:
        The files, in the order of the card.
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
    wanted = [name for name in PICTURES if evaluation.curve or name != "by_coefficient"]
    drawn = draw_all(measured, folder, names=wanted, dark=False)
    return [path.replace(folder / PICTURES[name]) for name, path in drawn.items()]


def _built(curve: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The cell of the curve that is baked in: the fourth of its multiples, 1."""
    from patcher.evaluate.side_effects import FACTORS

    cell = curve[FACTORS.index(1.0)]
    return {"layer": cell["layer"], "coefficient": cell["coefficient"]}
