"""A steered copy made on the Hub: what is fetched for it, what goes up, and what stock transformers loads from it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.hub_client import Client
from support.hub_server import HubServer
from support.publishing import REPO, TOKEN, manifest, refused
from support.tiny_models import PAIRS, tiny_checkpoint

from patcher.build.early_checks import is_remote
from patcher.build.remote_refusals import check_recipe
from patcher.build.result import BuildResult
from patcher.checkpoint.folder import CheckpointFolder
from patcher.cli import main
from patcher.errors import InputError, OutsideError
from patcher.patched.schema import Manifest
from patcher.publish.hub import check_can_publish
from patcher.recipe.file import LoadedRecipe
from patcher.recipe.schema import Recipe

LLAMA, GPT2, QWEN3, GEMMA3 = (
    "meta-llama--Llama-3.2-1B",
    "openai-community--gpt2",
    "Qwen--Qwen3-8B",
    "google--gemma-3-1b-it",
)


@pytest.fixture
def publish_base(hub: HubServer, tmp_path: Path) -> Callable[..., Path]:
    """Put a tiny model on the server, as a repository named like the test; the folder that it was made of."""

    def publish(name: str, **options: Any) -> Path:
        folder = tmp_path / "base"
        tiny_checkpoint(folder, name, **options)
        files = {item.name: item.read_bytes() for item in folder.iterdir()}
        files["README.md"] = b"---\nlicense: mit\n---\n# Base\n"
        hub.add_repo(f"org/{tmp_path.name}", files)
        hub.requests.clear()
        return folder

    return publish


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """A recipe with ``output: null``, and its vector file."""

    def recipe(layer: int, vector: dict[str, Any] | None = None, **keys: Any) -> str:
        values = 3.0 * torch.randn(64, generator=torch.Generator().manual_seed(1))
        save_file({"v": values}, tmp_path / "v.safetensors")
        found = {"name": "love", "layer": layer, **(vector or {"method": "file", "file": "v.safetensors"})}
        content = {"model": f"org/{tmp_path.name}", "vectors": [found], "output": None, "push": {"repo": REPO}, **keys}
        (tmp_path / "recipe.yaml").write_text(json.dumps(content))
        return str(tmp_path / "recipe.yaml")

    return recipe


def whole_files_fetched(hub: HubServer) -> set[str]:
    """Weight files that were asked for other than by a range."""
    asked = [line for line in hub.requests if line.startswith("GET") and line.endswith(".safetensors")]
    return {line.rpartition("/")[2] for line in asked if asked.count(line) > hub.ranges.count(line)}


def steers(client: Client, hub: HubServer, base: Path, tmp_path: Path, block: str) -> bool:
    """Whether the repository, loaded by stock transformers, does what the base does under the hook."""
    (tmp_path / "held.safetensors").write_bytes(hub.repos[REPO].files()["steering.safetensors"])
    from safetensors.torch import load_file

    save_file({"v": load_file(tmp_path / "held.safetensors")["love.layer." + block.rpartition(".")[2]]}, tmp_path / "v")
    answer = client("steering", model=REPO, base=str(base), vector=str(tmp_path / "v"), token=TOKEN, block=block)
    error, effect = answer["result"]
    return bool(error < 1e-4 and effect > 1000 * error and effect > 0.1)


@pytest.mark.slow
def test_from_a_vector_file_no_weight_file_is_fetched(
    client: Client, hub: HubServer, publish_base: Callable[..., Path], write: Callable[..., str], tmp_path: Path
) -> None:
    base = publish_base(LLAMA, sharded=True)
    recipe = write(1)
    planned = client("remote", recipe=recipe, token=TOKEN, dry_run=True)["result"]
    assert planned["output"] is None and planned["download"]["files"] == [] and planned["download"]["of_files"] > 3
    assert set(hub.repos) == {f"org/{tmp_path.name}"}, "a dry run writes nothing"

    result = client("remote", recipe=recipe, token=TOKEN)["result"]
    assert not whole_files_fetched(hub) and hub.ranges and result["bytes_downloaded"] == 0
    assert result["output"] is None and result["push"]["method"] == "copy"
    assert result["push"]["commit"] == hub.repos[REPO].refs["main"]
    weights = sum(item.stat().st_size for item in base.glob("*.safetensors"))
    assert result["push"]["bytes_uploaded"] <= hub.uploaded() < weights / 5
    (entry,) = result["manifest"]["verification"]
    assert entry["status"] == "structural" and entry["passed"]
    seconds = result["timings"]
    assert seconds.pop("total") == round(sum(seconds.values()), 4) and min(seconds[s] for s in ("plan", "push")) > 0
    assert [check["name"] for check in entry["checks"] if check["passed"] is None] == ["residual stream"]

    published = hub.repos[REPO].files()
    recorded = json.loads(published["steering.json"])
    assert recorded["remote"]["downloaded"] == [] and recorded["evaluation"] is None
    hashes = {record["name"]: record["sha256"] for record in recorded["base"]["files"]}
    files = hub.repos[f"org/{tmp_path.name}"].commits[recorded["base"]["revision"]]
    assert all(files[name].sha256 == sha256 for name, sha256 in hashes.items()), "the Hub's hashes"
    card = published["README.md"].decode()
    assert "license: mit" in card and "No block of this copy was run" in card and "only the headers" in card
    assert steers(client, hub, base, tmp_path, "model.layers.1")


@pytest.mark.slow
def test_from_activations_only_the_first_blocks_are_fetched_and_run(
    client: Client, hub: HubServer, publish_base: Callable[..., Path], write: Callable[..., str], tmp_path: Path
) -> None:
    base = publish_base(LLAMA, sharded=True)
    places = CheckpointFolder(base).weight_map
    needed = {file for name, file in places.items() if "embed" in name or ".layers.0." in name}
    result = client("remote", recipe=write(0, {"pairs": PAIRS, "coefficient": 2.0}), token=TOKEN)["result"]
    assert whole_files_fetched(hub) == needed < set(places.values())
    assert result["bytes_downloaded"] == sum((base / name).stat().st_size for name in needed)
    (entry,) = result["manifest"]["verification"]
    assert (entry["status"], entry["blocks"], entry["passed"]) == ("truncated", 1, True)
    assert entry["vector_rel_error"] < 1e-4 and entry["steering_effect"] > 1000 * entry["max_abs_logprob_diff"]
    assert "Later blocks were not" in hub.repos[REPO].files()["README.md"].decode()
    assert steers(client, hub, base, tmp_path, "model.layers.0")


@pytest.mark.slow
def test_a_refitted_vector_is_of_all_pairs_though_nothing_is_measured(
    client: Client, hub: HubServer, publish_base: Callable[..., Path], write: Callable[..., str]
) -> None:
    publish_base(LLAMA, sharded=True)
    pairs = [{"positive": f"I love {word}", "negative": f"I hate the {word}"} for word in "abcdefghijkl"]
    result = client("remote", recipe=write(0, {"pairs": pairs, "refit": True}), token=TOKEN)["result"]
    (edit,) = result["manifest"]["edits"]
    cosine = edit["made_of"].pop("cosine")
    assert edit["made_of"] == {"count": 12, "of": 12, "measured": 10} and 0 < cosine < 0.99999
    card = " ".join(hub.repos[REPO].files()["README.md"].decode().split())
    assert "made of all 12 pairs. No effect was measured on those that were held out first" in card
    assert f"its cosine with the vector of the other 10 is {cosine:.4f}" in card


@pytest.mark.slow
def test_a_native_bias_needs_the_one_file_that_holds_it(
    client: Client, hub: HubServer, publish_base: Callable[..., Path], write: Callable[..., str], tmp_path: Path
) -> None:
    base = publish_base(GPT2, sharded=True)
    (holder,) = {
        file for name, file in CheckpointFolder(base).weight_map.items() if name.endswith("h.1.mlp.c_proj.bias")
    }
    result = client("remote", recipe=write(1), token=TOKEN)["result"]
    assert result["manifest"]["route"]["name"] == "native" and whole_files_fetched(hub) == {holder}
    assert result["manifest"]["remote"]["changed"] == [holder]
    assert result["manifest"]["verification"][0]["status"] == "structural"
    assert (base / holder).stat().st_size <= hub.uploaded(r"^PUT") < 2 * (base / holder).stat().st_size
    assert steers(client, hub, base, tmp_path, "transformer.h.1")


@pytest.mark.slow
def test_a_checkpoint_in_one_file_becomes_the_first_of_two(
    client: Client, hub: HubServer, publish_base: Callable[..., Path], write: Callable[..., str], tmp_path: Path
) -> None:
    base = publish_base(QWEN3)
    # What a push left there before must not be loaded in place of the copy.
    hub.add_repo(REPO, {"model.safetensors": b"another model", "config.json": b"{}"})
    hub.requests.clear()
    result = client("remote", recipe=write(1, prefer="stacks"), token=TOKEN)["result"]
    assert result["manifest"]["route"]["name"] == "relabel" and not whole_files_fetched(hub)
    assert "would take the `carrier` route" in " ".join(result["manifest"]["route"]["advice"])
    files = hub.repos[REPO].files()
    assert {name for name in files if name.startswith("model")} == {
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    }
    assert files["model-00001-of-00002.safetensors"] == (base / "model.safetensors").read_bytes()
    assert steers(client, hub, base, tmp_path, "model.layers.1")


def test_what_would_rewrite_the_weights_is_refused(
    client: Client, hub: HubServer, publish_base: Callable[..., Path], write: Callable[..., str]
) -> None:
    publish_base(GEMMA3, sharded=True)
    text = refused(client("remote", recipe=write(1), token=TOKEN), 2, "remote")
    assert "carrier: it renames or replaces tensors in" in text and "output" in text
    assert not whole_files_fetched(hub) and REPO not in hub.repos
    # After the last block nothing has to move.
    planned = client("remote", recipe=write(3), token=TOKEN, dry_run=True)["result"]
    assert planned["route"]["name"] == "carrier" and planned["download"]["files"] == []


def test_other_formats_are_refused(
    client: Client, hub: HubServer, publish_base: Callable[..., Path], write: Callable[..., str], tmp_path: Path
) -> None:
    base = publish_base(LLAMA)
    repo = hub.repos[f"org/{tmp_path.name}"]
    files = dict(repo.commits[repo.refs["main"]])
    weights = files.pop("model.safetensors")
    repo.commit("main", {**files, "pytorch_model.bin": weights}, "pickles")
    assert ".bin files" in refused(client("remote", recipe=write(1), token=TOKEN), 2, "remote")
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    hub.add_repo(f"org/{tmp_path.name}", {"config.json": json.dumps(config).encode(), "model.safetensors": b""})
    assert "quantised" in refused(client("remote", recipe=write(1), token=TOKEN), 2, "remote")
    assert not whole_files_fetched(hub)


def test_a_gated_base_without_access(
    client: Client, hub: HubServer, publish_base: Callable[..., Path], write: Callable[..., str], tmp_path: Path
) -> None:
    publish_base(LLAMA)
    hub.repos[f"org/{tmp_path.name}"].gated = True
    assert "access" in refused(client("remote", recipe=write(1), token=TOKEN), 3, "hub_gated")
    assert REPO not in hub.repos


@pytest.mark.slow
def test_a_route_whose_proof_fails_is_not_published(
    client: Client, hub: HubServer, publish_base: Callable[..., Path], write: Callable[..., str]
) -> None:
    """The others of this class change most of the weight files; the whole model takes one of them."""
    publish_base(LLAMA, sharded=True)
    told = refused(client("remote", recipe=write(1), token=TOKEN, broken=["flag"]), 1, "verification")
    assert "`flag`: stored vector" in told and "give `output` a folder" in told
    assert REPO not in hub.repos


FILE = {"name": "v", "method": "file", "file": "v.safetensors", "layer": 1}
WHOLE = {
    "no place to publish": {"push": None},
    "a local base": {"model": "./base"},
    "an adapter": {"adapter": "org/adapter"},
    "a fitted route": {"exact": False},
    "another stack": {"verify": {"stacks": ["transformers", "vllm"]}},
    "a sweep": {"vectors": [{"name": "v", "pairs": PAIRS, "layer": "auto"}]},
    "written responses": {
        "vectors": [
            {
                "name": "v",
                "method": "persona",
                "layer": 1,
                "questions": ["Why?"],
                "personas": {"positive": "Be kind.", "negative": "Be cruel."},
            }
        ]
    },
}


@pytest.mark.parametrize("case", WHOLE)
def test_what_takes_the_whole_model_is_refused_at_once(tmp_path: Path, case: str) -> None:
    (tmp_path / "base").mkdir()
    keys = {"model": "org/base", "vectors": [FILE], "output": None, "push": {"repo": REPO}, **WHOLE[case]}
    with pytest.raises(InputError) as caught:
        check_recipe(LoadedRecipe(Recipe.model_validate(keys), "", tmp_path / "recipe.yaml"))
    assert caught.value.code == "remote" and caught.value.problems[0].remedy


def test_it_is_asked_for_by_name() -> None:
    plain = {"model": "org/base", "vectors": [FILE]}
    assert not is_remote(Recipe.model_validate(plain), None)
    assert is_remote(Recipe.model_validate({**plain, "output": None}), None)
    assert not is_remote(Recipe.model_validate({**plain, "output": None}), Path("here"))
    assert not is_remote(Recipe.model_validate({**plain, "output": "here"}), None)


def test_offline_is_said_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OutsideError) as caught:
        check_can_publish(REPO, None, False)
    assert caught.value.code == "hub_offline"


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = {"model": "org/base", "vectors": [FILE], "output": None}
    save_file({"v": torch.ones(4)}, tmp_path / "v.safetensors")
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    with pytest.raises(SystemExit) as done:
        main([str(tmp_path / "recipe.yaml"), "--json"])
    error = json.loads(capsys.readouterr().out)["error"]
    assert done.value.code == 2 and error["code"] == "remote" and "push" in error["remedy"]

    made = manifest(
        remote={"downloaded": [], "bytes_downloaded": 0, "bytes_of_weights": 140 * 10**9, "weight_files": 30}
    )
    made["route"] |= {"copy_layers": {}, "warnings": [], "advice": []}
    made["edits"][0] |= {"norm": 3.0, "residual_norm": None, "coefficient": 1.0, "stored_rel_error": 0.0}
    made["verification"][0]["status"] = "structural"
    push = {"url": "https://huggingface.co/me/steered", "commit": "0" * 40, "method": "copy", "bytes_uploaded": 70_000}
    result = BuildResult(None, Manifest.model_validate(made), {"total": 1.0}, {}, 1, push=push)
    monkeypatch.setattr("patcher.build.remote.remote_build", lambda *_arguments, **_options: result)
    with pytest.raises(SystemExit) as done:
        main([str(tmp_path / "recipe.yaml"), "--json"])
    printed = capsys.readouterr()
    assert done.value.code in (0, None)
    answer = json.loads(printed.out)
    assert answer["output"] is None and answer["push"] == push and answer["bytes_downloaded"] == 0
    assert "0 of 30 weight files" in printed.err and "70,000 bytes uploaded" in printed.err
