"""A connection that breaks in the middle of a file: nothing is to be seen, and only the rest is sent again."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from support.hub_client import Client
from support.hub_server import HubServer
from support.publishing import REPO, TOKEN, refused, shows_the_folder, steers

from patcher.checkpoint.copying import sha256_of

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture
def push(client: Client, hub: HubServer, copy: Path) -> Any:
    """Of a local base, so that everything is uploaded."""
    text = (copy / "steering.json").read_text()
    (copy / "steering.json").write_text(text.replace('"hub": true', '"hub": false'))
    return lambda **kwargs: client("push", folder=str(copy), **{"repo": REPO, "token": TOKEN, **kwargs})


@pytest.mark.parametrize("broken", [FIRST, SECOND])
@pytest.mark.parametrize("pull_request", [False, True])
def test_only_the_rest_is_sent_again(
    client: Client, hub: HubServer, copy: Path, pair: tuple[Path, Path], push: Any, broken: str, pull_request: bool
) -> None:
    if pull_request:
        hub.add_repo(REPO)
    oids = {name: sha256_of(copy / name) for name in (FIRST, SECOND, "steering.safetensors")}
    hub.fail(f"PUT /lfs/{oids[broken]}", drop=True)
    text = refused(push(pull_request=pull_request), 3, "hub_unreachable")
    assert "not sent a second time" in text
    assert list(hub.repos[REPO].files()) == [".gitattributes"] and len(hub.repos[REPO].commits) == 1
    assert hub.repos[REPO].objects & set(oids.values()) == set(oids.values()) - {oids[broken]}

    hub.faults.clear()
    hub.requests.clear()
    hub.sizes.clear()
    answer = push(pull_request=pull_request)["result"]
    assert re.findall(r"PUT /lfs/(\w+)", "\n".join(hub.requests)) == [oids[broken]]
    size = (copy / broken).stat().st_size
    assert size < answer["bytes_uploaded"] == hub.uploaded("^PUT |/commit/") < size + 100_000
    revision = "refs/pr/1" if pull_request else "main"
    assert shows_the_folder(hub, copy, revision=revision) and steers(client, REPO, pair, revision=revision)


def test_a_passing_break_costs_the_part_that_was_sent(hub: HubServer, copy: Path, push: Any) -> None:
    hub.fail(f"PUT /lfs/{sha256_of(copy / FIRST)}", drop=True, times=1)
    answer = push()["result"]
    assert shows_the_folder(hub, copy)
    assert answer["bytes_uploaded"] > 2 * (copy / FIRST).stat().st_size, "what was sent twice counts twice"


def test_a_lost_answer_to_the_commit(hub: HubServer, copy: Path, push: Any) -> None:
    """The commit was made, but the client does not know: the next run finds that there is nothing left to do."""
    hub.fail("POST .*/commit/", drop=True, done=True, times=1)
    refused(push(), 3, "hub_unreachable")
    assert shows_the_folder(hub, copy)
    answer = push()["result"]
    assert (answer["method"], answer["bytes_uploaded"]) == ("unchanged", 0) and len(hub.repos[REPO].commits) == 2
