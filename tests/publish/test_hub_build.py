"""From a base on the Hub to a published, steered copy, by the command line over real HTTP."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.hub_server import HubServer
from support.publishing import TOKEN
from support.tiny_models import tiny_checkpoint, write_recipe

LOAD = """
import json, sys, torch
from transformers import AutoModelForCausalLM
ids = torch.tensor([[5, 9, 60, 33]])
with torch.no_grad():
    print(json.dumps([AutoModelForCausalLM.from_pretrained(name)(input_ids=ids).logits[0, -1, :8].tolist()
                      for name in sys.argv[1:]]))
"""


@pytest.fixture
def base(hub: HubServer, tmp_path: Path) -> int:
    """A sharded base with a licence on the server as me/base; the layer to steer."""
    layer = tiny_checkpoint(tmp_path / "base", "meta-llama--Llama-3.2-1B", sharded=True)
    files = {item.name: item.read_bytes() for item in (tmp_path / "base").iterdir()}
    files["README.md"] = b"---\nlicense: mit\n---\n# Base\n"
    files["consolidated.safetensors"] = b"another format"
    hub.add_repo("me/base", files)
    return layer


def call(hub: HubServer, home: Path, *arguments: object, **extra: str) -> subprocess.CompletedProcess[str]:
    environment = {
        "PATH": "/usr/bin:/bin",
        "OMP_NUM_THREADS": "1",
        **hub.environment(str(home)),
        "HF_TOKEN": TOKEN,
        **extra,
    }
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_build_from_the_hub_push_and_load(hub: HubServer, base: int, tmp_path: Path) -> None:
    push = {"repo": "me/steered", "private": True}
    recipe = write_recipe(tmp_path / "recipe.yaml", "me/base", base, tmp_path / "out", push=push)
    done = call(hub, tmp_path / "home", "-m", "patcher", recipe, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["push"]["url"] == f"{hub.url}/me/steered" and TOKEN not in done.stdout + done.stderr
    assert result["push"]["method"] == "copy", "the base's shards are copied on the server"
    assert not {line for line in hub.requests if line.startswith("PUT")} & {
        f"PUT /lfs/{oid}?repo=me/steered" for oid in hub.repos["me/base"].objects
    }
    manifest = result["manifest"]
    assert manifest["base"]["hub"] and manifest["base"]["revision"] == hub.repos["me/base"].refs["main"]
    assert manifest["base"]["path"] is None and manifest["verification"][0]["passed"]

    published = hub.repos["me/steered"].files()
    assert hub.repos["me/steered"].private
    assert b"base_model: me/base" in published["README.md"] and b"license: mit" in published["README.md"]
    assert "consolidated.safetensors" not in published
    assert not any(str(tmp_path).encode() in data or TOKEN.encode() in data for data in published.values())

    loaded = call(hub, tmp_path / "other-home", "-c", LOAD, "me/steered", str(tmp_path / "out"), "me/base")
    assert loaded.returncode == 0, loaded.stderr
    from_hub, from_disk, unsteered = json.loads(loaded.stdout)
    assert from_hub == from_disk
    assert max(abs(a - b) for a, b in zip(from_hub, unsteered, strict=True)) > 0.05

    again = call(hub, tmp_path / "home", "-m", "patcher", "verify", tmp_path / "out", "--json")
    assert again.returncode == 0, again.stderr


@pytest.mark.slow
def test_a_dry_run_downloads_no_weights(hub: HubServer, base: int, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", "me/base@main", base, tmp_path / "out")
    hub.requests.clear()
    done = call(hub, tmp_path / "home", "-m", "patcher", recipe, "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["route"]["name"] == "flag"
    assert not any(
        "GET" in request and ".safetensors" in request and "index" not in request for request in hub.requests
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "code", "words"),
    [
        ("me/nowhere", 2, "me/nowhere"),
        ("me/base@no-such-branch", 2, "no-such-branch"),
    ],
)
def test_what_is_not_there_is_said(
    hub: HubServer, base: int, tmp_path: Path, model: str, code: int, words: str
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", model, base, tmp_path / "out")
    done = call(hub, tmp_path / "home", "-m", "patcher", recipe)
    assert done.returncode == code and words in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_no_connection_and_nothing_in_the_cache(hub: HubServer, base: int, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", "me/base", base, tmp_path / "out")
    done = call(hub, tmp_path / "home", "-m", "patcher", recipe, HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 3 and "Traceback" not in done.stderr, done.stderr
