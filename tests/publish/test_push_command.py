"""The command line of publishing: one JSON object, exit codes, nothing heavy for --help."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from support.hub_client import ROOT
from support.hub_server import HubServer
from support.publishing import OTHER, READ_ONLY, REPO, TOKEN

from patcher.cli import push_command
from patcher.publish.hub import PushResult


def run_command(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    code = (
        "import sys\nfrom patcher.cli.push_command import push\nfrom patcher.errors import PatchModelError\n"
        "try:\n    push.main(sys.argv[1:], standalone_mode=False)\n"
        "except PatchModelError as error:\n    print(error, file=sys.stderr)\n    sys.exit(error.exit_code)\n"
    )
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", **environment}
    arguments = (sys.executable, "-c", code, *arguments)
    return subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=60)


def test_the_command(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    environment = {**hub.environment(str(tmp_path / "home")), "HF_TOKEN": TOKEN}
    done = run_command(environment, str(folder), REPO, "--json", "--private")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "url": f"{hub.url}/{REPO}",
        "commit": hub.repos[REPO].refs["main"],
        "method": "upload",
        "bytes_uploaded": hub.uploaded("^PUT |/commit/"),
    }
    assert hub.repos[REPO].private and "uploading" in done.stderr and TOKEN not in done.stderr


TROUBLE: dict[str, tuple[int, dict[str, str], str, dict[str, Any]]] = {
    "success": (0, {}, "", {}),
    "passing fault": (0, {}, "PUT /lfs/", {"status": 503, "times": 1}),
    "wrong token": (3, {"HF_TOKEN": OTHER[:-5]}, "", {}),
    "read-only token": (3, {"HF_TOKEN": READ_ONLY}, "", {}),
    "limit": (3, {}, "/api/repos/create", {"status": 429, "headers": {"Retry-After": "1"}}),
    "conflict": (3, {}, "POST .*/commit/", {"status": 409, "message": f"Bearer {TOKEN} was told {TOKEN[:30]}"}),
    "broken": (3, {}, "POST .*/commit/", {"drop": True}),
}


@pytest.mark.slow_but("success", "wrong token", "conflict")
@pytest.mark.parametrize("case", TROUBLE)
def test_no_token_is_ever_printed(hub: HubServer, folder: Path, tmp_path: Path, case: str) -> None:
    """Not even where the libraries print all that they do, or where the server says it."""
    exit_code, change, pattern, fault = TROUBLE[case]
    if fault:
        hub.fail(pattern, **fault)
    loud = {"HF_HUB_VERBOSITY": "debug", "HF_DEBUG": "1"}
    environment = {**hub.environment(str(tmp_path / "home")), "HF_TOKEN": TOKEN, **loud, **change}
    done = run_command(environment, str(folder), REPO, "--json")
    assert done.returncode == exit_code and "Traceback" not in done.stderr, done.stderr
    files = [path.read_text(errors="replace") for path in (tmp_path / "home").rglob("*") if path.is_file()]
    for text in (done.stdout, done.stderr, *files):
        assert environment["HF_TOKEN"] not in text and TOKEN[:30] not in text
    assert "uploading" in done.stderr or exit_code, "the check would see it"


@pytest.mark.parametrize("case", ["refused", "offline"])
def test_no_connection(hub: HubServer, folder: Path, tmp_path: Path, case: str) -> None:
    environment = {**hub.environment(str(tmp_path / "home")), "HF_TOKEN": TOKEN}
    change = {"refused": {"HF_ENDPOINT": "http://127.0.0.1:9"}, "offline": {"HF_HUB_OFFLINE": "1"}}[case]
    done = run_command({**environment, **change}, str(folder), REPO)
    words = {"refused": "cannot be reached at http://127.0.0.1:9", "offline": "unset HF_HUB_OFFLINE"}[case]
    assert done.returncode == 3 and words in done.stderr and done.stdout == ""
    assert "nothing can be published" in done.stderr or case == "refused"
    assert "remedy" in done.stderr and "Traceback" not in done.stderr and hub.repos == {}


def test_the_command_passes_everything_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: dict[str, Any] = {}

    def fake(folder: Path, repo: str, **kwargs: Any) -> PushResult:
        kwargs.pop("progress")("a step")
        seen.update(kwargs, folder=folder, repo=repo)
        return PushResult("http://hub/me/x", "c" * 40, "copy", 12345)

    monkeypatch.setattr(push_command, "push_folder", fake)
    monkeypatch.setattr("patcher.patched.reading.read_manifest", lambda _folder: None)
    options = ["--revision", "b", "--public", "--pull-request", "--commit-message", "m"]
    done = CliRunner().invoke(push_command.push, [str(tmp_path), "me/x", *options])
    assert done.exit_code == 0 and done.stdout == ""
    assert "http://hub/me/x" in done.stderr and "method copy, 12,345 bytes" in done.stderr and "a step" in done.stderr
    wanted = {"private": False, "public": True, "revision": "b", "pull_request": True, "commit_message": "m"}
    assert seen == {**wanted, "folder": tmp_path, "repo": "me/x"}


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom patcher.cli.push_command import push\n"
        "print([name for name in ('torch', 'transformers', 'huggingface_hub', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
