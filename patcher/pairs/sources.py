"""Where rows come from: JSON, JSON Lines, CSV and Hub data sets. A new source is one reader and one entry."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from patcher.errors import InputError, OutsideError, Problem, first_line
from patcher.pairs.hub_datasets import HUB_PREFIX, read_hub_dataset
from patcher.pairs.pair import Record, Records
from patcher.pairs.problems import shown


def read_rows(source: str, *, base_folder: Path, where: str) -> Records:
    """Read every row of a file or Hub data set.

    Args:
        source: a path (relative to ``base_folder``) or ``hf://datasets/owner/name[/config-or-file][@split]``.
        base_folder: the recipe's folder.
        where: the place that names the source, for errors.

    Returns:
        The rows, and a problem for each one that could not be read.

    Raises:
        InputError: if the source is not there, of an unknown kind, not UTF-8 or not in its format at all.
        OutsideError: if the Hub or the disk fails.
        MissingExtraError: if a Hub data set is asked for and the ``datasets`` package is missing.
    """
    if source.startswith("hf://"):
        return read_hub_dataset(source, where)
    reader = _READERS.get(Path(source).suffix.lower())
    if reader is None:
        raise InputError(
            "contrast pairs are read from " + ", ".join(_READERS) + f" files and {HUB_PREFIX}...",
            where=where,
            found=shown(source),
            remedy="convert the file, for example to JSON Lines: one object a line",
        )
    rows, problems = reader(_decoded(read_bytes(source, base_folder, where), source), source)
    if not rows and not problems:
        raise InputError("there are no rows in this file", where=source, remedy="give it at least one contrast pair")
    return rows, problems


def read_bytes(source: str, base_folder: Path, where: str) -> bytes:
    """The content of a file that the recipe names, relative to ``base_folder``.

    Raises:
        InputError: it is not there, or not a file.
        OutsideError: it cannot be read.
    """
    try:
        path = base_folder / Path(source).expanduser()
    except RuntimeError as error:
        raise InputError("this path cannot be followed", where=where, found=error) from None
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        remedy = "check the spelling; paths are relative to the recipe's folder"
        raise InputError("there is no such file", where=where, found=path, remedy=remedy) from None
    except IsADirectoryError:
        raise InputError("this is a folder, not a file", where=where, found=path) from None
    except ValueError:
        raise InputError("this cannot be the path of a file", where=where, found=shown(source)) from None
    except OSError as error:
        raise OutsideError("the file cannot be read", where=str(path), found=error.strerror or error) from None


def _decoded(data: bytes, source: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(
            "the file is not UTF-8 text",
            where=f"{source}:{line}",
            found=f"byte 0x{data[error.start]:02x}",
            remedy="save it as UTF-8",
        ) from None


def _read_json(text: str, source: str) -> Records:
    if not text.strip():
        return [], []
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise _broken_json(error, f"{source}:{error.lineno}", text) from None
    except (ValueError, RecursionError) as error:
        raise InputError("the JSON cannot be read", where=source, found=first_line(error)) from None
    items = document
    if isinstance(document, dict):
        listed = [key for key in ("data", "pairs") if isinstance(document.get(key), list)]
        items = document[listed[0]] if len(listed) == 1 else None
    if not isinstance(items, list):
        raise InputError(
            'a JSON file of pairs is a list of objects, or {"pairs": [...]} or {"data": [...]}',
            where=source,
            found=_kind(document),
            remedy="for one object a line, name the file .jsonl",
        )
    rows: list[Record] = []
    problems: list[Problem] = []
    for index, item in enumerate(items):
        _add(item, f"{source}[{index}]", rows, problems)
    return rows, problems


def _read_json_lines(text: str, source: str) -> Records:
    rows: list[Record] = []
    problems: list[Problem] = []
    # Not splitlines(): JSON strings may hold U+2028 and its like as they are.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        origin = f"{source}:{number}"
        try:
            item = json.loads(line)
        except json.JSONDecodeError as error:
            problems.append(_broken_json(error, origin, line).problems[0])
        except (ValueError, RecursionError) as error:
            problems.append(Problem("the JSON of this line cannot be read", origin, first_line(error)))
        else:
            _add(item, origin, rows, problems)
    return rows, problems


def _read_csv(text: str, source: str) -> Records:
    rows: list[Record] = []
    problems: list[Problem] = []
    reader = csv.reader(io.StringIO(text, newline=""))
    header: list[str] | None = None
    start = 1
    try:
        for cells in reader:
            origin, start = f"{source}:{start}", reader.line_num + 1
            if not cells:
                continue
            if header is None:
                header = [name.strip() for name in cells]
                _check_header(header, origin)
            elif len(cells) != len(header):
                message = f"this row has {len(cells)} columns, the header has {len(header)}"
                problems.append(
                    Problem(message, origin, shown(",".join(cells)), 'put "quotes" around texts that hold a comma')
                )
            else:
                values: dict[str, Any] = dict(zip(header, cells, strict=True))
                # An empty cell is the only way in which CSV can say that there is no prompt.
                if values.get("prompt") == "":
                    values["prompt"] = None
                rows.append(Record(values, origin))
    except csv.Error as error:
        raise InputError("the CSV cannot be read", where=f"{source}:{start}", found=error) from None
    return rows, problems


def _check_header(header: list[str], origin: str) -> None:
    twice = sorted(name for name, count in Counter(header).items() if count > 1)
    if twice:
        raise InputError("two columns of the header row have the same name", where=origin, found=", ".join(twice))


def _add(item: object, origin: str, rows: list[Record], problems: list[Problem]) -> None:
    if isinstance(item, dict):
        rows.append(Record(item, origin))
    else:
        problems.append(Problem("a row is an object of keys and values", origin, _kind(item)))


def _broken_json(error: json.JSONDecodeError, where: str, text: str) -> InputError:
    found = shown(text[max(error.pos - 20, 0) : error.pos + 40])
    return InputError(f"broken JSON at column {error.colno}: {error.msg}", where=where, found=found)


def _kind(value: object) -> str:
    if isinstance(value, dict):
        return "an object with the keys " + shown(sorted(str(key) for key in value))
    return f"{type(value).__name__}: {shown(value)}"


_READERS: dict[str, Callable[[str, str], Records]] = {
    ".json": _read_json,
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".csv": _read_csv,
}
