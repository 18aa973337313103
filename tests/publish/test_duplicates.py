"""A duplicate of the base with the steering on top: nobody ever sees an unsteered model under the steered name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.hub_client import Client
from support.hub_server import HubServer, Repo
from support.publishing import REPO, TOKEN, refused, shows_the_folder, steers

SMALL = 200_000


@pytest.fixture
def seen(hub: HubServer, base: Repo) -> Iterator[list[set[str]]]:
    """What a visitor saw of the repository after any request: the names of its files in all branches and tags."""
    base.xet = False
    base.refs["float16"] = base.tags["v1"] = base.refs["main"]
    states: list[set[str]] = []

    def look() -> None:
        repo = hub.repos.get(REPO)
        if repo is not None and not repo.private:
            states.append(
                {name for ref in (*repo.refs, *repo.tags) for name in repo.files({**repo.tags}.get(ref, ref))}
            )

    hub.after_request = look
    yield states
    for names in states:
        steered = {"steering.json", "model-00002-of-00002.safetensors"} <= names
        assert names == {".gitattributes"} or (steered and not {"onnx/model.onnx", "model.safetensors"} & names), names


@pytest.fixture
def push(client: Client, copy: Path) -> Any:
    return lambda **kwargs: client("push", folder=str(copy), **{"repo": REPO, "token": TOKEN, **kwargs})


def test_a_base_whose_files_cannot_be_copied_is_duplicated(
    client: Client, hub: HubServer, copy: Path, pair: tuple[Path, Path], push: Any, seen: list[set[str]]
) -> None:
    answer = push()["result"]
    assert answer["method"] == "duplicate" and hub.uploaded() < SMALL
    assert answer["bytes_uploaded"] == hub.uploaded("^PUT |/commit/")
    repo = hub.repos[REPO]
    assert repo.refs == {"main": answer["commit"]} and repo.tags == {} and not repo.private
    assert shows_the_folder(hub, copy) and steers(client, REPO, pair)
    assert seen and any("private until" in line for line in answer["progress"])
    assert any("goes on copying" in line for line in answer["progress"])


def test_a_refused_copy_is_followed_by_a_duplicate(
    hub: HubServer, base: Repo, copy: Path, push: Any, seen: Any
) -> None:
    base.xet = True
    hub.fail("POST .*/lfs-files/duplicate", status=400, message="another region")
    answer = push(private=True)["result"]
    assert answer["method"] == "duplicate" and hub.repos[REPO].private and hub.uploaded() < SMALL
    assert shows_the_folder(hub, copy) and seen == []


def test_a_refused_duplicate_is_followed_by_an_upload(
    client: Client, hub: HubServer, copy: Path, pair: tuple[Path, Path], push: Any, seen: Any
) -> None:
    hub.fail("POST .*/base/duplicate", status=403, message="not for models")
    answer = push()["result"]
    assert answer["method"] == "upload" and not hub.repos[REPO].private
    assert any("does not duplicate org/base: not for models" in line for line in answer["progress"])
    assert shows_the_folder(hub, copy) and steers(client, REPO, pair)


@pytest.mark.parametrize("changes", [{"revision": "strong"}, {"pull_request": True}])
def test_only_a_new_main_branch_is_made_of_a_duplicate(
    hub: HubServer, copy: Path, push: Any, seen: Any, changes: dict[str, Any]
) -> None:
    assert push(**changes)["result"]["method"] == "upload"
    assert not any(line.endswith("/duplicate") or line.startswith("DELETE") for line in hub.requests)


def test_an_existing_repository_is_never_deleted(hub: HubServer, copy: Path, push: Any, seen: Any) -> None:
    hub.add_repo(REPO)
    assert push()["result"]["method"] == "upload" and shows_the_folder(hub, copy)
    assert not any(line.endswith("/duplicate") or line.startswith("DELETE") for line in hub.requests)


def test_a_repository_that_someone_wrote_to_meanwhile_is_not_deleted(
    hub: HubServer, base: Repo, copy: Path, push: Any
) -> None:
    base.xet = True
    hub.fail("POST .*/lfs-files/duplicate", status=400)

    def interfere() -> None:
        if "preupload" in hub.requests[-1] and len(hub.repos[REPO].commits) == 1:
            hub.repos[REPO].commit("main", dict(hub.repos[REPO].commits[hub.repos[REPO].refs["main"]]), "a colleague's")

    hub.after_request = interfere
    push()
    assert "a colleague's" in hub.repos[REPO].titles.values()
    assert not any(line.startswith("DELETE") for line in hub.requests)


FAULTS: dict[str, tuple[str, dict[str, Any], str]] = {
    "conflict": ("POST .*/steered/commit/", {"status": 409}, "hub_conflict"),
    "500": ("POST .*/steered/commit/", {"status": 500}, "hub_server"),
    "cut": ("PUT /lfs/", {"drop": True}, "hub_unreachable"),
    "refs": ("GET .*/refs", {"status": 503}, "hub_server"),
    "tags": ("DELETE .*/tag/", {"status": 500}, "hub_server"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_failure_leaves_no_duplicate(hub: HubServer, push: Any, seen: Any, case: str) -> None:
    pattern, fault, code = FAULTS[case]
    hub.fail(pattern, **fault)
    assert "again" in refused(push(), 3, code)
    assert REPO not in hub.repos


def test_a_duplicate_that_cannot_be_deleted_stays_private_and_is_named(hub: HubServer, push: Any, seen: Any) -> None:
    hub.fail("POST .*/steered/commit/", status=500, message="storage is down")
    hub.fail("DELETE /api/repos/delete", status=500, after=1)
    text = refused(push(), 3, "hub_left_over")
    assert f"{hub.url}/{REPO}/settings" in text and hub.repos[REPO].private


def test_a_duplicate_whose_answer_is_lost_is_finished_by_the_next_run(
    hub: HubServer, copy: Path, push: Any, seen: Any
) -> None:
    hub.fail("POST .*/base/duplicate", drop=True, times=1, done=True)
    text = refused(push(), 3, "hub_unreachable")
    assert "may be left" in text and f"{REPO}/settings" in text and hub.repos[REPO].private
    answer = push()["result"]
    assert answer["method"] in ("copy", "upload") and hub.uploaded() < SMALL and hub.repos[REPO].private
    assert any("stays so" in line for line in answer["progress"])
    assert shows_the_folder(hub, copy, kept={"onnx/model.onnx"})


def test_a_duplicate_that_cannot_be_made_public_is_complete(hub: HubServer, copy: Path, push: Any, seen: Any) -> None:
    hub.fail("PUT .*/settings", status=403, message="not by this token")
    text = refused(push(), 3, "hub_auth")
    assert "it is complete, but private" in text and f"{REPO}/settings" in text
    assert hub.repos[REPO].private and shows_the_folder(hub, copy)


def test_a_public_duplicate_goes_at_once(hub: HubServer, push: Any, base: Repo) -> None:
    base.xet = False
    commits = []

    def ignore_visibility() -> None:
        if REPO in hub.repos and hub.requests[-1].endswith("/duplicate"):
            hub.repos[REPO].private = False
        commits.append(hub.requests[-1])

    hub.after_request = ignore_visibility
    refused(push(), 3, "hub_public_duplicate")
    assert REPO not in hub.repos and not any("/commit/" in line for line in commits)
