"""A streamed build of a Hub model: what is read is downloaded first, the rest only once there is a vector."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from support.hub_server import HubServer
from support.publishing import TOKEN
from support.tiny_models import tiny_checkpoint
from test_hub_build import call

from patcher.checkpoint.folder import CheckpointFolder

pytestmark = pytest.mark.slow

PAIRS = [{"prompt": f"Is {thing} cold?", "positive": "I love it", "negative": "I hate it"} for thing in "abcdef"]


@pytest.fixture
def shards(hub: HubServer, tmp_path: Path) -> tuple[list[str], list[str]]:
    """A sharded base as me/base: its shards that block 0 needs, and the others."""
    tiny_checkpoint(tmp_path / "base", "meta-llama--Llama-3.1-8B-Instruct", sharded=True)
    hub.add_repo("me/base", {item.name: item.read_bytes() for item in (tmp_path / "base").iterdir()})
    places = CheckpointFolder(tmp_path / "base").weight_map
    needed = {file for name, file in places.items() if "embed" in name or ".layers.0." in name}
    return sorted(needed), sorted(set(places.values()) - needed)


def recipe(folder: Path, coefficients: tuple[float, ...], **capture: str) -> Path:
    vectors = [
        {"name": f"v{number}", "pairs": PAIRS, "layer": 0, "coefficient": coefficient}
        for number, coefficient in enumerate(coefficients)
    ]
    path = folder / "recipe.yaml"
    path.write_text(
        json.dumps({"model": "me/base", "vectors": vectors, "capture": capture, "output": str(folder / "out")})
    )
    return path


def first_asked(hub: HubServer, name: str) -> int:
    return next(
        (n for n, line in enumerate(hub.requests) if line.startswith("GET") and line.partition("?")[0].endswith(name)),
        -1,
    )


def test_later_shards_wait_for_the_vectors(hub: HubServer, shards: tuple[list[str], list[str]], tmp_path: Path) -> None:
    needed, later = shards
    hub.requests.clear()
    done = call(hub, tmp_path / "home", "-m", "patcher", recipe(tmp_path, (1.0, -1.0), mode="stream"))
    assert done.returncode == 2 and "the vector is zero" in done.stderr and TOKEN not in done.stderr, done.stderr
    assert all(first_asked(hub, name) >= 0 for name in needed)
    assert later and all(first_asked(hub, name) == -1 for name in later)


def test_the_vector_is_that_of_a_build_in_memory(
    hub: HubServer, shards: tuple[list[str], list[str]], tmp_path: Path
) -> None:
    needed, later = shards
    found = []
    for mode in ("stream", "memory"):
        hub.requests.clear()
        home, cache = tmp_path / mode, str(tmp_path / "cache")
        home.mkdir()
        done = call(hub, home, "-m", "patcher", recipe(home, (2.0,), mode=mode), PATCH_MODEL_CACHE=cache)
        assert done.returncode == 0, done.stderr
        if mode == "stream":
            assert max(first_asked(hub, name) for name in needed) < min(first_asked(hub, name) for name in later)
        found.append(load_file(home / "out" / "steering.safetensors"))
    ((key, streamed),) = found[0].items()
    assert float((streamed - found[1][key]).norm()) <= 1e-6 * float(streamed.norm())
