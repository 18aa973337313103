"""A steered copy of a multimodal model made on the Hub: what is fetched, what goes up, what is said of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.hub_client import Client
from support.hub_server import HubServer
from support.publishing import REPO, TOKEN
from support.tiny_models import PAIRS
from support.tiny_wrappers import wrapper_checkpoint

from patcher.checkpoint.folder import CheckpointFolder

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", ["llava", "mistral3"])
def test_the_shards_of_the_towers_stay_on_the_hub(client: Client, hub: HubServer, tmp_path: Path, name: str) -> None:
    base = wrapper_checkpoint(tmp_path / "base", name, sharded=True, template="processor")
    hub.add_repo("org/wrapper", {item.name: item.read_bytes() for item in base.iterdir()})
    hub.requests.clear()
    recipe = {
        "model": "org/wrapper", "output": None, "push": {"repo": REPO},
        "vectors": [{"name": "love", "layer": 0, "pairs": PAIRS, "coefficient": 2.0}],
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    answer = client("remote", recipe=str(tmp_path / "recipe.yaml"), token=TOKEN)
    assert "result" in answer, answer
    result = answer["result"]
    places = CheckpointFolder(base).weight_map
    of_text = {key for key in places if "embed_tokens" in key or "model.layers.0." in key}
    fetched = {file["name"] for file in result["manifest"]["remote"]["downloaded"]}
    assert fetched == {places[key] for key in of_text}, "no shard is fetched for the towers and their projector"
    assert places[next(key for key in places if "vision_tower" in key)] not in fetched
    (entry,) = result["manifest"]["verification"]
    assert (entry["status"], entry["passed"]) == ("truncated", True), entry
    published = hub.repos[REPO].files()
    assert published["preprocessor_config.json"] == (base / "preprocessor_config.json").read_bytes()
    assert published["chat_template.json"] == (base / "chat_template.json").read_bytes()
    assert b"AutoModelForImageTextToText, AutoProcessor" in published["README.md"]
