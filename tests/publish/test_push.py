"""Publishing over real HTTP: what arrives, what must not, and that a failure leaves nothing behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.hub_client import Client
from support.hub_server import HubServer
from support.publishing import FILES, OTHER, READ_ONLY, REPO, TOKEN, refused


def heads(hub: HubServer) -> dict[str, dict[str, str]]:
    return {name: dict(repo.refs) for name, repo in hub.repos.items()}


def unchanged_but_for_an_empty_repository(hub: HubServer, before: dict[str, dict[str, str]]) -> bool:
    """No new commit, no new branch; a repository that was made on the way has only the Hub's own first commit."""
    new = {name: repo for name, repo in hub.repos.items() if name not in before}
    empty = all(list(repo.files()) == [".gitattributes"] and len(repo.commits) == 1 for repo in new.values())
    return empty and before == {name: refs for name, refs in heads(hub).items() if name in before}


def test_the_published_model_is_the_folder(client: Client, hub: HubServer, folder: Path) -> None:
    answer = client("push", folder=str(folder), repo=REPO, token=TOKEN)["result"]
    repo = hub.repos[REPO]
    assert answer["url"] == f"{hub.url}/{REPO}" and answer["method"] == "upload"
    assert answer["commit"] == repo.refs["main"] and len(repo.commits) == 2
    files = repo.files()
    assert set(files) == FILES | {".gitattributes"}
    assert answer["bytes_uploaded"] == hub.uploaded("^PUT |/commit/") >= sum(len(files[name]) for name in FILES)
    assert all(files[name] == (folder / name).read_bytes() for name in FILES - {"steering.json"})
    assert repo.titles[answer["commit"]] == "Steered copy of gpt2-xl: love at layer 1"

    here, there = client("logits", model=str(folder)), client("logits", model=REPO)
    assert len(here["result"]) == 12 and there == here


def test_only_what_belongs_to_a_patched_folder_is_sent(client: Client, hub: HubServer, folder: Path) -> None:
    for name in (".env", ".git/config", "model.safetensors.partial", "pytorch_model.bin", "consolidated.safetensors"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool.jinja").write_text("{{ messages }}")
    (folder / "LICENSE").write_text("terms")
    client("push", folder=str(folder), repo=REPO, token=TOKEN)
    assert set(hub.repos[REPO].files()) == FILES | {".gitattributes", "LICENSE", "additional_chat_templates/tool.jinja"}


def test_publishing_again_sends_only_what_changed(client: Client, hub: HubServer, folder: Path) -> None:
    first = client("push", folder=str(folder), repo=REPO, token=TOKEN)["result"]
    again = client("push", folder=str(folder), repo=REPO, token=TOKEN)["result"]
    assert again["commit"] == first["commit"] and (again["method"], again["bytes_uploaded"]) == ("unchanged", 0)
    assert "nothing was committed" in again["progress"][-1]
    (folder / "README.md").write_text("# Other\n")
    third = client("push", folder=str(folder), repo=REPO, token=TOKEN, commit_message="New card")["result"]
    assert third["method"] == "upload" and len("# Other\n") < third["bytes_uploaded"] < 500
    assert hub.repos[REPO].titles[third["commit"]] == "New card"


def test_no_path_and_no_token_reaches_the_server(
    client: Client, hub: HubServer, make_folder: Callable[..., Path]
) -> None:
    secret, path = "hf_" + "Secret1" * 5, "/home/alice/My Models/gpt2-xl"
    text = f"model: {path}\nvectors:\n  - pairs: /srv/alice/pairs.jsonl  # {secret}\n"
    folder = make_folder(
        base={"model": "gpt2-xl", "hub": False, "path": path},
        recipe={"text": text, "resolved": {"model": path, "vectors": [{"file": r"C:\Users\alice\v.pt"}]}},
        notes=["read ~/alice-private/x.txt", "see file:///home/alice/y.txt", secret],
    )
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "_name_or_path": path}))
    (folder / "README.md").write_text("# Steered\n\nMade from /home/alice/models/gpt2-xl.\n")
    before = {name: (folder / name).read_bytes() for name in FILES}
    message = f"from /home/alice/models with {secret}"
    client("push", folder=str(folder), repo=REPO, token=TOKEN, commit_message=message)

    received = b"\n".join(hub.received) + "\n".join(hub.requests).encode()
    assert b"pairs.jsonl" in received and b"v.pt" in received, "the check would see them"
    for planted in (b"alice", b"hf_Secret", str(folder).encode()):
        assert planted not in received
    published = json.loads(hub.repos[REPO].files()["steering.json"])
    assert "path" not in published["base"] and published["recipe"]["resolved"]["model"] == "gpt2-xl"
    assert {name: (folder / name).read_bytes() for name in FILES} == before, "the folder itself stays"


