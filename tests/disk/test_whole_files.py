"""A file is replaced whole or not at all, whatever fails on the way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest

from patcher.disk.whole_files import is_partial, whole_file


def full(*_: object) -> NoReturn:
    raise OSError(28, "No space left on device")


def names(folder: Path) -> list[str]:
    return sorted(item.name for item in folder.iterdir())


@pytest.mark.parametrize("durable", [True, False])
def test_a_file_appears_and_is_replaced(tmp_path: Path, durable: bool) -> None:
    path = tmp_path / "file.json"
    for text in ("old", "new"):
        with whole_file(path, durable=durable) as partial:
            partial.write_text(text)
            assert partial.parent == tmp_path and is_partial(partial) and not is_partial(path)
            assert path.exists() == (text == "new")
        assert path.read_text() == text and names(tmp_path) == ["file.json"]


def test_two_writers_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with whole_file(path) as outer:
        outer.write_text("outer")
        with whole_file(path) as inner:
            inner.write_text("inner")
        assert path.read_text() == "inner"
    assert path.read_text() == "outer" and names(tmp_path) == ["file"]


@pytest.mark.parametrize("failing", ["write", "fsync", "replace", "interrupt", "nothing written"])
def test_a_failure_leaves_the_old_file_and_nothing_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    if failing == "fsync":
        monkeypatch.setattr(os, "fsync", full)
    if failing == "replace":
        monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(KeyboardInterrupt if failing == "interrupt" else OSError), whole_file(path) as partial:
        if failing != "nothing written":
            partial.write_text("half")
        if failing == "write":
            full()
        if failing == "interrupt":
            raise KeyboardInterrupt
    assert path.read_text() == "old" and names(tmp_path) == ["file"]


def test_a_failure_that_cannot_be_cleaned_up_is_the_one_that_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(_path: Path) -> NoReturn:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "unlink", forbidden)
    with pytest.raises(OSError, match="No space left"), whole_file(tmp_path / "file") as partial:
        partial.write_text("half")
        full()
    assert [is_partial(item) for item in tmp_path.iterdir()] == [True]


def test_a_killed_process_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    program = (
        "import os, signal, sys; from pathlib import Path; from patcher.disk.whole_files import whole_file\n"
        "with whole_file(Path(sys.argv[1])) as partial:\n"
        "    partial.write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program, path], cwd=Path(__file__).parents[2])
    assert ended.returncode == -signal.SIGKILL
    assert path.read_text() == "old"
    assert [is_partial(item) for item in tmp_path.iterdir() if item != path] == [True]
