"""Publishing a patched folder on the Hub: one commit, or nothing."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from patcher.errors import InputError, OutsideError
from patcher.errors.hub import hub_errors
from patcher.patched.reading import read_manifest
from patcher.patched.schema import Patch
from patcher.publish.commit import CopyRefusedError, Target, can_copy, commit
from patcher.publish.contents import OnHub, PublishedFile, check_verified, left_over, published_files
from patcher.publish.duplicate import DuplicateRefusedError, duplicate_and_commit, require_here, worth_duplicating
from patcher.publish.meter import Meter
from patcher.publish.privacy import publishable, sanitised_text
from patcher.publish.unchanged import Changes, Hashes, HubBase, base_on_hub, compare
from patcher.publish.visibility import check_base_is_public, check_visibility

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, HfApi, ModelInfo

_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class PushResult:
    """Where the folder is now.

    Attributes:
        url: of the repository, of its branch if one was named, or of the pull request.
        commit: the commit that holds the folder.
        method: how it got there. ``copy``: the Hub copied the files that are the base's, in the commit itself.
            ``duplicate``: it duplicated the base, and the commit went on top. ``upload``: everything that the
            repository did not have was sent. ``unchanged``: it had everything.
        bytes_uploaded: what went up for it: contents of files, and the commit.
    """

    url: str
    commit: str
    method: str
    bytes_uploaded: int


def push_folder(
    folder: Path,
    repo: str,
    *,
    private: bool = False,
    public: bool = False,
    revision: str | None = None,
    pull_request: bool = False,
    commit_message: str | None = None,
    token: str | None = None,
    progress: Callable[[str], None] | None = None,
    on_hub: Mapping[str, OnHub] | None = None,
) -> PushResult:
    """Publish a verified patched folder in a single commit.

    Files that are the base's to the last byte are copied on the server, if the base is on the Hub and its storage
    allows that; only the others are sent. Only files of a patched folder are published, without local paths and tokens
    (see :mod:`patcher.publish.privacy`); the folder itself is not changed. Files of the repository that a loader could
    read in their place are removed by the same commit. If anything fails, no part of the folder is to be seen. A
    repository that had to be created stays, empty; what has arrived in its storage is not sent again by the next
    attempt. Should only the Hub's last answer get lost, running it again finds that there is nothing left to do.

    Args:
        folder: what a build wrote.
        repo: ``owner/name``, or ``name`` for the token's owner; created if it is not there.
        private: create it as private. A public one that exists already is refused, not published to.
        public: create it as public, even where the base is private; without it, a copy of such a base is refused.
        revision: a branch, created from the default one if it is not there.
        pull_request: open a pull request against the default branch instead; read access to it is enough.
        commit_message: the commit's title.
        token: by default the one that ``huggingface_hub`` finds (HF_TOKEN, ``hf auth login``).
        progress: is called with one line at each step.
        on_hub: weight files of the base, by their names in the copy, that are not in the folder: the Hub copies them,
            or nothing is published.

    Raises:
        InputError: the folder is not a verified patched folder, holds a token, or ``repo`` or ``revision`` is wrong; or
            the base is private and the copy would not be.
        OutsideError: no access, a conflict, a limit, no connection, the disk.
    """
    say = progress or (lambda line: None)
    _check_target(repo, revision, pull_request, private and public)
    manifest = read_manifest(folder)
    check_verified(manifest, folder, remote=on_hub is not None)
    files = published_files(folder, manifest, on_hub)
    title = sanitised_text((commit_message or "").strip()) or _title(publishable(manifest))

    api, owner = _logged_in(repo, token, say)
    if "/" not in repo:
        repo = f"{owner}/{repo}"
    base = base_on_hub(api, manifest.base, say)
    if not private and not public:
        check_base_is_public(api, base, repo)
    with hub_errors(f"creating {repo}", repo):
        created = _create(api, repo, private, public)
    with hub_errors(f"writing to {repo}", repo):
        # A token that may only read gets this far, because the repository is there already.
        api.auth_check(repo, write=not pull_request)
    target = Target(api, repo, revision, pull_request, title, say)
    with Meter() as meter, _branch(target) as head:
        target.sent = lambda: meter.sent(at_most=0)
        check_visibility(target, head, base, private, created)
        made, method, sent = _publish(target, files, head, base, created)
        uploaded = meter.sent(at_most=sent)
    if made is None:
        return PushResult(target.url, str(head.sha), "unchanged", 0)
    return PushResult(made.pr_url or target.url, made.oid, method, uploaded)


def _publish(
    target: Target, files: Sequence[PublishedFile], head: ModelInfo, base: HubBase | None, created: bool
) -> tuple[CommitInfo | None, str, int]:
    """The cheapest way that works: the commit, the way's name, and the sizes of the files that were sent."""
    hashes = Hashes()
    changes, removed = _changes(target, files, head, base, hashes)
    if removed:
        target.say("removing what would be loaded in place of the steered files: " + ", ".join(removed))
    if any(not file.here for file in changes.new):
        require_here(changes, target, base, copying=True)
    if base is not None and changes.copyable and can_copy() and not changes.stranded(copying=True):
        try:
            made = commit(target, changes, removed, str(head.sha), copied_from=base)
            return made, "copy", _size(changes.to_send(copying=True))
        except CopyRefusedError as refusal:
            target.say(f"the Hub does not copy files of {base.repo}: {refusal}")
    if base is not None and worth_duplicating(target, base, changes, created):
        try:
            made = duplicate_and_commit(target, base, files, head, hashes)
            return made, "duplicate", _size(changes.new)
        except DuplicateRefusedError as refusal:
            target.say(f"the Hub does not duplicate {base.repo}: {refusal}")
        with hub_errors(f"reading {target.repo}", target.repo):
            head = target.api.model_info(target.repo, files_metadata=True)
        changes, removed = _changes(target, files, head, base, hashes)
    require_here(changes, target, base, copying=False)
    made = commit(target, changes, removed, str(head.sha))
    return made, "upload", _size(changes.to_send(copying=False))