def test_a_token_in_a_text_file_stops_everything(client: Client, hub: HubServer, folder: Path) -> None:
    for name in ("README.md", "chat_template.jinja", "config.json", "LICENSE"):
        path = folder / name
        old = path.read_bytes() if path.exists() else b""
        path.write_bytes(old + b"\nhf_" + b"a1B2c" * 7)
        text = refused(client("push", folder=str(folder), repo=REPO, token=TOKEN), 2, "token_in_file")
        assert name in text and "a1B2c" not in text
        path.write_bytes(old)
    assert hub.requests == []


def test_private(client: Client, hub: HubServer, folder: Path, tmp_path: Path) -> None:
    client("push", folder=str(folder), repo=REPO, token=TOKEN, private=True)
    assert hub.repos[REPO].private
    assert client("download", repo=REPO, filename="config.json", token=TOKEN, cache_dir=str(tmp_path / "a"))["result"]
    stranger = client("download", repo=REPO, filename="config.json", token=OTHER, cache_dir=str(tmp_path / "b"))
    refused(stranger, 2, "hub_not_found")

    hub.add_repo("me/public")
    before = heads(hub)
    answer = client("push", folder=str(folder), repo="me/public", token=TOKEN, private=True)
    assert "is public" in refused(answer, 2, "input") and heads(hub) == before


def test_a_name_alone_is_the_token_owners(client: Client, hub: HubServer, folder: Path) -> None:
    answer = client("push", folder=str(folder), repo="steered", token=TOKEN)
    assert answer["result"]["url"] == f"{hub.url}/me/steered" and set(hub.repos) == {"me/steered"}
    client("push", folder=str(folder), repo="lab/steered", token=TOKEN)
    assert "lab/steered" in hub.repos


def test_a_new_branch(client: Client, hub: HubServer, folder: Path) -> None:
    repo = hub.add_repo(REPO, {"config.json": b"{}"})
    main = repo.refs["main"]
    answer = client("push", folder=str(folder), repo=REPO, token=TOKEN, revision="strong/5")["result"]
    assert answer["url"] == f"{hub.url}/{REPO}/tree/strong%2F5"
    assert repo.refs == {"main": main, "strong/5": answer["commit"]}
    assert repo.files("strong/5")["config.json"] == (folder / "config.json").read_bytes()
    assert client("logits", model=REPO, revision="strong/5") == client("logits", model=str(folder))


def test_a_branch_that_was_made_goes_when_the_upload_fails(client: Client, hub: HubServer, folder: Path) -> None:
    repo = hub.add_repo(REPO, {"model.safetensors": b"unsteered"})
    before = heads(hub)
    hub.fail("POST .*/commit/", status=500)
    refused(client("push", folder=str(folder), repo=REPO, token=TOKEN, revision="strong"), 3, "hub_server")
    assert any(line.startswith("POST") and line.endswith("/branch/strong") for line in hub.requests)
    assert heads(hub) == before and len(repo.commits) == 1


def test_a_pull_request_needs_no_write_access(client: Client, hub: HubServer, folder: Path) -> None:
    repo = hub.add_repo(REPO, {"config.json": b"{}"})
    main = repo.refs["main"]
    answer = client("push", folder=str(folder), repo=REPO, token=OTHER, pull_request=True)["result"]
    assert answer["url"] == f"{hub.url}/{REPO}/discussions/1"
    assert repo.refs == {"main": main, "refs/pr/1": answer["commit"]}
    assert set(repo.files("refs/pr/1")) == FILES | {".gitattributes"}
    follow_up = client("push", folder=str(folder), repo=REPO, token=TOKEN, revision="refs/pr/1")["result"]
    assert follow_up["bytes_uploaded"] == 0 and follow_up["commit"] == answer["commit"]


def test_files_that_loaders_would_prefer_go_in_the_same_commit(client: Client, hub: HubServer, folder: Path) -> None:
    old = {
        "model-00001-of-00002.safetensors": b"old",
        "model.safetensors.index.json": b"{}",
        "pytorch_model.bin": b"old",
    }
    others = {"adapter_config.json": b"{}", "plot.png": b"png", "docs/config.json": b"{}", "model-q4.gguf": b"gguf"}
    repo = hub.add_repo(REPO, {**old, **others})
    answer = client("push", folder=str(folder), repo=REPO, token=TOKEN)["result"]
    kept = {".gitattributes", "plot.png", "docs/config.json", "model-q4.gguf"}
    assert set(repo.files()) == FILES | kept and len(repo.commits) == 2
    assert any("pytorch_model.bin" in line for line in answer["progress"])


NO_ACCESS = {"wrong token": ("hf_" + "Wrong00" * 5, "does not accept"), "read-only": (READ_ONLY, "write access")}


