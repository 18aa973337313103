"""A checkpoint on the Hub of which only some weight files are here; of the others, their headers are enough.

A safetensors file begins with the names, shapes and dtypes of its tensors. They are read by range requests.
Each header is put into a file of the true size, whose data is a hole and takes no room. Whatever reads headers alone,
stock loaders included, takes it for the file itself.
"""

from __future__ import annotations

import glob
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from patcher.checkpoint.folder import BIN_INDEX, BIN_SINGLE, INDEX, SINGLE, CheckpointFolder, Layout
from patcher.checkpoint.safetensors_file import MAX_HEADER, TensorInfo, read_header
from patcher.checkpoint.source import Source
from patcher.errors import InputError, OutsideError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

# Most headers are shorter, and then one request is enough.
_FIRST = 100_000
_THREADS = 8
_PREFIX = 8
_TIMEOUT = 60.0
_NOT_HERE = "on-the-hub"


@dataclass(frozen=True)
class HubFile:
    """A file of a repository: its size in bytes, and its SHA-256 where it is a large file."""

    name: str
    size: int
    sha256: str | None


class HubCheckpoint(CheckpointFolder):
    """A checkpoint on the Hub: its small files are here, and those of its weight files that were downloaded.

    Args:
        source: the small files (:func:`patcher.checkpoint.source.fetch` without weights); those that are downloaded
            later lie beside them.
        listed: every file of the repository, by name.
        hollow: a folder that has the hollow stand-ins of all weight files, or is empty: then they are made.
        here: the weight files that are used as they lie here.

    Attributes:
        tensors: of all weight files. Whoever reads one of a file that is not here fails: its ``file`` leads nowhere.

    Raises:
        InputError: the checkpoint is of no safetensors layout, or its files contradict each other.
        OutsideError: the Hub could not be asked.
    """

    def __init__(
        self, source: Source, listed: Mapping[str, HubFile], hollow: Path, *, here: Collection[str] = ()
    ) -> None:
        self.source, self.listed, self.hollow = source, listed, hollow
        self.here = frozenset(here)
        super().__init__(source.folder)
        missing = [name for name in self.weight_files if name not in listed]
        if missing:
            raise InputError(
                "the index names a weight file that the repository does not have",
                where=source.name,
                found=missing[0],
                remedy="ask its owner, or take another revision: owner/name@revision",
            )
        if not any(hollow.iterdir()):
            _make_hollow(source, [listed[name] for name in self.weight_files], hollow)

    def _layout(self) -> Layout:
        if SINGLE in self.listed:
            return "single"
        if INDEX in self.listed:
            return "sharded"
        if BIN_SINGLE in self.listed or BIN_INDEX in self.listed:
            raise InputError(
                "the weights are .bin files (pickles), whose tensors cannot be listed without downloading them",
                where=self.source.name,
                remedy="give `output` a folder: they are then downloaded and converted",
                code="remote",
            )
        raise InputError(
            "the repository holds no weights that transformers would load",
            where=self.source.name,
            found=", ".join(sorted(self.listed)[:12]),
            remedy=f"a checkpoint has {SINGLE} or {INDEX}",
        )

    def _header(self, name: str) -> Mapping[str, TensorInfo]:
        if name in self.here:
            return read_header(self.path / name)
        nowhere = self.path / _NOT_HERE / name
        return {key: replace(info, file=nowhere) for key, info in read_header(self.hollow / name).items()}

    @property
    def absent(self) -> list[str]:
        """The weight files that are not here."""
        return [name for name in self.weight_files if name not in self.here]

    def bytes_of(self, names: Collection[str]) -> int:
        """The sizes of files of the repository."""
        return sum(self.listed[name].size for name in names)

    def with_files(self, names: Collection[str]) -> HubCheckpoint:
        """The same after these weight files were downloaded (or found in the cache)."""
        return HubCheckpoint(self.source, self.listed, self.hollow, here={*self.here, *fetch_files(self.source, names)})


