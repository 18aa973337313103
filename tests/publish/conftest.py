"""A loopback Hub, a client process, and a small patched folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from support.hub_client import Client
from support.hub_server import HubServer, Repo, User
from support.publishing import OTHER, READ_ONLY, TOKEN, client_of, manifest, no_token_in

from patcher.checkpoint.copying import sha256_of


@pytest.fixture(scope="session")
def session_hub() -> Iterator[HubServer]:
    with HubServer() as hub:
        yield hub


@pytest.fixture(scope="session")
def client(session_hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with client_of(session_hub, tmp_path_factory.mktemp("hf-home")) as client:
        yield client


@pytest.fixture(scope="session")
def built(client: Client, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built") / "steered"
    assert client("build", folder=str(folder)) == {"result": None}
    save_file({"love.layer.1": np.ones(16, dtype=np.float32)}, folder / "steering.safetensors")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n\n# Steered\n")
    return folder


@pytest.fixture
def hub(session_hub: HubServer) -> Iterator[HubServer]:
    """The server as it is at first: three tokens, no repositories. At the end, none of the tokens is in what it got."""
    session_hub.users = {TOKEN: User("me", orgs=("lab",)), READ_ONLY: User("me", "read"), OTHER: User("other")}
    session_hub.repos, session_hub.lfs, session_hub.faults = {}, {}, []
    session_hub.requests, session_hub.received, session_hub.sizes, session_hub.ranges = [], [], [], []
    session_hub.after_request = None
    yield session_hub
    assert no_token_in(line.encode() for line in session_hub.requests)
    assert no_token_in(session_hub.received)
    assert no_token_in(data for repo in session_hub.repos.values() for data in repo.files().values())


@pytest.fixture
def make_folder(built: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the patched folder with a manifest of the test's."""

    def make(name: str = "steered", **changes: Any) -> Path:
        folder = tmp_path / name
        shutil.copytree(built, folder)
        # Of a local base, so that there is nothing to look up; the tests of copies say otherwise.
        local = {"model": "gpt2-xl", "hub": False, "revision": None, "path": None, "adapter": None, "files": []}
        (folder / "steering.json").write_text(json.dumps(manifest(**{"base": local, **changes}), indent=2))
        return folder

    return make


@pytest.fixture(scope="session")
def pair(client: Client, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base of 31 MB in one file, and its steered copy: that file under another name, and small ones."""
    base, steered = tmp_path_factory.mktemp("pair") / "base", tmp_path_factory.mktemp("pair") / "steered"
    assert client("build_pair", base=str(base), folder=str(steered)) == {"result": None}
    (base / "README.md").write_text("---\nlicense: mit\n---\n\n# Base\n")
    (steered / "README.md").write_text("---\nlicense: mit\nbase_model: org/base\n---\n\n# Steered\n")
    return base, steered


@pytest.fixture
def base(hub: HubServer, pair: tuple[Path, Path]) -> Repo:
    """The base on the server, with a file in another format beside it, as org/base."""
    files = {path.name: path.read_bytes() for path in pair[0].iterdir()}
    return hub.add_repo("org/base", {**files, "onnx/model.onnx": b"unsteered", "pytorch_model.bin": b"unsteered"})


@pytest.fixture
def copy(base: Repo, pair: tuple[Path, Path], tmp_path: Path) -> Path:
    """The steered copy, as a build from org/base on the Hub leaves it."""
    folder = tmp_path / "copy"
    shutil.copytree(pair[1], folder)
    records = [
        {"name": path.name, "size": path.stat().st_size, "sha256": sha256_of(path)} for path in pair[0].glob("*.[js]*")
    ]
    source = {"model": base.id, "hub": True, "revision": base.refs["main"], "path": None, "adapter": None}
    (folder / "steering.json").write_text(json.dumps(manifest(base={**source, "files": records}), indent=2))
    return folder


@pytest.fixture
def folder(make_folder: Callable[..., Path]) -> Path:
    return make_folder()
