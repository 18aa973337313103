"""An adapter on the Hub: its small files first, at a pinned commit; what else a repository may hold is said."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.adapters import CHATML, NEW, save_tokenizer, train_adapter
from support.hub_client import Client
from support.hub_server import Blob, HubServer, Repo
from support.publishing import TOKEN
from support.tiny_models import tiny_checkpoint, write_recipe

pytestmark = pytest.mark.filterwarnings("ignore")
LLAMA = "meta-llama--Llama-3.1-8B-Instruct"
ROWS = 366


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A base and an adapter with two tokens more and a template; the layer to steer."""
    place = tmp_path_factory.mktemp("hub-adapter")
    layer = tiny_checkpoint(place / "base", LLAMA, vocab_size=ROWS)
    train_adapter(place / "base", place / "adapter", rows=ROWS + 2)
    save_tokenizer(place / "adapter", *NEW, template=CHATML)
    return place, layer


@pytest.fixture
def repo(hub: HubServer, trained: tuple[Path, int]) -> Repo:
    files = files_of(trained[0] / "adapter")
    beside = {"README.md": b"# Adapter", "optimizer.pt": b"large", "training_args.bin": b"a pickle"}
    return hub.add_repo("me/adapter", {**files, **beside, "additional_chat_templates/rag.jinja": b"{{ messages }}"})


def test_its_files_are_downloaded_the_weights_last(hub: HubServer, client: Client, repo: Repo) -> None:
    found = client("adapter", name="me/adapter")["result"]
    assert found["revision"] == repo.refs["main"]
    wanted = {
        "adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja", "additional_chat_templates/rag.jinja",
    }  # fmt: skip
    assert set(found["files"]) >= wanted
    assert not {"optimizer.pt", "training_args.bin"} & set(found["files"])
    (weights,) = [number for number, line in enumerate(hub.requests) if line.startswith("GET") and "lfs" in line] or [
        max(number for number, line in enumerate(hub.requests) if "adapter_model" in line)
    ]
    assert weights > max(number for number, line in enumerate(hub.requests) if "tokenizer.json" in line)


def test_a_revision(hub: HubServer, client: Client, repo: Repo) -> None:
    tree = {name: Blob(data, name.endswith(".safetensors")) for name, data in repo.files().items()}
    second = repo.commit("v2", {**tree, "chat_template.jinja": Blob(b"{{ messages }}", False)}, "another template")
    found = client("adapter", name="me/adapter@v2")["result"]
    assert found["revision"] == second and second != repo.refs["main"]
    assert (Path(found["folder"]) / "chat_template.jinja").read_bytes() == b"{{ messages }}"


def test_what_cannot_be_merged_is_refused_before_its_weights_are_downloaded(
    hub: HubServer, client: Client, repo: Repo
) -> None:
    config = json.loads(repo.files()["adapter_config.json"])
    files = {**repo.files(), "adapter_config.json": json.dumps({**config, "task_type": "SEQ_CLS"}).encode()}
    hub.add_repo("me/classifier", files)
    hub.requests.clear()
    answer = client("adapter", name="me/classifier")
    assert answer["exit_code"] == 2 and "sequence classifier" in answer["text"]
    assert not any("adapter_model" in line for line in hub.requests)


def test_an_adapter_in_a_folder_of_a_repository(
    hub: HubServer, client: Client, trained: tuple[Path, int], tmp_path: Path
) -> None:
    files = {f"run/checkpoint-500/{name}": data for name, data in files_of(trained[0] / "adapter").items()}
    hub.add_repo("me/runs", {**files, "README.md": b"# Runs"})
    answer = client("adapter", name="me/runs")
    assert answer["exit_code"] == 2 and "adapters in folders of it: run/checkpoint-500" in answer["text"]
    command = 'hf download me/runs --include "run/checkpoint-500/*" --local-dir DIR'
    assert command in answer["remedy"]
    assert command in client("adapter", name="me/runs/run/checkpoint-500")["remedy"]

    # The remedy.
    environment = {**os.environ, **hub.environment(str(tmp_path / "home")), "HF_TOKEN": TOKEN}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    done = subprocess.run(command.replace("DIR", str(tmp_path / "DIR")), shell=True, env=environment, check=False)
    assert done.returncode == 0
    found = client("adapter", name=str(tmp_path / "DIR" / "run" / "checkpoint-500"))["result"]
    assert "adapter_model.safetensors" in found["files"]


@pytest.mark.parametrize(
    ("files", "words", "remedy"),
    [
        ({"config.json": b"{}", "model.safetensors": b"0"}, "no adapter_config.json", "give it as `model: me/odd`"),
        ({"README.md": b"nothing"}, "no adapter_config.json", "push_to_hub"),
        ({"adapter_config.json": b'{"peft_type": "LORA"}', "adapter_model.bin": b"0"}, "no adapter_model", "save"),
        ({"adapter_config.json": b'{"lora_parameters": {}}'}, "names no `peft_type`", None),
    ],
)
def test_what_else_a_repository_may_be(
    hub: HubServer, client: Client, files: dict[str, bytes], words: str, remedy: str | None
) -> None:
    hub.add_repo("me/odd", files)
    answer: dict[str, Any] = client("adapter", name="me/odd")
    assert answer["exit_code"] == 2 and words in answer["text"], answer
    assert (remedy is None) is (answer["remedy"] is None)
    assert remedy is None or remedy in answer["remedy"]


@pytest.mark.slow
def test_a_build_and_its_proof_of_both_from_the_hub(
    hub: HubServer, repo: Repo, trained: tuple[Path, int], tmp_path: Path
) -> None:
    place, layer = trained
    hub.add_repo("me/base", files_of(place / "base"))
    recipe = write_recipe(tmp_path / "recipe.yaml", "me/base", layer, tmp_path / "out", adapter="me/adapter")  # type: ignore[arg-type]
    environment = {
        "PATH": "/usr/bin:/bin",
        "OMP_NUM_THREADS": "1",
        **hub.environment(str(tmp_path / "home")),
        "HF_TOKEN": TOKEN,
    }

    def call(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "patcher", *map(str, arguments)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    done = call(recipe, "--json")
    assert done.returncode == 0, done.stderr
    manifest = json.loads(done.stdout)["manifest"]
    record = manifest["base"]["adapter"]
    assert record["revision"] == repo.refs["main"] and record["uses"] == ["template", "tokenizer"]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == ROWS + 2
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == CHATML

    # Its branch has moved since; what was merged is found all the same.
    tree = {name: Blob(data, name.endswith(".safetensors")) for name, data in repo.files().items()}
    repo.commit("main", {**tree, "chat_template.jinja": Blob(b"{{ messages }}", False)}, "another template")
    again = call("verify", tmp_path / "out", "--json")
    assert again.returncode == 0, again.stderr
