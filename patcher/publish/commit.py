"""One commit that holds a whole patched folder, and which of its files the server copies from the base."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from patcher.errors.hub import hub_errors, without_tokens
from patcher.progress.stage import BYTES, Measure, Say, doing
from patcher.publish.contents import OnHub, PublishedFile
from patcher.publish.unchanged import BaseFile, Changes, HubBase

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi

# What a server that cannot copy a file says when the commit names it all the same.
_NO_OBJECT = re.compile(r"\blfs\b|\bxet\b|pointer", re.IGNORECASE)
_COPY_PAUSES = (1.0, 4.0)


class CopyRefusedError(Exception):
    """The Hub does not copy the base's files into this repository; nothing was committed."""


@dataclass
class Target:
    """Where a folder goes, and what a commit there is called.

    ``adds`` are the files that were handed to the client, with how far it got: what went up for a commit that was not
    made is not sent again for the next. ``sent`` says how many bytes went up so far.
    """

    api: HfApi
    repo: str
    revision: str | None
    pull_request: bool
    title: str
    say: Say
    adds: dict[str, CommitOperationAdd] = field(default_factory=dict)
    sent: Measure | None = None

    @property
    def url(self) -> str:
        url = f"{self.api.endpoint}/{self.repo}"
        return url if self.revision in (None, "main") else f"{url}/tree/{quote(str(self.revision), safe='')}"

    @property
    def settings(self) -> str:
        return f"{self.api.endpoint}/{self.repo}/settings"


def can_copy() -> bool:
    """Whether the installed client copies files from one repository to another."""
    from huggingface_hub import CommitOperationCopy

    return "src_repo_id" in CommitOperationCopy.__dataclass_fields__


def commit(
    target: Target, changes: Changes, removed: Iterable[str], parent: str, copied_from: HubBase | None = None
) -> CommitInfo | None:
    """Publish everything in one commit, or nothing; None if there was nothing to do.

    Args:
        target: where to.
        changes: the folder's files, compared with the head of the branch.
        removed: files of the repository to delete in the same commit.
        parent: the commit that ``changes`` was compared with; the Hub refuses if someone else was faster.
        copied_from: the base, if its files are to be copied on the server.

    Raises:
        CopyRefusedError: files cannot be copied; only with ``copied_from``.
        PatchModelError: see :func:`patcher.errors.hub.hub_errors`.
    """
    from huggingface_hub import CommitOperationDelete

    say, api = target.say, target.api
    copies = changes.copyable if copied_from is not None else []
    sent = changes.to_send(copying=bool(copies))
    if copied_from is not None and copies:
        say(f"copying unchanged files from {copied_from.repo}, on the Hub: {_amount([file for file, _ in copies])}")
    operations: list[Any] = [_copy(target, file, source, copied_from) for file, source in copies if copied_from]
    operations += [_add(target, file) for file in sent]
    operations += [CommitOperationDelete(name, is_folder=False) for name in removed]
    if not operations:
        say("the repository holds this already; nothing was committed")
        return None
    again = "run the same command again: what has arrived is not sent a second time"
    size, what = sum(file.size for file in sent), f"uploading {_amount(sent)} to" if sent else "committing to"
    so_far = target.sent or (lambda: 0.0)
    before = so_far()
    uploading = doing(say, f"{what} {target.repo}", size or None, BYTES, lambda: so_far() - before)
    with hub_errors("uploading the files", target.repo, again=again), uploading:
        for pause in (*_COPY_PAUSES, None):
            try:
                # Not upload_folder: where xet is installed it commits in batches, and a failure leaves half a model.
                return api.create_commit(
                    target.repo,
                    operations,
                    commit_message=target.title,
                    revision=target.revision,
                    create_pr=target.pull_request,
                    parent_commit=parent,
                )
            except Exception as error:
                refused = _copy_refused(error) if copies else None
                if refused is None:
                    raise
                if pause is None or not _passing(error):
                    raise CopyRefusedError(refused) from error
                time.sleep(pause)
    raise AssertionError("the last attempt returns or raises")


def _amount(files: Sequence[PublishedFile]) -> str:
    return f"{len(files)} file{'s' * (len(files) != 1)} ({sum(file.size for file in files) / 1e6:.1f} MB)"


def _add(target: Target, file: PublishedFile) -> CommitOperationAdd:
    from huggingface_hub import CommitOperationAdd

    if file.name not in target.adds:
        if isinstance(file.content, OnHub):
            raise ValueError(f"{file.name} is not here to be sent")
        target.adds[file.name] = CommitOperationAdd(file.name, file.content)
    return target.adds[file.name]


def _copy(target: Target, file: PublishedFile, source: BaseFile, base: HubBase) -> Any:
    from huggingface_hub import CommitOperationCopy

    # Within one repository no storage has to be shared.
    other: dict[str, Any] = {} if base.repo == target.repo else {"src_repo_id": base.repo, "src_repo_type": "model"}
    return CommitOperationCopy(source.name, file.name, src_revision=base.revision, **other)


def _copy_refused(error: Exception) -> str | None:
    """Why the server does not copy, in one line; None if the error is about something else.

    Everything that the endpoint for copies answers is such a reason, except that the token or the pace is wrong: what
    can be uploaded need not be copied.
    """
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    text = without_tokens(str(error).strip()).splitlines() or [type(error).__name__]
    if isinstance(error, HfHubHTTPError):
        path, status = str(error.response.url.path), int(error.response.status_code)
        said = without_tokens(error.server_message or f"HTTP {status}")[:200]
        if path.endswith("/lfs-files/duplicate") or "/paths-info/" in path:
            return None if status in (401, 429) else said
        if "/commit/" in path and status in (400, 404, 422) and _NO_OBJECT.search(said):
            return said
        return None
    # Errors of the client: the class is not there in older ones, and the file has no storage that can be shared.
    if type(error).__name__ == "FileDuplicationError":
        return text[-1].strip(" -")[:200]
    if isinstance(error, EntryNotFoundError) or (isinstance(error, ValueError) and "Cannot duplicate" in text[0]):
        return text[0][:200]
    return None


def _passing(error: Exception) -> bool:
    from huggingface_hub.errors import HfHubHTTPError

    return isinstance(error, HfHubHTTPError) and int(error.response.status_code) in (500, 502, 503, 504)
