"""Checks of a folder in one stack, and the entry of ``verification`` that they make."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from patcher.disk.json_files import finite_or_null


@dataclass(frozen=True)
class Check:
    """One check: ``value`` against ``limit``; ``passed`` None means it could not be made, and ``note`` says why."""

    name: str
    passed: bool | None
    value: float | None = None
    limit: float | None = None
    note: str = ""

    def as_json(self) -> dict[str, Any]:
        found: dict[str, Any] = finite_or_null(vars(self))
        return found


@dataclass
class Comparison:
    """All checks of one stack, and the numbers of the manifest; not-a-number where one was not measured.

    Attributes:
        images: see :class:`patcher.patched.schema.WithImages`; None for a class that takes no images.
        causal_lm: see :class:`patcher.patched.schema.ByCausalLM`; None for a text model.
    """

    checks: list[Check] = field(default_factory=list)
    max_abs_logprob_diff: float = float("nan")
    noise_floor: float = float("nan")
    steering_effect: float = float("nan")
    vector_rel_error: float = float("nan")
    tolerance: float = float("nan")
    kl_share: float | None = None
    images: dict[str, Any] | None = None
    causal_lm: dict[str, Any] | None = None

    def as_json(self) -> dict[str, Any]:
        """The numbers and the checks of an entry of ``verification``; JSON has no infinity and no not-a-number."""
        found = vars(self) | {"checks": None}
        for name in ("kl_share", "images", "causal_lm"):
            if found[name] is None:
                del found[name]
        return {**finite_or_null(found), "checks": [check.as_json() for check in self.checks]}

    def entry(self, stack: str, version: str | None, status: str, reference: str | None, **more: Any) -> dict[str, Any]:
        """An entry of ``verification``, see :class:`patcher.patched.schema.Verification`.

        Args:
            reference: what the folder was held to, in words; None if nothing was computed.
        """
        return {
            "stack": stack,
            "version": version,
            "status": status,
            "passed": status not in ("failed", "not_checked"),
            "reference": reference,
            "dtype": None if reference is None else "float32",
            **self.as_json(),
            **more,
        }

    @property
    def passed(self) -> bool:
        return bool(self.checks) and all(check.passed is not False for check in self.checks)
