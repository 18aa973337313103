"""What is quoted of another library's error."""

from __future__ import annotations

import pytest

from patcher.errors import first_line


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("one\ntwo"), "one"),
        (ValueError("\n  \n one \ntwo"), "one"),
        (RuntimeError(), "RuntimeError"),
        (RuntimeError(" \n"), "RuntimeError"),
        (OSError(28, "No space left on device"), "[Errno 28] No space left on device"),
        ("a text", "a text"),
        (ValueError("x" * 5000), "x" * 300),
    ],
)
def test_the_first_line_that_says_something(error: object, line: str) -> None:
    assert first_line(error) == line