def _changes(
    target: Target, files: Sequence[PublishedFile], head: ModelInfo, base: HubBase | None, hashes: Hashes
) -> tuple[Changes, list[str]]:
    there = {sibling.rfilename: sibling for sibling in head.siblings or []}
    with hub_errors("comparing the files with the Hub's", target.repo):
        changes = compare(files, there, base, hashes, target.say)
    return changes, left_over(list(there), [file.name for file in files])


def _size(files: Sequence[PublishedFile]) -> int:
    return sum(file.size for file in files)


def _check_target(repo: str, revision: str | None, pull_request: bool, private_and_public: bool) -> None:
    if "://" in repo or repo.count("/") > 1:
        raise InputError(
            "a repository is named owner/name",
            where=repo,
            remedy="drop the address in front of it",
            code="hub_repo_id",
        )
    with hub_errors("reading the name of the repository", repo):
        from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

        validate_repo_id(repo)
    if private_and_public:
        raise InputError("a repository is either private or public", where=repo, remedy="give one of the two")
    if revision is None:
        return
    if pull_request and revision != "main":
        raise InputError(
            "a pull request is made against the default branch",
            where=f"--revision {revision}",
            remedy="give either a revision or a pull request",
        )
    if not revision.strip() or _COMMIT.fullmatch(revision):
        raise InputError(
            "files are published to a branch, and this cannot be one",
            where="--revision",
            found=repr(revision),
            remedy="give the branch a name such as `strong`, or leave the revision out",
        )


def check_can_publish(repo: str, revision: str | None, pull_request: bool, token: str | None = None) -> None:
    """Refuse, before any work, what could not be published after it.

    Raises:
        InputError: ``repo`` or ``revision`` is wrong.
        OutsideError: offline mode is on, there is no token, or the installed client cannot copy files on the server.
    """
    _check_target(repo, revision, pull_request, False)
    _logged_in(repo, token, lambda line: None)


def _logged_in(repo: str, token: str | None, say: Callable[[str], None]) -> tuple[HfApi, str]:
    """The client, and the name of the token's owner."""
    with hub_errors("loading the Hub client", repo):
        from huggingface_hub import HfApi, constants

        api = HfApi(token=token)
    if constants.HF_HUB_OFFLINE:
        raise OutsideError(
            "offline mode is on, so nothing can be published",
            where=repo,
            found="HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set",
            remedy="unset HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE, then run the same command again",
            code="hub_offline",
        )
    say("asking the Hub who this token belongs to")
    with hub_errors("logging in", repo):
        return api, str(api.whoami()["name"])


def _create(api: HfApi, repo: str, private: bool, public: bool) -> bool:
    """Create the repository if it is not there; whether it was created now."""
    from huggingface_hub.errors import HfHubHTTPError

    # None leaves the choice to the organization, whose default may be private.
    visibility = True if private else False if public else None
    try:
        api.create_repo(repo, private=visibility)
    except HfHubHTTPError as error:
        if error.response.status_code not in (401, 402, 403, 409):
            raise
        # Whatever may not be created can be there already, and this looks.
        api.create_repo(repo, private=visibility, exist_ok=True)
        return False
    return True


@contextlib.contextmanager
def _branch(target: Target) -> Iterator[ModelInfo]:
    """The head of the branch to publish to. A branch made here goes again if nothing is published to it."""
    from huggingface_hub.errors import RevisionNotFoundError

    api, repo, revision, created = target.api, target.repo, target.revision, False
    with hub_errors(f"reading {repo}", repo):
        try:
            head = api.model_info(repo, revision=revision, files_metadata=True)
        except RevisionNotFoundError:
            if revision is None or revision.startswith("refs/"):
                raise
            target.say(f"creating the branch {revision}")
            api.create_branch(repo, branch=revision, exist_ok=True)
            created = True
            head = api.model_info(repo, revision=revision, files_metadata=True)
    try:
        yield head
    except BaseException:
        if created and revision is not None:
            # It shows the default branch's files, which may be an unsteered model under a steered name.
            with contextlib.suppress(Exception):
                api.delete_branch(repo, branch=revision)
        raise


def _title(manifest: Patch) -> str:
    what = ", ".join(f"{edit.name} at layer {edit.layer}" for edit in manifest.edits)
    title = f"Steered copy of {manifest.base.model or 'a model'}" + (f": {what}" if what else "")
    return title if len(title) <= 120 else title[:117] + "..."
