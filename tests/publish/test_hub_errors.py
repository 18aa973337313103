"""Every error of the Hub, its client, the network and the disk: the exit code, and words that help."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx2
import pytest
from huggingface_hub import errors as hf
from support.hub_client import ROOT, Client
from support.hub_server import HubServer
from support.publishing import TOKEN, refused

from patcher.errors import CheckFailed, InputError, OutsideError, PatchModelError
from patcher.errors.hub import hub_errors

SECRET = "hf_" + "a1B2c3D4" * 4


def explained(error: Exception) -> PatchModelError:
    with pytest.raises(PatchModelError) as caught, hub_errors("uploading the files", "me/x"):
        raise error
    assert caught.value.__cause__ is error
    assert SECRET not in str(caught.value) and SECRET not in json.dumps(caught.value.as_json())
    assert caught.value.problems[0].remedy and len(str(caught.value)) < 1200
    return caught.value


def answered(kind: type[hf.HfHubHTTPError], status: int, said: str | None = None, **headers: str) -> hf.HfHubHTTPError:
    request = httpx2.Request("POST", "https://huggingface.co/api/models/me/x")
    response = httpx2.Response(status, request=request, headers=headers)
    return kind(f"{status} Client Error\n\nfor url {request.url} {SECRET}", response=response, server_message=said)


HTTP, SAID = hf.HfHubHTTPError, f"the Hub's own words, {SECRET}"
ANSWERS: dict[str, tuple[Exception, type[PatchModelError], str, str]] = {
    "gated": (answered(hf.GatedRepoError, 403, SAID), OutsideError, "hub_gated", "own words"),
    "no repository": (answered(hf.RepositoryNotFoundError, 404, SAID), InputError, "hub_not_found", "own words"),
    "no repository, no token": (
        answered(hf.RepositoryNotFoundError, 401),
        InputError,
        "hub_not_found",
        "hf auth login",
    ),
    "no revision": (answered(hf.RevisionNotFoundError, 404, SAID), InputError, "hub_revision", "branch, tag or commit"),
    "no file": (answered(hf.RemoteEntryNotFoundError, 404, SAID), InputError, "hub_file", "no such file"),
    "disabled": (answered(hf.DisabledRepoError, 403, SAID), OutsideError, "hub_auth", "disabled"),
    "400": (answered(hf.BadRequestError, 400, SAID), OutsideError, "hub_rejected", "own words"),
    "401": (answered(HTTP, 401, SAID), OutsideError, "hub_auth", "HF_TOKEN"),
    "403": (answered(HTTP, 403, SAID), OutsideError, "hub_auth", "write access"),
    "409": (answered(HTTP, 409, SAID), OutsideError, "hub_conflict", "run the same command again"),
    "412": (answered(HTTP, 412, SAID), OutsideError, "hub_conflict", "run the same command again"),
    "413": (answered(HTTP, 413), OutsideError, "hub_rejected", "HTTP 413"),
    "429": (answered(HTTP, 429, **{"Retry-After": "9"}), OutsideError, "hub_rate_limit", "wait 9 seconds"),
    "429 window": (answered(HTTP, 429, RateLimit='"api";r=0;t=55'), OutsideError, "hub_rate_limit", "wait 55 seconds"),
    "429 silent": (answered(HTTP, 429), OutsideError, "hub_rate_limit", "a few minutes"),
    "500": (answered(HTTP, 500, SAID), OutsideError, "hub_server", "status.huggingface.co"),
    "503": (answered(HTTP, 503), OutsideError, "hub_server", "HTTP 503"),
    "name": (hf.HFValidationError(f"Repo id {SECRET}"), InputError, "hub_repo_id", "owner/name"),
    "no token": (hf.LocalTokenNotFoundError("Token is required"), OutsideError, "hub_auth", "hf auth login"),
    "offline": (hf.OfflineModeIsEnabled("offline"), OutsideError, "hub_offline", "HF_HUB_OFFLINE"),
    "refused": (httpx2.ConnectError("refused"), OutsideError, "hub_unreachable", "cannot be reached at https://"),
    "timeout": (httpx2.ReadTimeout(""), OutsideError, "hub_unreachable", "ReadTimeout"),
    "cut": (httpx2.RemoteProtocolError("peer closed"), OutsideError, "hub_unreachable", "broke"),
    "reset": (ConnectionResetError("reset by peer"), OutsideError, "hub_unreachable", "broke"),
    "no JSON": (json.JSONDecodeError("Expecting value", "<html>", 0), OutsideError, "hub_server", "not JSON"),
    "disk full": (OSError(errno.ENOSPC, "No space left"), OutsideError, "disk", "free some space"),
    "no right": (PermissionError(errno.EACCES, "Permission denied", "x"), OutsideError, "disk", "Permission denied"),
    "card": (ValueError("Invalid metadata in README.md.\n- bad license"), InputError, "hub_card", "bad license"),
    "quota": (ValueError("LFS batch API returned errors:\nno space"), OutsideError, "hub_rejected", "no space"),
    "storage": (RuntimeError("Data processing error: CAS"), OutsideError, "hub_unreachable", "CAS"),
    "nowhere": (hf.LocalEntryNotFoundError("not found in the cache"), OutsideError, "hub_unreachable", "local cache"),
}


@pytest.mark.parametrize("case", ANSWERS)
def test_each_error_in_plain_words(case: str) -> None:
    error, kind, code, words = ANSWERS[case]
    found = explained(error)
    assert (type(found), found.code) == (kind, code) and words in str(found)
    assert "me/x" in str(found) or code == "hub_card"


@pytest.mark.parametrize("wrapper", [RuntimeError("Error while uploading"), hf.LocalEntryNotFoundError("Cannot find")])
def test_the_error_inside_another_is_the_one_that_counts(wrapper: Exception) -> None:
    wrapper.__cause__ = hf.OfflineModeIsEnabled("offline")
    with pytest.raises(OutsideError) as caught, hub_errors("uploading the files", "me/x"):
        raise wrapper
    assert caught.value.code == "hub_offline"


def test_what_is_not_the_hubs_passes_through() -> None:
    for error in (KeyError("x"), ValueError("y"), CheckFailed("z")):
        with pytest.raises(type(error)) as caught, hub_errors("uploading", "me/x"):
            raise error
        assert caught.value is error


def test_a_long_answer_is_cut_to_a_screen() -> None:
    text = str(explained(answered(HTTP, 500, "\n".join("<p>" * 200 for _ in range(500)))))
    assert len(text.splitlines()) < 12


def test_nothing_heavy_is_imported_until_it_fails() -> None:
    code = (
        "import sys\nfrom patcher.errors.hub import hub_errors\n"
        "with hub_errors('reading', 'me/x'):\n    pass\n"
        "print([name for name in ('torch', 'huggingface_hub', 'httpx2', 'httpx') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


DOWNLOADS: dict[str, tuple[dict[str, Any], int, str]] = {
    "no repository": ({"repo": "me/nothing"}, 2, "hub_not_found"),
    "no repository, no token": ({"repo": "me/nothing", "token": False}, 2, "hub_not_found"),
    "gated": ({"repo": "other/gated"}, 3, "hub_gated"),
    "gated, no token": ({"repo": "other/gated", "token": False}, 3, "hub_gated"),
    "private": ({"repo": "other/private"}, 2, "hub_not_found"),
    "wrong token": ({"repo": "other/model", "token": SECRET}, 3, "hub_auth"),
    "no revision": ({"repo": "other/model", "revision": "nothing"}, 2, "hub_revision"),
    "no file": ({"repo": "other/model", "filename": "nothing.json"}, 2, "hub_file"),
    "bad name": ({"repo": "a/b/c"}, 2, "hub_repo_id"),
    "refused": ({"repo": "other/model", "endpoint": "http://127.0.0.1:9"}, 3, "hub_unreachable"),
}


@pytest.fixture
def others(hub: HubServer) -> HubServer:
    hub.add_repo("other/model", {"config.json": b"{}", "model.safetensors": bytes(range(256)) * 4096})
    hub.add_repo("other/private", {"config.json": b"{}"}, private=True)
    hub.add_repo("other/gated", {"config.json": b"{}"}, gated=True)
    return hub


@pytest.mark.parametrize("case", DOWNLOADS)
def test_downloads(client: Client, others: HubServer, tmp_path: Path, case: str) -> None:
    changes, exit_code, code = DOWNLOADS[case]
    asked = {"filename": "config.json", "token": TOKEN, "cache_dir": str(tmp_path), **changes}
    text = refused(client("download", **asked), exit_code, code)
    assert SECRET not in text and "published" not in text


def test_a_granted_gated_download(client: Client, others: HubServer, tmp_path: Path) -> None:
    others.repos["other/gated"].granted.add("me")
    answer = client("download", repo="other/gated", filename="config.json", token=TOKEN, cache_dir=str(tmp_path))
    assert Path(answer["result"]).read_bytes() == b"{}"


def test_a_download_cut_in_the_middle(client: Client, others: HubServer, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"repo": "other/model", "filename": "model.safetensors", "cache_dir": str(tmp_path)}
    others.fail("GET .*/resolve/", drop=True)
    refused(client("download", **asked), 3, "hub_unreachable")
    others.faults.clear()
    others.fail("GET .*/resolve/", drop=True, times=1)
    answer = client("download", **asked)
    assert Path(answer["result"]).read_bytes() == bytes(range(256)) * 4096, "it is resumed by range"


def test_a_download_from_a_hub_that_is_down(client: Client, others: HubServer, tmp_path: Path) -> None:
    others.fail("HEAD .*/resolve/", status=503)
    answer = client("download", repo="other/model", filename="config.json", cache_dir=str(tmp_path))
    refused(answer, 3, "hub_server")
