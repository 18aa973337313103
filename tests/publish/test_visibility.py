"""A private or gated base does not become public by its copy unless someone says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.hub_client import Client
from support.hub_server import HubServer, Repo
from support.publishing import READ_ONLY, REPO, TOKEN, refused, shows_the_folder, steers


@pytest.fixture
def push(client: Client, copy: Path) -> Any:
    return lambda **kwargs: client("push", folder=str(copy), **{"repo": REPO, "token": TOKEN, **kwargs})


@pytest.fixture
def mine(base: Repo, hub: HubServer) -> Repo:
    """The base, private, but of an organization of the token's owner."""
    hub.repos = {"lab/base": base}
    base.id, base.private = "lab/base", True
    return base


@pytest.fixture
def copy(copy: Path, request: pytest.FixtureRequest) -> Path:
    if "mine" in request.fixturenames:
        text = (copy / "steering.json").read_text()
        (copy / "steering.json").write_text(text.replace("org/base", "lab/base"))
    return copy


@pytest.mark.parametrize("copying", [True, False])
def test_a_private_base_is_not_made_public(hub: HubServer, mine: Repo, push: Any, copying: bool) -> None:
    """However the weights would get there: what is uploaded is as public as what is copied."""
    mine.xet = copying
    text = refused(push(), 2, "hub_private_base")
    assert "lab/base is private" in text and "--private" in text and "--public" in text
    hub.add_repo("me/public")
    refused(push(repo="me/public"), 2, "hub_private_base")
    refused(push(repo="me/public", pull_request=True), 2, "hub_private_base")
    assert set(hub.repos) == {"lab/base", "me/public"} and len(hub.repos["me/public"].commits) == 1
    assert not any("preupload" in line or "create" in line for line in hub.requests)


@pytest.mark.parametrize("copying", [True, False])
def test_a_private_base_for_a_private_copy(
    client: Client, hub: HubServer, mine: Repo, copy: Path, pair: tuple[Path, Path], push: Any, copying: bool
) -> None:
    mine.xet = copying
    answer = push(private=True)["result"]
    assert answer["method"] == ("copy" if copying else "duplicate") and hub.repos[REPO].private
    assert shows_the_folder(hub, copy) and steers(client, REPO, pair, token=TOKEN)
    assert not any(line.startswith("note:") for line in answer["progress"])
    hub.add_repo("me/second", private=True)
    second = push(repo="me/second")["result"]
    assert hub.repos["me/second"].private and "me/second is private, and stays so" in second["progress"]


def test_a_private_base_made_public_on_purpose(hub: HubServer, mine: Repo, copy: Path, push: Any) -> None:
    answer = push(public=True)["result"]
    assert not hub.repos[REPO].private and shows_the_folder(hub, copy)
    (note,) = (line for line in answer["progress"] if line.startswith("note:"))
    assert "lab/base" in note and REPO in note and "everyone" in note
    refused(push(public=True, private=True), 2, "input")


def test_a_base_that_cannot_be_seen_may_be_private(hub: HubServer, base: Repo, copy: Path, push: Any) -> None:
    base.private = True
    assert "cannot be seen with this token" in refused(push(), 2, "hub_private_base")
    assert set(hub.repos) == {"org/base"}
    del hub.repos["org/base"]
    refused(push(), 2, "hub_private_base")
    assert push(public=True)["result"]["method"] == "upload" and shows_the_folder(hub, copy)
    assert push(repo="me/second", private=True)["result"]["method"] == "upload"


def test_a_gated_base_with_access(hub: HubServer, base: Repo, copy: Path, push: Any) -> None:
    base.gated, base.granted = True, {"me"}
    answer = push()["result"]
    assert answer["method"] == "copy" and shows_the_folder(hub, copy)
    (note,) = (line for line in answer["progress"] if line.startswith("note:"))
    assert "org/base must be asked for" in note and "licence" in note and "--private" in note
    private = push(repo="me/second", private=True)["result"]
    assert not any(line.startswith("note:") for line in private["progress"])


def test_a_gated_base_without_access(hub: HubServer, base: Repo, copy: Path, push: Any) -> None:
    base.gated = True
    answer = push()["result"]
    assert answer["method"] == "upload" and shows_the_folder(hub, copy)
    assert any("cannot be copied: access to it must be asked for" in line for line in answer["progress"])
    assert any(line.startswith("note:") for line in answer["progress"])


def test_a_gated_base_that_only_refuses_the_copy(hub: HubServer, base: Repo, copy: Path, push: Any) -> None:
    base.gated, base.granted = True, {"me"}
    hub.fail("POST .*/duplicate", status=403, message="Access to model org/base is restricted.")
    answer = push()["result"]
    assert answer["method"] == "upload" and shows_the_folder(hub, copy)
    assert any("does not copy" in line and "restricted" in line for line in answer["progress"])


def test_a_read_only_token_is_found_out_before_anything_is_copied(hub: HubServer, base: Repo, push: Any) -> None:
    hub.add_repo(REPO)
    refused(push(token=READ_ONLY), 3, "hub_auth")
    assert not any(line.endswith("/duplicate") or "preupload" in line for line in hub.requests)
