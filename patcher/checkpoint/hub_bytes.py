"""How many bytes of a download have come: the Hub's client tells that only to a progress bar of tqdm's kind."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

from patcher.progress.stage import Stage


def bar_class(running: Stage) -> Any:
    """A class of bars for ``tqdm_class`` of ``snapshot_download`` that shows nothing, and tells ``running``.

    The client makes several: of files, of bytes on the wire, of bytes on the disk. The largest count of bytes is taken.
    """
    lock = threading.RLock()
    bars: list[_Bar] = []

    def tell() -> None:
        with lock:
            done, total = (max((bar.n for bar in bars), default=0), max((bar.total or 0 for bar in bars), default=0))
            if total:
                running.at(min(done, total), total)

    class _Bar:
        _lock = lock  # where older clients look

        def __init__(self, iterable: Iterable[Any] = (), *_: Any, **options: Any) -> None:
            self.iterable, self.n = iterable, options.get("initial") or 0
            self.total, self.format_dict = options.get("total"), {"rate": None}
            if options.get("unit") == "B":
                bars.append(self)

        def __iter__(self) -> Any:
            return iter(self.iterable)

        def __enter__(self) -> _Bar:
            return self

        def __exit__(self, *_error: object) -> None:
            pass

        def update(self, count: float | None = 1) -> None:
            self.n += count or 0
            tell()

        def _nothing(self, *_: Any, **__: Any) -> None:
            pass

        close = refresh = reset = set_description = set_description_str = set_postfix_str = set_postfix = _nothing

        @classmethod
        def get_lock(cls) -> threading.RLock:
            return lock

        @classmethod
        def set_lock(cls, _lock: Any) -> None:
            pass

    return _Bar
