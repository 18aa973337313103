"""Of a model on the Hub, only the shards that hold the embedding and blocks 0..k are asked for, over real HTTP."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.hub_server import HubServer
from support.publishing import TOKEN
from support.tiny_models import tiny_checkpoint

from patcher.architectures.analysis import Architecture
from patcher.checkpoint.block_names import block_names, tensors_for_blocks
from patcher.checkpoint.folder import CheckpointFolder
from patcher.checkpoint.prepare import read_config
from patcher.checkpoint.safetensors_file import read_tensor

pytestmark = pytest.mark.slow

FETCH = """
import json, sys
from patcher.architectures.analysis import Architecture
from patcher.checkpoint.block_names import block_names, tensors_for_blocks
from patcher.checkpoint.prepare import read_config
from patcher.checkpoint.source import fetch, fetch_blocks
from patcher.errors import PatchModelError
last = int(sys.argv[1])
try:
    names = block_names(Architecture(read_config(fetch("me/base", None, weights=False).folder)))
    source = fetch_blocks("me/base", None, lambda stored: tensors_for_blocks(stored, names, last))
    if sys.argv[2:] == ["all"]:
        source = fetch("me/base", source.revision, weights=True)
    print(json.dumps({"folder": str(source.folder), "revision": source.revision}))
except PatchModelError as error:
    print(json.dumps(error.as_json()))
"""


@pytest.fixture
def local(hub: HubServer, tmp_path: Path) -> Path:
    """A sharded base, on the server as me/base and here."""
    tiny_checkpoint(tmp_path / "base", "meta-llama--Llama-3.1-8B-Instruct", sharded=True)
    hub.add_repo("me/base", {item.name: item.read_bytes() for item in (tmp_path / "base").iterdir()})
    return tmp_path / "base"


def fetched(hub: HubServer, home: Path, *arguments: object, **extra: str) -> dict[str, Any]:
    hub.requests.clear()
    environment = {
        "PATH": "/usr/bin:/bin",
        "OMP_NUM_THREADS": "1",
        **hub.environment(str(home)),
        "HF_TOKEN": TOKEN,
        **extra,
    }
    command = [sys.executable, "-c", FETCH, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def asked_for(hub: HubServer, names: list[str]) -> set[str]:
    """The files of ``names`` that any request was about."""
    return {name for name in names if any(request.partition("?")[0].endswith(f"/{name}") for request in hub.requests)}


def test_later_shards_are_never_asked_for(hub: HubServer, local: Path, tmp_path: Path) -> None:
    whole = CheckpointFolder(local)
    needed = tensors_for_blocks(whole.tensors, block_names(Architecture(read_config(local))), 1)
    shards = {whole.weight_map[name] for name in needed}
    assert 1 < len(shards) < len(whole.weight_files) - 1

    result = fetched(hub, tmp_path / "home", 1)
    assert asked_for(hub, whole.weight_files) == shards
    assert result["revision"] == hub.repos["me/base"].refs["main"]
    partial = CheckpointFolder(Path(result["folder"]), partial=True)
    assert set(partial.weight_files) == shards and needed <= set(partial.tensors) < set(whole.tensors)
    assert all(read_tensor(partial.tensors[name]).equal(read_tensor(whole.tensors[name])) for name in needed)

    # A second time nothing is downloaded; without a connection neither.
    fetched(hub, tmp_path / "home", 1)
    assert not any(request.startswith("GET") and "resolve" in request for request in hub.requests), hub.requests
    away = fetched(hub, tmp_path / "home", 1, HF_HUB_OFFLINE="1")
    assert away["folder"] == result["folder"] and not hub.requests
    assert fetched(hub, tmp_path / "home", 3, HF_HUB_OFFLINE="1")["error"]["code"].startswith("hub_")

    # The rest comes when it is wanted, and what is there is not downloaded again.
    every = fetched(hub, tmp_path / "home", 1, "all")
    assert CheckpointFolder(Path(every["folder"])).tensors.keys() == whole.tensors.keys()
    got = {name for name in whole.weight_files if any(r.startswith("GET") and name in r for r in hub.requests)}
    assert got == set(whole.weight_files) - shards


def test_a_shard_that_the_server_cannot_give(hub: HubServer, local: Path, tmp_path: Path) -> None:
    hub.fail(r"model-00001-of-.*\.safetensors", status=403, message="not yours")
    assert fetched(hub, tmp_path / "home", 0)["error"]["code"] == "hub_auth"
