"""Files that are the base's are not sent: the Hub copies them, or the base's repository, and only the rest goes up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.hub_client import Client
from support.hub_server import HubServer, Repo
from support.publishing import OTHER, REPO, TOKEN, refused, shows_the_folder, steers

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
NO_COPIES: dict[str, Any] = {"status": 400, "message": "not in the same storage region"}
SMALL = 200_000


@pytest.fixture
def push(client: Client, copy: Path) -> Any:
    return lambda **kwargs: client("push", folder=str(copy), **{"repo": REPO, "token": TOKEN, **kwargs})


def test_a_model_of_31_mb_is_published_with_less_than_200_kb(
    client: Client, hub: HubServer, copy: Path, pair: tuple[Path, Path], push: Any
) -> None:
    answer = push()["result"]
    assert (copy / FIRST).stat().st_size > 30e6 and hub.uploaded() < SMALL
    assert answer["method"] == "copy" and answer["bytes_uploaded"] == hub.uploaded("^PUT |/commit/") > 0
    assert len(hub.repos[REPO].commits) == 2 and answer["commit"] == hub.repos[REPO].refs["main"]
    assert any("from org/base, on the Hub: 1 file (3" in line for line in answer["progress"])
    assert shows_the_folder(hub, copy) and steers(client, REPO, pair)
    assert b"license: mit" in hub.repos[REPO].files()["README.md"]

    again = push()["result"]
    assert (again["method"], again["bytes_uploaded"], again["commit"]) == ("unchanged", 0, answer["commit"])


def test_what_the_manifest_says_of_a_file_is_not_relied_on(hub: HubServer, copy: Path, push: Any) -> None:
    """The first shard was changed after the build: steering.json knows nothing of it, and the Hub has no such file."""
    content = bytearray((copy / FIRST).read_bytes())
    content[-1] ^= 1
    (copy / FIRST).write_bytes(content)
    answer = push()["result"]
    assert answer["method"] == "upload" and hub.uploaded() > 30e6
    assert shows_the_folder(hub, copy)


def test_wrong_records_of_the_base_change_nothing(hub: HubServer, copy: Path, base: Repo, push: Any) -> None:
    manifest = json.loads((copy / "steering.json").read_text())
    for record in manifest["base"]["files"]:
        record |= {"sha256": "0" * 64, "size": 1}
    (copy / "steering.json").write_text(json.dumps(manifest))
    assert push()["result"]["method"] == "copy" and shows_the_folder(hub, copy)


def test_another_revision_of_the_base_is_not_copied(hub: HubServer, copy: Path, base: Repo, push: Any) -> None:
    """What counts is the commit that the folder was made from, whatever the base has become since."""
    old = base.refs["main"]
    tree = {**base.commits[old], "model.safetensors": base.commits[old]["pytorch_model.bin"]}
    base.commit("main", tree, "new weights")
    assert push()["result"]["method"] == "copy" and shows_the_folder(hub, copy)
    del base.commits[old]
    answer = push(repo="me/second")["result"]
    assert answer["method"] == "upload" and any(f"it has no {old}" in line for line in answer["progress"])


def test_an_existing_repository_a_branch_and_a_pull_request(
    client: Client, hub: HubServer, copy: Path, pair: tuple[Path, Path], push: Any
) -> None:
    repo = hub.add_repo(REPO, {"model.safetensors": b"old"})
    main = repo.refs["main"]
    branch = push(revision="strong")["result"]
    request = push(pull_request=True)["result"]
    assert branch["method"] == request["method"] == "copy" and hub.uploaded() < SMALL
    assert repo.refs == {"main": main, "strong": branch["commit"], "refs/pr/1": request["commit"]}
    assert shows_the_folder(hub, copy, revision="strong") and shows_the_folder(hub, copy, revision="refs/pr/1")
    assert steers(client, REPO, pair, revision="strong")
    final = push()["result"]
    assert final["method"] == "copy" and "model.safetensors" not in repo.files()


def test_a_pull_request_without_write_access_is_uploaded(hub: HubServer, copy: Path, push: Any) -> None:
    hub.add_repo(REPO, {"config.json": b"{}"})
    answer = push(token=OTHER, pull_request=True)["result"]
    assert answer["method"] == "upload" and any("does not copy" in line for line in answer["progress"])
    assert shows_the_folder(hub, copy, revision="refs/pr/1")


def test_a_branch_of_the_base_itself(hub: HubServer, copy: Path, base: Repo, push: Any) -> None:
    base.id = "me/base"
    hub.repos = {"me/base": base}
    text = (copy / "steering.json").read_text().replace("org/base", "me/base")
    (copy / "steering.json").write_text(text)
    answer = push(repo="me/base", revision="steered")["result"]
    assert answer["method"] == "copy" and hub.uploaded() < SMALL
    assert not any("lfs-files/duplicate" in line for line in hub.requests)
    assert shows_the_folder(hub, copy, repo="me/base", revision="steered", kept={"onnx/model.onnx"})


REFUSALS: dict[str, dict[str, Any]] = {
    "another region": NO_COPIES,
    "no right": {"status": 403, "message": "no"},
    "no such service": {"status": 404, "message": "no such endpoint"},
    "a broken service": {"status": 500, "message": "oops"},
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_is_not_copied_is_uploaded(
    client: Client, hub: HubServer, copy: Path, pair: tuple[Path, Path], push: Any, case: str
) -> None:
    hub.add_repo(REPO)
    hub.fail("POST .*/lfs-files/duplicate", **REFUSALS[case])
    answer = push()["result"]
    assert answer["method"] == "upload" and len(hub.repos[REPO].commits) == 2
    assert answer["bytes_uploaded"] == hub.uploaded("^PUT |/commit/") > 30e6
    assert hub.requests.count("POST /api/models/org/base/lfs-files/duplicate") == (3 if case.startswith("a b") else 1)
    (said,) = (line for line in answer["progress"] if "does not copy" in line)
    assert REFUSALS[case]["message"] in said and shows_the_folder(hub, copy) and steers(client, REPO, pair)


def test_a_passing_fault_of_the_copy_is_ridden_out(hub: HubServer, copy: Path, push: Any) -> None:
    hub.fail("POST .*/lfs-files/duplicate", status=503, times=2)
    assert push()["result"]["method"] == "copy" and shows_the_folder(hub, copy)


FAULTS: dict[str, tuple[str, dict[str, Any], str]] = {
    "limit": ("POST .*/lfs-files/duplicate", {"status": 429, "headers": {"Retry-After": "37"}}, "hub_rate_limit"),
    "cut": ("POST .*/lfs-files/duplicate", {"drop": True}, "hub_unreachable"),
    "conflict": ("POST .*/commit/", {"status": 409}, "hub_conflict"),
    "moved head": ("POST .*/commit/", {"status": 412}, "hub_conflict"),
    "500": ("POST .*/commit/", {"status": 500}, "hub_server"),
    "base down": ("GET /api/models/org/base", {"status": 503}, "hub_server"),
    "base limit": ("POST /api/models/org/base/paths-info", {"status": 429}, "hub_rate_limit"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_failure_is_no_reason_to_upload_everything(hub: HubServer, push: Any, case: str) -> None:
    pattern, fault, code = FAULTS[case]
    hub.fail(pattern, **fault)
    assert "again" in refused(push(), 3, code)
    assert REPO not in hub.repos or list(hub.repos[REPO].files()) == [".gitattributes"]
    assert hub.uploaded() < SMALL


def test_copied_objects_that_are_not_there_when_it_comes_to_it(hub: HubServer, copy: Path, push: Any) -> None:
    hub.fail("POST .*/commit/", status=400, message="LFS pointer pointed to a file that does not exist", times=1)
    hub.add_repo(REPO)
    assert push()["result"]["method"] == "upload" and shows_the_folder(hub, copy)
