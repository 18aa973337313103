"""The same through xet: the real storage library on both sides, with a folder as its storage."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.hub_client import Client
from support.hub_server import HubServer, User
from support.hub_xet import LocalXet
from support.publishing import REPO, TOKEN, client_of, manifest, refused, shows_the_folder, steers

from patcher.checkpoint.copying import sha256_of

pytest.importorskip("hf_xet")


@pytest.fixture(scope="module")
def xet_hub(pair: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    storage = LocalXet(tmp_path_factory.mktemp("xet"))
    storage.store(pair[0] / "model.safetensors")
    with HubServer(storage) as hub:
        yield hub


@pytest.fixture(scope="module")
def xet_client(xet_hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with client_of(xet_hub, tmp_path_factory.mktemp("xet-home")) as client:
        yield client


@pytest.fixture
def push(xet_hub: HubServer, xet_client: Client, pair: tuple[Path, Path]) -> Any:
    """Publish the copy of a base that is there in xet storage."""
    xet_hub.users, xet_hub.repos, xet_hub.lfs, xet_hub.faults = {TOKEN: User("me")}, {}, {}, []
    xet_hub.requests, xet_hub.received, xet_hub.sizes = [], [], []
    base = xet_hub.add_repo("org/base", {path.name: path.read_bytes() for path in pair[0].iterdir()})
    files = [{"name": path.name, "size": path.stat().st_size, "sha256": sha256_of(path)} for path in pair[0].iterdir()]
    record = {"model": "org/base", "revision": base.refs["main"], "path": None, "adapter": None, "files": files}

    def push(hub: bool = True) -> dict[str, Any]:
        (pair[1] / "steering.json").write_text(json.dumps(manifest(base={**record, "hub": hub})))
        return xet_client("push", folder=str(pair[1]), repo=REPO, token=TOKEN)

    return push


@pytest.mark.slow
def test_files_are_copied(xet_hub: HubServer, xet_client: Client, pair: tuple[Path, Path], push: Any) -> None:
    answer = push()["result"]
    assert answer["method"] == "copy" and answer["bytes_uploaded"] < 200_000
    assert any("/xet-write-token/" in line for line in xet_hub.requests), "the small ones go the way of xet"
    assert not any(line.startswith("PUT") for line in xet_hub.requests)
    assert shows_the_folder(xet_hub, pair[1]) and steers(xet_client, REPO, pair)
    assert any("/xet-read-token/" in line for line in xet_hub.requests)


@pytest.mark.slow
def test_an_upload_moves_only_what_the_storage_does_not_have(
    xet_hub: HubServer, xet_client: Client, pair: tuple[Path, Path], push: Any
) -> None:
    """A failed commit, and the run after it: what was uploaded is not moved again."""
    xet_hub.fail("POST .*/commit/", status=503)
    assert "not sent a second time" in refused(push(hub=False), 3, "hub_server")
    assert list(xet_hub.repos[REPO].files()) == [".gitattributes"]
    xet_hub.faults.clear()
    answer = push(hub=False)["result"]
    assert answer["method"] == "upload" and answer["bytes_uploaded"] < 200_000
    assert shows_the_folder(xet_hub, pair[1]) and steers(xet_client, REPO, pair)


def test_new_content_is_counted_as_it_moves(
    xet_hub: HubServer, xet_client: Client, pair: tuple[Path, Path], push: Any
) -> None:
    first = pair[1] / "model-00001-of-00002.safetensors"
    before = first.read_bytes()
    try:
        # Of another base: nothing in the storage is like it.
        first.write_bytes(before[:-25_000_000] + bytes(byte ^ 0x5A for byte in before[-25_000_000:]))
        answer = push(hub=False)["result"]
        assert 20_000_000 < answer["bytes_uploaded"] < 32_000_000 and shows_the_folder(xet_hub, pair[1])
    finally:
        first.write_bytes(before)


def test_storage_that_cannot_be_reached(xet_hub: HubServer, push: Any) -> None:
    xet_hub.fail("GET .*/xet-write-token/", status=403, message="storage quota reached")
    answer = push(hub=False)
    assert answer["exit_code"] == 3 and "Traceback" not in answer["text"], answer
    assert list(xet_hub.repos[REPO].files()) == [".gitattributes"]