def files_on_the_hub(source: Source) -> dict[str, HubFile]:
    """Every file of the base's repository at its commit.

    Raises:
        InputError, OutsideError: in plain words, see :mod:`patcher.errors.hub`.
    """
    from huggingface_hub import HfApi

    from patcher.errors.hub import hub_errors

    with hub_errors("listing the model's files", source.name):
        info = HfApi().model_info(source.name, revision=source.revision, files_metadata=True)
    return {
        item.rfilename: HubFile(item.rfilename, int(item.size or 0), None if item.lfs is None else str(item.lfs.sha256))
        for item in info.siblings or []
    }


def fetch_files(source: Source, names: Collection[str]) -> set[str]:
    """Download (or find in the cache) these files of the base; they lie in its folder afterwards.

    Raises:
        InputError, OutsideError: in plain words, see :mod:`patcher.errors.hub`.
    """
    from huggingface_hub import snapshot_download

    from patcher.errors.hub import hub_errors

    if not names:
        return set()
    with hub_errors("downloading the model", source.name):
        # A name is not a pattern, whatever characters it has.
        patterns = [glob.escape(name) for name in sorted(names)]
        folder = Path(snapshot_download(source.name, revision=source.revision, allow_patterns=patterns))
    missing = sorted(name for name in names if not (folder / name).is_file())
    if missing or folder != source.folder:
        raise OutsideError(
            "a part of the model could not be downloaded",
            where=source.name,
            found=", ".join(missing[:3]) or str(folder),
            remedy="check the network, and that the repository holds this file",
            code="hub_unreachable",
        )
    return set(names)


def _make_hollow(source: Source, files: Collection[HubFile], place: Path) -> None:
    from huggingface_hub import HfApi

    from patcher.errors.hub import hub_errors

    api = HfApi()
    with hub_errors("reading the headers of the weight files", source.name), ThreadPoolExecutor(_THREADS) as pool:
        headers = list(pool.map(lambda file: _raw_header(api, source, file), files))
    for file, header in zip(files, headers, strict=True):
        with (place / file.name).open("xb") as target:
            target.write(header)
            target.truncate(file.size)


def _raw_header(api: HfApi, source: Source, file: HubFile) -> bytes:
    """A file's header, length prefix included."""
    begun = _range(api, source, file, 0, min(_FIRST, file.size))
    length = int.from_bytes(begun[:_PREFIX], "little")
    if len(begun) < _PREFIX or length > min(MAX_HEADER, file.size - _PREFIX):
        raise InputError(
            "this is no safetensors file",
            where=f"{source.name}: {file.name}",
            remedy="ask the owner of the repository",
            code="checkpoint",
        )
    end = _PREFIX + length
    if end > len(begun):
        begun += _range(api, source, file, len(begun), end)
    return begun[:end]


def _range(api: HfApi, source: Source, file: HubFile, start: int, end: int) -> bytes:
    """Bytes ``start`` to ``end`` of a file."""
    from huggingface_hub import get_session, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]

    url = hf_hub_url(source.name, file.name, revision=source.revision, endpoint=api.endpoint)
    headers = {**build_hf_headers(), "Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
    # Streamed: a server without ranges would send the whole file.
    with get_session().stream("GET", url, headers=headers, timeout=_TIMEOUT) as answer:
        if answer.status_code >= 400:
            answer.read()
        hf_raise_for_status(answer)
        skipped = 0 if answer.status_code == 206 else start
        wanted = skipped + end - start
        received = bytearray()
        for part in answer.iter_bytes():
            received += part
            if len(received) >= wanted:
                break
    found = bytes(received[skipped:wanted])
    if len(found) < end - start:
        raise OutsideError(
            "the Hub sent less of a file than was asked for",
            where=f"{source.name}: {file.name}",
            found=f"{len(found)} of {end - start} bytes",
            remedy="run the same command again",
            code="hub_unreachable",
        )
    return found
