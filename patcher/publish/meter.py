"""How many bytes really went up: what the Hub's client sent, and what its storage library moved."""

from __future__ import annotations

import contextlib
import threading
from typing import Any


class Meter:
    """Counts uploads while it is open: bodies of PUT requests and of commits, and what xet moved after deduplication.

    A file that was sent twice, because the connection broke, counts twice. Answers, listings and logins do not count.
    """

    def __init__(self) -> None:
        self._requests = 0
        self._lock = threading.Lock()
        self._client: Any = None
        self._xet_commits: list[Any] = []
        self._undo: Any = None

    def __enter__(self) -> Meter:
        from huggingface_hub import get_session

        self._client = get_session()
        self._client.event_hooks["request"].append(self._count)
        self._undo = _watch_xet(self._xet_commits)
        return self

    def __exit__(self, *exc: object) -> None:
        with contextlib.suppress(ValueError):
            self._client.event_hooks["request"].remove(self._count)
        if self._undo is not None:
            self._undo()

    def sent(self, at_most: int) -> int:
        """Bytes that went up so far.

        Args:
            at_most: the sizes of the files that were sent; the answer where the client cannot be watched.
        """
        from huggingface_hub import get_session

        # After a refused connection the client makes itself a new session, which nobody counts.
        if self._undo is None or get_session() is not self._client:
            return max(self._requests, at_most)
        return self._requests + sum(int(done.progress().total_transfer_bytes_completed) for done in self._xet_commits)

    def _count(self, request: Any) -> None:
        if request.method == "PUT" or (request.method == "POST" and "/commit/" in request.url.path):
            with self._lock:
                self._requests += int(request.headers.get("Content-Length") or 0)


def _watch_xet(commits: list[Any]) -> Any:
    """Collect the upload commits of xet sessions in ``commits``; what undoes that, or None if it cannot be done."""
    from huggingface_hub.utils._runtime import is_xet_available

    if not is_xet_available():
        return lambda: None
    try:
        from huggingface_hub.utils import _xet as module

        # Its results are thrown away by the client, and there is no other way to learn what was deduplicated.
        open_session: Any = module.get_xet_session
    except (ImportError, AttributeError):
        return None
    module.get_xet_session = lambda: _WatchedSession(open_session(), commits)
    return lambda: setattr(module, "get_xet_session", open_session)


class _WatchedSession:
    def __init__(self, session: Any, commits: list[Any]) -> None:
        self._session, self._commits = session, commits

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def new_upload_commit(self, *args: Any, **kwargs: Any) -> Any:
        self._commits.append(self._session.new_upload_commit(*args, **kwargs))
        return self._commits[-1]
