"""Routes that a build tried before the one it took, and the checks of a proof: types of ``steering.json``."""

from __future__ import annotations

import math

from patcher.patched.part import Number, Part


class RecordedCheck(Part):
    """One number that a stack was held to; ``passed`` is null where it was not run."""

    name: str
    passed: bool | None = None
    value: Number | None = None
    limit: Number | None = None
    note: str = ""


class FailedRoute(Part):
    """An exact route that was written, and whose proof failed: in which stack, and by which checks."""

    name: str
    cost: str | None = None
    stack: str = ""
    version: str | None = None
    checks: list[RecordedCheck] = []

    @property
    def measured(self) -> str:
        """The checks that failed, with their numbers."""
        return "; ".join(check_in_words(check) for check in self.checks)

    @property
    def said(self) -> str:
        """That it failed, where and by how much."""
        return f"the `{self.name}` route failed its proof in stock {self.stack} {self.version} ({self.worst})"

    @property
    def worst(self) -> str:
        """The check that failed by most, with its numbers."""
        if not self.checks:
            return "no check"
        check = max(self.checks, key=_beyond)
        if check.value is None or check.limit is None:
            return check_in_words(check)
        return f"{check.name}: {check.value:.2g} against a limit of {check.limit:.2g}"


def _beyond(check: RecordedCheck) -> float:
    # What has no number was not there at all, or was no number.
    return check.value / check.limit if check.value is not None and check.limit else math.inf


def check_in_words(check: RecordedCheck) -> str:
    """A check with its numbers, as in ``log-probabilities: 0.000796 (limit 0.0001)``."""
    numbers = "" if check.value is None or check.limit is None else f"{check.value:.3g} (limit {check.limit:.3g})"
    return f"{check.name}: " + " ".join(part for part in (numbers, check.note) if part)
