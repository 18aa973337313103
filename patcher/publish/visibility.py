"""Who may see the copy, and who may see the base: nothing private becomes public without a word."""

from __future__ import annotations

from typing import TYPE_CHECKING

from patcher.errors import InputError
from patcher.errors.hub import hub_errors
from patcher.progress.stage import warn
from patcher.publish.commit import Target
from patcher.publish.unchanged import HubBase

if TYPE_CHECKING:
    from huggingface_hub import HfApi, ModelInfo


def check_base_is_public(api: HfApi, base: HubBase | None, repo: str) -> None:
    """Refuse to make a private base public by its copy, before anything is created.

    Raises:
        InputError: the base is private, or this token cannot see it, and ``repo`` is not a private repository.
    """
    from huggingface_hub.errors import RepositoryNotFoundError

    if base is None or not _may_be_private(base):
        return
    with hub_errors(f"reading {repo}", repo):
        try:
            if api.model_info(repo).private:
                return
        except RepositoryNotFoundError:
            pass
    why = "is private" if base.private else "cannot be seen with this token, so it may be private"
    raise InputError(
        f"the base {base.repo} {why}, and its copy would be public",
        where=repo,
        remedy="make the copy private with --private; if everyone may have the base's weights, use --public",
        code="hub_private_base",
    )


def check_visibility(target: Target, head: ModelInfo, base: HubBase | None, private: bool, created: bool) -> None:
    """Refuse a public target where a private one was asked for, and say what becomes visible to whom.

    Raises:
        InputError: the repository is there and public.
    """
    if private and head.private is False:
        raise InputError(
            "this repository exists and is public, but a private one was asked for",
            where=target.repo,
            remedy=f"make it private at {target.settings}, or choose another name",
        )
    if head.private:
        if not private:
            target.say(f"{target.repo} is private, {'as new ones of its owner are' if created else 'and stays so'}")
        return
    if base is not None and _may_be_private(base):
        warn(target.say, f"note: {base.repo} may not be public, but {target.repo} is: everyone can load the copy")
    if base is not None and base.gated:
        warn(
            target.say,
            f"note: access to {base.repo} must be asked for, but everyone can load the copy in {target.repo}; "
            "see that the base's licence allows that, or publish it with --private",
        )


def _may_be_private(base: HubBase) -> bool:
    return base.private or (base.private is None and not base.gated)
