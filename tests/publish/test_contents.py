"""What of a folder is published, and which folders are not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.hub_client import Client
from support.hub_server import HubServer
from support.publishing import REPO, TOKEN, manifest

from patcher.checkpoint.folder import SIDE_FILES
from patcher.errors import InputError
from patcher.publish.contents import _belongs
from patcher.publish.hub import push_folder


def test_whatever_a_copy_takes_along_may_be_published() -> None:
    for pattern in SIDE_FILES:
        assert _belongs(pattern.replace("*", "")) or _belongs(pattern.replace("*", "x")), pattern


@pytest.mark.parametrize("repo", ["me/a/b", "https://huggingface.co/me/x", "me/x y", "-x", "me/a..b", "", "a" * 97])
def test_names_that_cannot_be(folder: Path, repo: str) -> None:
    with pytest.raises(InputError) as caught:
        push_folder(folder, repo, token=TOKEN)
    assert caught.value.code == "hub_repo_id" and caught.value.problems[0].remedy


CHECK = manifest()["verification"][0]
UNVERIFIED: dict[str, list[dict[str, Any]]] = {
    "no check": [],
    "failed": [{**CHECK, "status": "failed", "passed": False}],
    "says two things": [{**CHECK, "passed": False}],
    "only names": [{**CHECK, "status": "structural"}],
    "only some blocks": [{**CHECK, "status": "truncated"}],
    "another stack failed": [CHECK, {**CHECK, "stack": "vllm", "status": "failed", "passed": False}],
    "another stack only": [{**CHECK, "stack": "vllm"}],
}


@pytest.mark.parametrize("case", UNVERIFIED)
def test_an_unverified_folder_is_refused(make_folder: Callable[..., Path], case: str) -> None:
    with pytest.raises(InputError) as caught:
        push_folder(make_folder(verification=UNVERIFIED[case]), REPO, token=TOKEN)
    assert caught.value.code == "not_verified" and "patch-model verify" in str(caught.value)


def test_an_unchecked_other_stack_is_no_obstacle(
    client: Client, hub: HubServer, make_folder: Callable[..., Path]
) -> None:
    folder = make_folder(verification=[CHECK, {"stack": "vllm", "status": "not_checked", "passed": False}])
    assert client("push", folder=str(folder), repo=REPO, token=TOKEN)["result"]


def test_what_is_no_patched_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    def message(path: Path) -> str:
        with pytest.raises(InputError) as caught:
            push_folder(path, REPO, token=TOKEN)
        return str(caught.value)

    assert "is not a folder" in message(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    assert "has no steering.json" in message(tmp_path / "empty")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    assert "model-00001-of-00002.safetensors" in message(folder)
    index.unlink()
    (folder / "model.safetensors").unlink()
    assert "the weights" in message(folder)
    for text, words in {
        "{": "not JSON",
        "[]": "not written by",
        '{"format": 99, "edits": []}': "newer",
        '{"format": 0, "edits": []}': "does not know",
    }.items():
        (folder / "steering.json").write_text(text)
        assert words in message(folder)
