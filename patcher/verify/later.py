"""Verify a finished folder again, from the folder and the base alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from patcher.checkpoint.prepare import temporary_base
from patcher.checkpoint.steering_files import MANIFEST
from patcher.errors import InputError
from patcher.patched.base import recorded_adapter, recorded_base, require_recorded
from patcher.patched.reading import read_manifest
from patcher.patched.schema import Patch
from patcher.recipe.schema import VerifySpec
from patcher.stacks.environments import find
from patcher.verify.all_stacks import verify_in_stacks
from patcher.verify.terms import VerifyTerms

_ASKED = ("probes", "tolerance", "long_prompt_limit", "fit_error", "fit_kl")


def verify_folder_in(
    folder: Path,
    stacks: Sequence[str],
    *,
    base: str | None = None,
    adapter: str | None = None,
    places: Mapping[str, str] | None = None,
    trust_remote_code: bool = False,
    progress: Callable[[str], None] | None = None,
) -> list[dict[str, Any]]:
    """Repeat the verification of a patched folder, in one or several stacks.

    Args:
        folder: what a build wrote.
        stacks: of :data:`patcher.stacks.environments.STACKS`.
        base: where the base is, if not where the manifest says.
        adapter: where the merged adapter is, if not where the manifest says.
        places: stack -> where it is installed, if not where the tool looks.

    Returns:
        Entries as in ``steering.json``'s ``verification``; of a stack that is not installed, ``not_checked``.

    Raises:
        InputError: the folder is not ours, the base is not there or not the one it was made from, or a place does not
            hold its stack.
        OutsideError: the base could not be downloaded, or stock software could not run.
    """
    say = progress or (lambda _text: None)
    patch = read_manifest(folder)
    for stack in stacks:
        find(stack, (places or {}).get(stack))
    source = recorded_base(patch, base, say)
    require_recorded(source.folder, patch, say)
    merged = recorded_adapter(patch, adapter)
    stripped = patch.base.stripped or ()
    with temporary_base(source, merged, trust_remote_code=trust_remote_code, stripped=stripped) as reference:
        terms = VerifyTerms(_asked(patch, folder), trust_remote_code, say=say)
        return verify_in_stacks(stacks, folder, reference, patch, terms, places=places)


def _asked(patch: Patch, folder: Path) -> VerifySpec:
    """How the recipe wants the folder verified, within the limits of a recipe.

    Raises:
        InputError: the manifest says what no recipe can.
    """
    stated = patch.resolved.get("verify")
    said = stated if isinstance(stated, dict) else {}
    try:
        return VerifySpec.model_validate({key: said[key] for key in _ASKED if key in said})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise InputError(
            "the manifest asks for a verification that no recipe can ask for",
            where=f"{folder / MANIFEST}: recipe.resolved.verify.{'.'.join(map(str, first['loc']))}",
            found=first["msg"],
            remedy="build the folder again",
        ) from None
