"""Publishing weight files that are only on the Hub: the server copies them, or nothing is published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.hub_client import Client
from support.hub_server import HubServer, Repo
from support.publishing import REPO, TOKEN, refused, steers

from patcher.checkpoint.copying import sha256_of

FIRST = "model-00001-of-00002.safetensors"
SMALL = 200_000


@pytest.fixture
def push(client: Client, copy: Path) -> Any:
    """Publish the copy without its first weight file, which is the base's; it was checked by names and shapes."""
    content = ((copy / FIRST).stat().st_size, sha256_of(copy / FIRST))
    (copy / FIRST).unlink()
    manifest = json.loads((copy / "steering.json").read_text())
    manifest["verification"][0]["status"] = "structural"
    (copy / "steering.json").write_text(json.dumps(manifest))
    options = {"repo": REPO, "token": TOKEN, "on_hub": {FIRST: content}}
    return lambda **kwargs: client("push", folder=str(copy), **{**options, **kwargs})


def test_the_server_copies_them(client: Client, hub: HubServer, pair: tuple[Path, Path], push: Any) -> None:
    answer = push()["result"]
    assert answer["method"] == "copy" and hub.uploaded() < SMALL
    assert hub.repos[REPO].files()[FIRST] == (pair[1] / FIRST).read_bytes() and steers(client, REPO, pair)
    again = push()["result"]
    assert (again["method"], again["commit"]) == ("unchanged", answer["commit"])


def test_a_pull_request(hub: HubServer, push: Any) -> None:
    hub.add_repo(REPO, {"config.json": b"{}"})
    answer = push(pull_request=True)["result"]
    assert answer["url"].endswith("/discussions/1") and FIRST not in hub.repos[REPO].files()
    assert FIRST in hub.repos[REPO].files("refs/pr/1")


def test_the_base_is_duplicated_where_files_cannot_be_copied(
    client: Client, hub: HubServer, base: Repo, pair: tuple[Path, Path], push: Any
) -> None:
    base.xet = False
    answer = push()["result"]
    assert answer["method"] == "duplicate" and hub.uploaded() < SMALL
    files = hub.repos[REPO].files()
    assert files[FIRST] == (pair[1] / FIRST).read_bytes() and "model.safetensors" not in files
    assert not hub.repos[REPO].private and steers(client, REPO, pair)


def test_nothing_is_published_where_the_hub_does_neither(hub: HubServer, base: Repo, push: Any) -> None:
    base.xet = False
    hub.add_repo(REPO, {"notes.md": b"mine"})
    head = dict(hub.repos[REPO].refs)
    text = refused(push(), 3, "hub_no_copy")
    assert "org/base" in text and "output" in text
    assert hub.repos[REPO].refs == head and hub.uploaded() < SMALL


def test_a_base_that_has_another_file_now(hub: HubServer, push: Any) -> None:
    assert refused(push(on_hub={FIRST: (123, "0" * 64)}), 3, "hub_no_copy")
    assert hub.repos[REPO].files().keys() == {".gitattributes"}


def test_a_race_is_lost_in_words(hub: HubServer, push: Any) -> None:
    hub.fail("POST .*/commit/", status=412, message="A commit has happened since. Please refresh and try again.")
    text = refused(push(), 3, "hub_conflict")
    assert "same command again" in text and hub.repos[REPO].files().keys() == {".gitattributes"}


def test_a_folder_that_is_all_here_needs_the_whole_check(client: Client, copy: Path, push: Any) -> None:
    answer = client("push", folder=str(copy), repo=REPO, token=TOKEN)
    assert "patch-model verify" in refused(answer, 2, "not_verified")
