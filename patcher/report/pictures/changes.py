"""The colour scale of token-level changes, shared by the picture and the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from patcher.report.pictures.reading import number, rows_of

STEPS = 8
"""Strengths of each colour."""
_UNDERLINED = 3
_LEAST = 0.1
_BELOW_FULL = 0.95


def texts_of(sweep: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, float | None]]]]:
    """(title, [(token, change of its log-probability in nats)]) of every text that has tokens."""
    texts = []
    for text in rows_of(sweep, "text_changes"):
        tokens = [(str(entry.get("token", "")), number(entry.get("change"))) for entry in rows_of(text, "tokens")]
        if tokens:
            texts.append((str(text.get("title", "")), tokens))
    return texts


def limit_of(texts: Sequence[tuple[str, Sequence[tuple[str, float | None]]]]) -> float:
    """The change, in nats, that has the full colour: 95 % of all tokens of all texts change less."""
    sizes = sorted(abs(change) for _, tokens in texts for _, change in tokens if change is not None)
    return max(_LEAST, sizes[int(_BELOW_FULL * (len(sizes) - 1))]) if sizes else _LEAST


def step(change: float | None, limit: float) -> int:
    """-8 ... 8: strength and sign of a token's colour, 0 for none."""
    if change is None:
        return 0
    return round(STEPS * max(-1.0, min(1.0, change / limit)))


def underlined(strength: int) -> bool:
    """Stronger changes are underlined too, solid for more and dotted for less: not a matter of colour alone."""
    return abs(strength) >= _UNDERLINED
