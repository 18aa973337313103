"""Contrast pairs out of a data set on the Hub, through the optional ``datasets`` package."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from patcher.errors import InputError, MissingExtraError, OutsideError
from patcher.errors.causes import cause_of
from patcher.pairs.pair import Record, Table
from patcher.pairs.problems import shown

HUB_PREFIX = "hf://datasets/"
_FILE_SUFFIXES = frozenset((".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".gz", ".zst"))
_ADDRESS = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:/(?P<part>[^@]+))?(?:@(?P<split>[^@]+))?")


@dataclass(frozen=True)
class HubAddress:
    """``hf://datasets/<repo>[/<config or file>][@<split>]``, taken apart."""

    repo: str
    config: str | None
    file: str | None
    split: str | None


def parse_address(source: str, where: str) -> HubAddress:
    """Take an ``hf://datasets/...`` address apart.

    Raises:
        InputError: if it is not of that form.
    """
    match = _ADDRESS.fullmatch(source.removeprefix(HUB_PREFIX).rstrip("/"))
    if match is None or not source.startswith(HUB_PREFIX):
        raise InputError(
            "this is not the address of a data set",
            where=where,
            found=shown(source),
            remedy=f"write it as {HUB_PREFIX}owner/name[/config-or-file][@split]",
        )
    part = match["part"]
    is_file = part is not None and PurePosixPath(part).suffix.lower() in _FILE_SUFFIXES
    return HubAddress(match["repo"], None if is_file else part, part if is_file else None, match["split"])


def read_hub_dataset(source: str, where: str) -> Table:
    """Read all rows of one split: the named one, else the only one, else ``train``.

    Raises:
        InputError: if the address is malformed, or names a configuration or split that is not there.
        OutsideError: if the data set cannot be fetched.
        MissingExtraError: without the ``datasets`` package.
    """
    address = parse_address(source, where)
    try:
        import datasets
    except ImportError:
        raise MissingExtraError("datasets", "datasets", "reading contrast pairs from the Hub") from None
    try:
        loaded = datasets.load_dataset(address.repo, name=address.config, data_files=address.file, split=address.split)
        table = _not_decoded(_only_split(loaded, source, where) if address.split is None else loaded)
        rows = [Record(dict(values), f"{source}[{index}]") for index, values in enumerate(table)]
    except InputError:
        raise
    except Exception as error:
        # The library lets through errors of the HTTP client, Arrow, fsspec and its own, with no common base.
        raise _in_plain_words(error, address, where) from error
    if not rows:
        raise InputError("this data set has no rows", where=where, found=shown(source))
    return Table(rows)


def _only_split(loaded: Any, source: str, where: str) -> Iterable[Mapping[str, Any]]:
    splits = list(loaded)
    chosen = splits[0] if len(splits) == 1 else "train"
    if chosen not in splits:
        raise InputError(
            "this data set has several splits and none is `train`",
            where=where,
            found=", ".join(splits),
            remedy=f"name one: {source}@{splits[0]}" if splits else None,
        )
    table: Iterable[Mapping[str, Any]] = loaded[chosen]
    return table


def _not_decoded(table: Any) -> Any:
    """With the bytes of its images in their place: most of them are not opened, or not yet."""
    from datasets import Image

    for name, feature in (getattr(table, "features", None) or {}).items():
        if isinstance(feature, Image):
            table = table.cast_column(name, Image(decode=False))
    return table


def _in_plain_words(error: Exception, address: HubAddress, where: str) -> InputError | OutsideError:
    name, text = type(error).__name__, cause_of(error)
    if isinstance(error, ValueError) and re.search("split", text, re.IGNORECASE):
        return InputError(f"{address.repo} has no split `{address.split}`", where=where, found=text)
    if isinstance(error, ValueError) and re.search("config", text, re.IGNORECASE):
        return InputError(
            f"{address.repo}: the configuration is missing or unknown",
            where=where,
            found=text,
            remedy=f"name one: {HUB_PREFIX}{address.repo}/<config>",
        )
    if name == "DataFilesNotFoundError" or (isinstance(error, FileNotFoundError) and address.file is not None):
        message = f"{address.repo} has no data file that can be read here"
        return InputError(message, where=where, found=address.file or text)
    if name == "DatasetNotFoundError":
        return OutsideError(
            f"the data set {address.repo} is not on the Hub, or may not be read with this login",
            where=where,
            found=text,
            remedy="check the spelling; for a private or gated one, accept its terms and run: hf auth login",
        )
    return OutsideError(
        f"the data set {address.repo} could not be fetched from the Hub",
        where=where,
        found=f"{name}: {text}",
        remedy="check the connection, or download the file and give its path",
    )
