"""A token is in no output: not in what is printed, not in what is written, and not in what is sent but to log in."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.hub_server import HubServer, User
from support.publishing import OTHER, READ_ONLY, REPO, TOKEN
from support.tiny_models import tiny_checkpoint, write_recipe

pytestmark = pytest.mark.slow

WRONG = "hf_" + "Unknown" * 5
TOKENS = (TOKEN, READ_ONLY, OTHER, WRONG)
LOUD = {"HF_HUB_VERBOSITY": "debug", "HF_DEBUG": "1", "TRANSFORMERS_VERBOSITY": "debug"}
"""The libraries print all that they do."""


@dataclass(frozen=True)
class Session:
    """What a user did: a recipe that names a private base by its path, one folder for all that programs write."""

    place: Path
    hub: HubServer
    runs: dict[str, subprocess.CompletedProcess[str]]

    def files(self) -> Iterator[Path]:
        return (path for path in self.place.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def session(session_hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Session:
    hub, place = session_hub, tmp_path_factory.mktemp("session")
    hub.users = {TOKEN: User("me"), READ_ONLY: User("me", "read"), OTHER: User("other")}
    hub.repos, hub.lfs, hub.faults, hub.received, hub.requests = {}, {}, [], [], []
    layer = tiny_checkpoint(place / "base", "meta-llama--Llama-3.2-1B")
    (place / "tmp").mkdir()
    places = {"TMPDIR": str(place / "tmp"), "PATCH_MODEL_CACHE": str(place / "cache"), "HOME": str(place / "home")}
    short = {"probes": ["Every word of it."], "long_prompt_limit": 0}
    push = {"repo": REPO, "private": True}
    recipe = write_recipe(place / "recipe.yaml", place / "base", layer, place / "out", push=push, verify=short)
    # A careless note, which the record of the recipe would carry along.
    recipe.write_text(f"{recipe.read_text()}\n# export HF_TOKEN={OTHER}\n")

    def run(token: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        environment = {
            "PATH": "/usr/bin:/bin",
            "OMP_NUM_THREADS": "1",
            **hub.environment(str(place / "home")),
            **places,
            **LOUD,
        }
        command = [sys.executable, "-m", "patcher", *map(str, arguments)]
        variables = {**environment, "HF_TOKEN": token, "PYTHONPATH": str(Path(__file__).parents[2])}
        return subprocess.run(command, env=variables, capture_output=True, text=True, check=False, cwd=place)

    runs = {
        "dry run": run(WRONG, recipe, "--dry-run", "--json", "-v"),
        "build": run(TOKEN, recipe, "--json", "-v"),
        "wrong": run(WRONG, "push", "out", REPO),
        "read-only": run(READ_ONLY, "push", "out", REPO, "--json"),
        "other": run(OTHER, "push", "out", REPO, "--json"),
        "again": run(TOKEN, "push", "out", REPO),
    }
    return Session(place, hub, runs)


def test_everything_was_run(session: Session) -> None:
    statuses = {name: done.returncode for name, done in session.runs.items()}
    told = {name: done.stderr[-2000:] for name, done in session.runs.items()}
    assert statuses == {"dry run": 0, "build": 0, "wrong": 3, "read-only": 3, "other": 3, "again": 0}, told
    assert json.loads(session.runs["build"].stdout)["push"]["url"] == f"{session.hub.url}/{REPO}"
    assert json.loads(session.runs["read-only"].stdout)["error"]["message"]
    assert not any("Traceback" in done.stderr for done in session.runs.values())
    assert session.hub.repos[REPO].files()


def test_no_token_is_printed(session: Session) -> None:
    for name, done in session.runs.items():
        for token in TOKENS:
            assert token[:20] not in done.stdout + done.stderr, name


def test_no_token_is_written(session: Session) -> None:
    """Into the output, caches, logs and temporary files, under whatever name; the recipe is the user's own."""
    read = {path for path in session.files() if path.name != "recipe.yaml"}
    holders = {path for path in read for token in TOKENS if token[:20].encode() in path.read_bytes()}
    assert len(read) > 12 and not holders
    assert not any(token[:20] in str(path) for path in session.files() for token in TOKENS)


def test_no_token_and_no_local_path_is_sent(session: Session) -> None:
    """But for the header that logs in."""
    published = session.hub.repos[REPO].files()
    sent = [*published.values(), *session.hub.received, *(line.encode() for line in session.hub.requests)]
    for token in TOKENS:
        assert not any(token[:20].encode() in part for part in sent)
    for local in (str(session.place), str(Path.home() / ""), "/tmp/"):
        holders = [name for name, content in published.items() if local.encode() in content]
        assert not holders, local
    assert b"base" in published["steering.json"] and b"recipe" in published["steering.json"]


def test_a_token_would_be_found(session: Session) -> None:
    """The recipe holds one, and the record of it is where it would be."""
    recipe = (session.place / "recipe.yaml").read_bytes()
    assert OTHER.encode() in recipe and str(session.place).encode() in recipe
    assert b"export HF_TOKEN=" in session.hub.repos[REPO].files()["steering.json"]