@pytest.mark.parametrize("case", NO_ACCESS)
@pytest.mark.parametrize("exists", [False, True])
def test_no_access(client: Client, hub: HubServer, folder: Path, case: str, exists: bool) -> None:
    token, words = NO_ACCESS[case]
    if exists:
        hub.add_repo(REPO, {"config.json": b"{}"})
    before = heads(hub)
    text = refused(client("push", folder=str(folder), repo=REPO, token=token), 3, "hub_auth")
    assert words in text and "hf auth login" in text and token not in text
    assert heads(hub) == before
    assert not any("preupload" in line or "lfs" in line for line in hub.requests), "found out before uploading"


def test_no_token(client: Client, hub: HubServer, folder: Path) -> None:
    text = refused(client("push", folder=str(folder), repo=REPO), 3, "hub_auth")
    assert "no Hub token was found" in text and "hf auth login" in text and hub.requests == []


def test_someone_elses_repository(client: Client, hub: HubServer, folder: Path) -> None:
    hub.add_repo("other/model")
    hub.add_repo("other/secret", private=True)
    hub.add_repo("other/gated", gated=True)
    before = heads(hub)
    refused(client("push", folder=str(folder), repo="other/model", token=TOKEN), 3, "hub_auth")
    refused(client("push", folder=str(folder), repo="other/secret", token=TOKEN), 3, "hub_auth")
    text = refused(
        client("push", folder=str(folder), repo="other/gated", token=TOKEN, pull_request=True), 3, "hub_gated"
    )
    assert f"{hub.url}/other/gated" in text and heads(hub) == before


FAULTS: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "conflict": ("POST .*/commit/", {"status": 409, "message": "in progress"}, "hub_conflict", "in progress"),
    "moved head": ("POST .*/commit/", {"status": 412, "message": "has happened since"}, "hub_conflict", "again"),
    "limit": (
        "GET /api/whoami",
        {"status": 429, "headers": {"Retry-After": "37"}},
        "hub_rate_limit",
        "wait 37 seconds",
    ),
    "limit later": ("POST .*/preupload/", {"status": 429, "headers": {"Retry-After": "1"}}, "hub_rate_limit", "wait"),
    "500": ("POST .*/commit/", {"status": 500}, "hub_server", "500"),
    "503 storing": ("PUT /lfs/", {"status": 503, "message": "storage is down"}, "hub_server", "storage is down"),
    "502 card": ("POST /api/validate-yaml", {"status": 502}, "hub_server", "502"),
    "403 at last": ("POST .*/commit/", {"status": 403, "message": "storage quota reached"}, "hub_auth", "quota"),
    "cut mid-file": ("PUT /lfs/", {"drop": True}, "hub_unreachable", "broke"),
    "cut mid-commit": ("POST .*/commit/", {"drop": True}, "hub_unreachable", "broke"),
    "card refused": ("POST .*/commit/", {"status": 400, "message": "bad metadata"}, "hub_rejected", "bad metadata"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_failure_publishes_nothing(client: Client, hub: HubServer, folder: Path, case: str) -> None:
    pattern, fault, code, words = FAULTS[case]
    hub.add_repo("me/other", {"config.json": b"{}"})
    before = heads(hub)
    hub.fail(pattern, **fault)
    text = refused(client("push", folder=str(folder), repo=REPO, token=TOKEN), 3, code)
    assert words in text
    if code not in ("hub_auth", "hub_rejected"):
        assert "again" in text
    assert unchanged_but_for_an_empty_repository(hub, before)


def test_a_passing_fault_is_ridden_out(client: Client, hub: HubServer, folder: Path) -> None:
    hub.fail("PUT /lfs/", status=503, times=1)
    hub.fail("PUT /lfs/", drop=True, times=1)
    assert client("push", folder=str(folder), repo=REPO, token=TOKEN)["result"]["commit"]


def test_a_commit_of_someone_else_in_between(client: Client, hub: HubServer, folder: Path) -> None:
    repo = hub.add_repo(REPO)
    hub.fail("POST .*/commit/", status=412, message="A commit has happened since.", times=1)
    refused(client("push", folder=str(folder), repo=REPO, token=TOKEN), 3, "hub_conflict")
    assert '"parentCommit": "' + repo.refs["main"] in hub.received[-1].decode()


def test_a_revision_that_cannot_be_made(client: Client, hub: HubServer, folder: Path) -> None:
    hub.add_repo(REPO)
    before = heads(hub)
    refused(client("push", folder=str(folder), repo=REPO, token=TOKEN, revision="refs/pr/9"), 2, "hub_revision")
    refused(client("push", folder=str(folder), repo=REPO, token=TOKEN, revision="a" * 40), 2, "input")
    refused(client("push", folder=str(folder), repo=REPO, token=TOKEN, revision="x", pull_request=True), 2, "input")
    assert heads(hub) == before
