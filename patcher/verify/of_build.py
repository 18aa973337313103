"""The verification of a build: which stacks the recipe asks for, and what it demands of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from patcher.errors import CheckFailed, OutsideError
from patcher.patched.failed_route import RecordedCheck, check_in_words
from patcher.patched.schema import Patch
from patcher.progress.clock import Clock
from patcher.progress.stage import Say
from patcher.recipe.schema import Recipe
from patcher.stacks.names import TRANSFORMERS
from patcher.verify.all_stacks import require_installed, verify_in_stacks
from patcher.verify.terms import VerifyTerms
from patcher.verify.watched import WaitingProcess


class NotSteered(CheckFailed):
    """A folder is not steered as a hook steers the base: ``entry`` of ``verification`` says in which stack, and why."""

    default_code = "verification"

    def __init__(self, *arguments: Any, entry: Mapping[str, Any] | None = None, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.entry: Mapping[str, Any] = entry or {}


def stacks_of(recipe: Recipe) -> list[str]:
    """The stacks that are run: transformers in any case, then those listed, or those that are aimed at."""
    if recipe.verify.stacks == "installed":
        wanted = [] if isinstance(recipe.targets, str) else list(recipe.targets)
    else:
        wanted = list(recipe.verify.stacks)
    return list(dict.fromkeys([TRANSFORMERS, *wanted]))


def require_stacks(recipe: Recipe) -> None:
    """Refuse a build whose listed stacks are not installed, before any work.

    Raises:
        OutsideError: one is not installed.
        InputError: a variable names a path that does not hold it.
    """
    if recipe.verify.stacks != "installed":
        require_installed(stacks_of(recipe), "verify.stacks")


def verify_build(
    recipe: Recipe,
    folder: Path,
    base: Path,
    patch: Patch,
    *,
    scratch: Path,
    progress: Say,
    clock: Clock,
    check: Callable[[Mapping[str, Any]], None],
    warm: WaitingProcess | None = None,
) -> list[dict[str, Any]]:
    """Verify the staged folder in every stack that the recipe asks for.

    Args:
        clock: takes the time of the parts.
        check: called with every entry of a stack that was run; raises if it failed.
        warm: see :mod:`patcher.verify.warm`.

    Returns:
        The entries of ``verification``.

    Raises:
        OutsideError: a stack that the recipe lists could not check the folder.
    """
    entries = verify_in_stacks(
        stacks_of(recipe),
        folder,
        base,
        patch,
        VerifyTerms(recipe.verify, recipe.trust_remote_code, scratch, progress, recipe.device, warm, clock),
        # Nothing else is run on a folder that is wrong already.
        after_transformers=check,
    )
    for entry in entries:
        if entry["version"] is None:
            # Where it was looked for is nobody's business who gets the folder.
            entry |= {"note": "not installed where the copy was made", "remedy": ""}
        if entry["status"] != "not_checked":
            check(entry)
        elif recipe.verify.stacks != "installed":
            raise OutsideError(
                f"{entry['stack']} could not check the folder",
                where="verify.stacks",
                found=entry["note"],
                remedy=f"nothing was written; take {entry['stack']} out of verify.stacks",
                code="not_checked",
            )
    return entries


def require_passed(entry: Mapping[str, Any], where: str, *, exact: bool = True) -> None:
    """Raise if a verification did not pass.

    Raises:
        NotSteered: with every check that failed.
    """
    if entry["passed"]:
        return
    failed = [RecordedCheck.model_validate(check) for check in entry["checks"] if check["passed"] is False]
    raise NotSteered(
        f"the folder is not steered as a hook steers the base, in stock {entry['stack']} {entry['version']}",
        where=where,
        found="; ".join(map(check_in_words, failed)),
        remedy="nothing was written"
        if exact
        else "nothing was written; give calibration text that is like the model's use (calibration.texts, "
        "calibration.tokens), another layer or a smaller coefficient, or allow more (verify.fit_error, verify.fit_kl)",
        entry=entry,
    )
