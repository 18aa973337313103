"""A few thousand damaged cases through every reader. Many more of them: ``python tests/fuzz/run.py --cases 100000``."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import run
from support.fuzz import loop
from support.fuzz.loop import Reader, fuzz
from support.fuzz.readers import READERS

from patcher.errors import InputError

CASES = 40


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", READERS)
def test_damaged_files_are_read_right_or_refused(name: str, tmp_path: Path) -> None:
    reader = READERS[name]
    tally = fuzz(reader, tmp_path / "root", CASES // reader.cost, seed=1)
    assert not tally.failures, "\n\n".join(failure.text for failure in tally.failures[:5])
    # Of caches and journals, what is damaged is as good as not there.
    assert tally.accepted and (tally.refused or "cache" in name or "journal" in name)


def _raise(_folder: Path, _out: Path) -> None:
    raise KeyError("tensor")


def _write_beside(folder: Path, _out: Path) -> None:
    (folder.parent / "more").write_text("x")


def _write_into_the_case(folder: Path, _out: Path) -> None:
    (folder / "more").write_text("x")


def _remove(folder: Path, _out: Path) -> None:
    (folder / "x.json").unlink()


def _open_outside(folder: Path, _out: Path) -> None:
    (folder / ".." / "secret.json").read_bytes()


def _start(_folder: Path, _out: Path) -> None:
    os.system("true")


def _nameless(_folder: Path, _out: Path) -> None:
    raise InputError("something is wrong")


def _write_where_it_may(_folder: Path, out: Path) -> str:
    (out / "more").write_text("x")
    return "read"


BROKEN: dict[str, tuple[Callable[[Path, Path], Any], str]] = {
    "raises": (_raise, "KeyError"),
    "writes beside": (_write_beside, "opened"),
    "writes into the case": (_write_into_the_case, "opened"),
    "removes": (_remove, "os.remove"),
    "opens outside": (_open_outside, "secret.json"),
    "starts something": (_start, "os.system"),
    "names no file": (_nameless, "names no file"),
}


def _first_sound(read: Callable[[Path, Path], Any]) -> Callable[[Path, Path], Any]:
    """The sound case is read as it should be, and the damaged ones by ``read``."""
    calls = iter([_write_where_it_may])
    return lambda folder, out: next(calls, read)(folder, out)


@pytest.mark.parametrize("what", BROKEN)
def test_a_reader_that_breaks_a_rule_is_found_out(what: str, tmp_path: Path) -> None:
    read, told = BROKEN[what]
    reader = Reader("broken", lambda: [{"x.json": b"{}"}], _first_sound(read))
    tally = fuzz(reader, tmp_path / "root", 1)
    assert (tally.accepted, len(tally.failures)) == (1, 1)
    assert told in tally.failures[0].text


def test_what_is_read_otherwise_than_the_stock_reader_reads_it_is_found_out(tmp_path: Path) -> None:
    def same(folder: Path, found: Any) -> None:
        assert found == json.loads((folder / "x.json").read_bytes())

    def read(folder: Path, _out: Path) -> Any:
        try:
            json.loads((folder / "x.json").read_bytes())
        except (ValueError, RecursionError):
            raise InputError("no", where=str(folder)) from None
        return {"a": 1}

    reader = Reader("wrong", lambda: [{"x.json": b'{"a": 1}'}], read, same)
    tally = fuzz(reader, tmp_path / "root", 200)
    assert tally.wrong and not tally.uncaught
    assert all(json.loads(failure.case["x.json"]) != {"a": 1} for failure in tally.failures)


def _pickle(folder: Path, _out: Path) -> None:
    pickle.loads(pickle.dumps(Path(folder)))


def test_the_pickles_of_a_case_are_not_run(tmp_path: Path) -> None:
    tally = fuzz(Reader("pickle", lambda: [{"x.json": b"{}"}], _first_sound(_pickle)), tmp_path / "root", 1)
    assert "pickle.find_class" in tally.failures[0].text


def test_a_reader_without_end_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def turn(_folder: Path, _out: Path) -> None:
        while True:
            pass

    monkeypatch.setattr(loop, "CPU_SECONDS", 0.1)
    tally = fuzz(Reader("slow", lambda: [{"x.json": b"{}"}], _first_sound(turn)), tmp_path / "root", 1)
    assert tally.uncaught == 1 and "processor time" in tally.failures[0].text


EATERS = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[2:]
from support.fuzz.loop import Reader, fuzz
from support.fuzz.memory import MOST_OF_A_CASE, ROOM, limit_memory

sizes = iter([1, ROOM * 2, MOST_OF_A_CASE * 3 // 2])
limit_memory()
reader = Reader("eater", lambda: [{"x.json": b"{}"}], lambda _folder, _out: len(b"x" * next(sizes)))
tally = fuzz(reader, Path(sys.argv[1]), 2)
for failure in tally.failures:
    print(failure.kind, failure.text.splitlines()[-1])
"""


def test_a_reader_that_takes_much_memory_is_found_out(tmp_path: Path) -> None:
    tests = Path(__file__).parents[1]
    command = [sys.executable, "-c", EATERS, str(tmp_path / "root"), str(tests), str(tests.parent)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    refused, measured = done.stdout.splitlines()
    assert refused == "uncaught MemoryError"
    assert measured.startswith("wrong ") and "bytes of memory" in measured


@pytest.mark.filterwarnings("ignore")
def test_the_command_prints_a_table_and_keeps_what_broke_a_rule(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def careless(folder: Path, _out: Path) -> Any:
        return json.loads((folder / "x.json").read_bytes())

    monkeypatch.setitem(READERS, "careless", Reader("careless", lambda: [{"x.json": b"{}"}], careless))
    readers = ("--reader", "pairs .json", "--reader", "careless")
    assert run.main(["--cases", "40", *readers, "--keep", str(tmp_path / "kept")]) == 1
    out, err = capfd.readouterr()
    header, sound, broken, total = (line.split() for line in out.splitlines())
    assert header[:4] == ["reader", "cases", "refused", "accepted"]
    assert sound[:3] == ["pairs", ".json", "44"] and sound[5:7] == ["0", "0"], "uncaught and wrong"
    assert int(broken[4]) > 5 and total[:2] == ["all", "85"]
    assert "JSONDecodeError" in err or "Expecting" in err
    assert "Traceback" in (tmp_path / "kept" / "careless-0" / "WHAT.txt").read_text()
    assert run.main(["--cases", "5", *readers[:2]]) == 0
