"""Where the time went, as one line for people."""

from __future__ import annotations

from collections.abc import Mapping

from patcher.progress.clock import TOTAL

_WITH_PARTS = 10
"""Tenths of a second that a stage must take for its parts to be told."""


def seconds_line(timings: Mapping[str, float], parts: Mapping[str, Mapping[str, float]] | None = None) -> str:
    """``load 0.6 s, verify 4.3 s (base 2.0, copy 2.3), total 4.9 s``: what is shown adds up to the total that is shown.

    Args:
        timings: seconds by stage, and their sum, the ``total``; a stage that is shorter than what is shown is left out.
        parts: stage -> part -> seconds.
    """
    stages = {name: seconds for name, seconds in timings.items() if name != TOTAL}
    shown = _tenths(stages, round(10 * timings.get(TOTAL, sum(stages.values()))))
    words = []
    for name, tenths in shown.items():
        inside = _tenths((parts or {}).get(name, {}), tenths) if tenths >= _WITH_PARTS else {}
        told = ", ".join(f"{part} {count / 10:.1f}" for part, count in inside.items() if count)
        if tenths:
            words.append(f"{name} {tenths / 10:.1f} s" + (f" ({told})" if told else ""))
    return ", ".join([*words, f"{TOTAL} {sum(shown.values()) / 10:.1f} s"])


def _tenths(seconds: Mapping[str, float], whole: int) -> dict[str, int]:
    """Rounded so that the sum is ``whole``: those that were cut most by rounding down get a tenth more."""
    exact = {name: 10 * value for name, value in seconds.items()}
    found = {name: int(value) for name, value in exact.items()}
    missing = whole - sum(found.values())
    for name in sorted(exact, key=lambda name: found[name] - exact[name])[: max(0, missing)]:
        found[name] += 1
    return found
