"""What the loopback Hub holds: users, repositories, commits, and the faults it was told to have."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

LFS_SUFFIXES = (".safetensors", ".bin", ".gguf", ".pt", ".h5", ".model")


@dataclass(frozen=True)
class User:
    """Who a token belongs to, and what it may do: ``write`` or ``read``."""

    name: str
    role: str = "write"
    orgs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Blob:
    data: bytes
    lfs: bool = False

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def oid(self) -> str:
        """What the Hub compares a local file with."""
        return self.sha256 if self.lfs else hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()

    def entry(self, path: str, xet_hash: str | None = None) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(self.data), "oid": self.oid[:40]}
        if self.lfs:
            entry["lfs"] = {"oid": self.sha256, "size": len(self.data), "pointerSize": 134}
            entry |= {"xetHash": xet_hash} if xet_hash else {}
        return entry


@dataclass
class Repo:
    """A repository: every commit is a whole tree.

    ``objects`` are the large files that may be committed to it by their SHA-256: those it has, those that were uploaded
    for it, and those that were copied for it. ``xet`` is whether its storage lets them be copied.
    """

    id: str
    private: bool = False
    gated: bool = False
    granted: set[str] = field(default_factory=set)
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    titles: dict[str, str] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    objects: set[str] = field(default_factory=set)
    xet: bool = True

    @property
    def owner(self) -> str:
        return self.id.partition("/")[0]

    def commit(self, ref: str, files: dict[str, Blob], title: str) -> str:
        # The content is in it, as in git, or a client's cache would take one test's commit for another's.
        content = "".join(f"{path}{blob.oid}" for path, blob in sorted(files.items()))
        sha = hashlib.sha1(f"{self.id}{len(self.commits)}{title}{content}".encode()).hexdigest()
        self.commits[sha], self.titles[sha], self.refs[ref] = files, title, sha
        self.objects |= {blob.sha256 for blob in files.values() if blob.lfs}
        return sha

    def files(self, revision: str = "main") -> dict[str, bytes]:
        sha = self.refs.get(revision, revision)
        return {path: blob.data for path, blob in self.commits[sha].items()}


@dataclass
class Fault:
    """Answer requests whose ``METHOD /path?query`` matches with a status, or cut the connection half-way.

    The first ``after`` requests pass; then ``times`` are hit, or all. With ``done`` the request has its effect, and
    only the answer is lost.
    """

    pattern: str
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    message: str = "injected"
    drop: bool = False
    times: int | None = None
    after: int = 0
    done: bool = False


class Refusal(Exception):  # noqa: N818 - an answer, not a fault of the server
    def __init__(self, status: int, message: str, code: str | None = None, **body: Any) -> None:
        self.status, self.headers, self.body = status, {"X-Error-Message": message}, {"error": message, **body}
        if code:
            self.headers["X-Error-Code"] = code
