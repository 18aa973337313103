"""A checkpoint on the Hub of which only some weight files are here; of the others, their headers are enough.

A safetensors file begins with the names, shapes and dtypes of its tensors. They are read by range requests.
Each header is put into a file of the true size, whose data is a hole and takes no room. Whatever reads headers alone,
stock loaders included, takes it for the file itself.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from patcher.checkpoint.folder import BIN_INDEX, BIN_SINGLE, INDEX, SINGLE, CheckpointFolder, Layout
from patcher.checkpoint.safetensors_header import MAX_HEADER, PREFIX, TensorInfo, read_header
from patcher.checkpoint.source import Source, fetch_files
from patcher.errors import InputError, OutsideError
from patcher.errors.hub import hub_errors
from patcher.progress.stage import Say, silent

# Most headers are shorter, and then one request is enough.
_FIRST = 100_000
_THREADS = 8
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

    def with_files(self, names: Collection[str], say: Say = silent, text: str = "") -> HubCheckpoint:
        """The same after these weight files were downloaded (or found in the cache), of which ``text`` is said."""
        fetch_files(self.source, names, say, text)
        return HubCheckpoint(self.source, self.listed, self.hollow, here={*self.here, *names})


def files_on_the_hub(source: Source) -> dict[str, HubFile]:
    """Every file of the base's repository at its commit.

    Raises:
        InputError, OutsideError: in plain words, see :mod:`patcher.errors.hub`.
    """
    from huggingface_hub import HfApi

    with hub_errors("listing the model's files", source.name):
        info = HfApi().model_info(source.name, revision=source.revision, files_metadata=True)
    return {
        item.rfilename: HubFile(item.rfilename, int(item.size or 0), None if item.lfs is None else str(item.lfs.sha256))
        for item in info.siblings or []
    }


def _make_hollow(source: Source, files: Collection[HubFile], place: Path) -> None:
    with hub_errors("reading the headers of the weight files", source.name), ThreadPoolExecutor(_THREADS) as pool:
        headers = list(pool.map(lambda file: _raw_header(source, file), files))
    for file, header in zip(files, headers, strict=True):
        with (place / file.name).open("xb") as target:
            target.write(header)
            target.truncate(file.size)


def _raw_header(source: Source, file: HubFile) -> bytes:
    """A file's header, length prefix included."""
    begun = _range(source, file, 0, min(_FIRST, file.size))
    length = int.from_bytes(begun[:PREFIX], "little")
    if len(begun) < PREFIX or length > min(MAX_HEADER, file.size - PREFIX):
        raise InputError(
            "this is no safetensors file",
            where=f"{source.name}: {file.name}",
            remedy="ask the owner of the repository",
            code="checkpoint",
        )
    end = PREFIX + length
    if end > len(begun):
        begun += _range(source, file, len(begun), end)
    return begun[:end]


def _range(source: Source, file: HubFile, start: int, end: int) -> bytes:
    """Bytes ``start`` to ``end`` of a file."""
    from huggingface_hub import get_session, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]

    url = hf_hub_url(source.name, file.name, revision=source.revision)
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
