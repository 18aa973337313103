"""What ``model:`` may name, and what of a Hub model is downloaded."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub.errors import OfflineModeIsEnabled
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from patcher.checkpoint.folder import BIN_INDEX, BIN_SINGLE, INDEX, SINGLE
from patcher.checkpoint.prepare import find_model
from patcher.checkpoint.source import Source, fetch, fetch_blocks, locate
from patcher.errors import InputError, OutsideError


@pytest.fixture
def recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """home/models/own, work/recipes/{near, meta/llama, file}; we stand in work/elsewhere."""
    for folder in ("home/models/own", "work/recipes/near", "work/recipes/meta/llama", "work/elsewhere/here"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "work" / "recipes" / "file").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "work" / "elsewhere")
    return tmp_path / "work" / "recipes"


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("near", "work/recipes/near"),
        ("./near", "work/recipes/near"),
        ("near/", "work/recipes/near"),
        ("meta/llama", "work/recipes/meta/llama"),
        ("../elsewhere/here", "work/elsewhere/here"),
        (".", "work/recipes"),
        ("~/models/own", "home/models/own"),
        ("~", "home"),
    ],
)
def test_a_folder_is_relative_to_the_recipe(recipes: Path, tmp_path: Path, model: str, expected: str) -> None:
    found = locate(model, recipe_folder=recipes)
    assert isinstance(found, Path)
    assert found.resolve() == (tmp_path / expected).resolve()


def test_an_absolute_folder(recipes: Path, tmp_path: Path) -> None:
    assert locate(str(tmp_path / "home"), recipe_folder=recipes) == tmp_path / "home"


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("gpt2", ("gpt2", None)),
        ("here", ("here", None)),
        ("meta-llama/Llama-2-7b-chat-hf", ("meta-llama/Llama-2-7b-chat-hf", None)),
        ("meta/other", ("meta/other", None)),
        ("openai-community/gpt2@main", ("openai-community/gpt2", "main")),
        ("a/b@0123456789abcdef0123456789abcdef01234567", ("a/b", "0123456789abcdef0123456789abcdef01234567")),
        ("a/b@refs/pr/3", ("a/b", "refs/pr/3")),
        ("a/b@v1.0-rc.1", ("a/b", "v1.0-rc.1")),
        ("near@main", ("near", "main")),
    ],
)
def test_a_hub_id(recipes: Path, model: str, expected: tuple[str, str | None]) -> None:
    assert locate(model, recipe_folder=recipes) == expected


@pytest.mark.parametrize(
    "model", ["./far", "../far", "/far", "~/far", "~", "file", "./file", "near/config.json/x/../y"]
)
def test_a_path_without_a_folder(recipes: Path, model: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "nobody"))
    with pytest.raises(InputError) as caught:
        locate(model, recipe_folder=recipes, where="adapter")
    assert str(caught.value).startswith("adapter: ")


NONSENSE = [
    "", " ", "\n", "\0", "a\0b", "~nobody-of-this-name/x", "x" * 5000, "x/" * 3000, "a/b/c", "a//b", "/", "a b", "a/b ",
    "-a/b", "a/.b", "@", "@main", "a/b@", "a/b@ main", "a/b@..", "a/b@../../x", "a/b@main@x", "a/b@-x", "https://hf.co/a/b",
    "C:\\models\\x", "hf://a/b", "日本/モデル", "a/b\n", "a/b@main\n",
]  # fmt: skip


@pytest.mark.parametrize("model", [text for text in NONSENSE if text != "/"], ids=repr)
def test_nonsense(recipes: Path, model: str) -> None:
    with pytest.raises(InputError) as caught:
        locate(model, recipe_folder=recipes)
    assert str(caught.value).startswith("model: ")


@settings(
    max_examples=400, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.text(max_size=20) | st.text(alphabet="ab~./@\\ \0-_é", max_size=12) | st.binary(max_size=9).map(repr))
@example("~a/b")
@example("\ud800")
def test_any_text_is_a_folder_a_hub_id_or_an_input_error(recipes: Path, model: str) -> None:
    try:
        found = locate(model, recipe_folder=recipes)
    except InputError:
        return
    if isinstance(found, Path):
        assert found.is_dir()
        assert model.strip()
    else:
        name, revision = found
        assert name.count("/") <= 1
        assert model == name + (f"@{revision}" if revision else "")
        assert ".." not in (revision or "")


class Hub:
    """A repository: its files, and what was downloaded of it."""

    commit = "c" * 40

    def __init__(self, folder: Path, files: dict[str, str], *, online: bool = True) -> None:
        self.folder, self.files, self.online = folder / self.commit, files, online
        self.asked: list[tuple[str | None, set[str]]] = []

    def model_info(self, _name: str, revision: str | None = None) -> SimpleNamespace:
        if not self.online:
            raise OfflineModeIsEnabled("offline")
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in self.files])

    def snapshot_download(
        self, _name: str, *, revision: str | None, allow_patterns: Sequence[str], **_bars: object
    ) -> str:
        chosen = {name for name in self.files if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns)}
        self.asked.append((revision, chosen))
        for name in chosen:
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / name).write_text(self.files[name])
        return str(self.folder)


def downloaded(hub: Hub, monkeypatch: pytest.MonkeyPatch, *, weights: bool = True) -> set[str]:
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    source = fetch("a/b", None, weights=weights)
    assert (source.name, source.hub, source.revision, source.folder) == ("a/b", True, hub.commit, hub.folder)
    return {str(item.relative_to(hub.folder)) for item in hub.folder.rglob("*") if item.is_file()}


def weight_map(*shards: str) -> str:
    return json.dumps({"weight_map": {f"w{number}": name for number, name in enumerate(shards)}})


SMALL = dict.fromkeys(("config.json", "tokenizer.json", "LICENSE", "README.md", "chat_template.jinja"), "{}")
BAGGAGE = [
    "pytorch_model.bin",
    "consolidated.safetensors",
    "tf_model.h5",
    "onnx/model.onnx",
    "model.gguf",
    "optimizer.pt",
]
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
ODD = ["pytorch_model-1.safetensors", "pytorch_model-2.safetensors"]
REPOSITORIES: dict[str, tuple[dict[str, str], set[str]]] = {
    "single": ({SINGLE: ""}, {SINGLE}),
    "sharded": ({INDEX: weight_map(*SHARDS), **dict.fromkeys(SHARDS, "")}, {INDEX, *SHARDS}),
    "both": ({SINGLE: "", INDEX: weight_map(*SHARDS), **dict.fromkeys(SHARDS, "")}, {SINGLE, INDEX}),
    "odd names": ({INDEX: weight_map(*ODD), **dict.fromkeys(ODD, "")}, {INDEX, *ODD}),
}


@pytest.mark.parametrize("kind", REPOSITORIES)
def test_only_the_weights_that_count_are_downloaded(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, expected = REPOSITORIES[kind]
    hub = Hub(tmp_path, {**SMALL, **dict.fromkeys(BAGGAGE, ""), **files})
    assert downloaded(hub, monkeypatch) == {*SMALL, *expected}
    assert [revision for revision, _ in hub.asked[1:]] == [hub.commit] * (len(hub.asked) - 1), "the commit moved"


def test_what_earlier_patches_kept_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = ["steering.safetensors", "steering.1.safetensors", "steering_generations.jsonl"]
    hub = Hub(tmp_path, {**SMALL, SINGLE: "", "steering.json": "{}", **dict.fromkeys(kept, "")})
    assert downloaded(hub, monkeypatch, weights=False) == {*SMALL, "steering.json"}
    assert downloaded(hub, monkeypatch) == {*SMALL, SINGLE, "steering.json", *kept}


@pytest.mark.parametrize("sharded", [False, True])
def test_bin_is_taken_where_there_is_nothing_else(
    sharded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["pytorch_model-00001-of-00001.bin"] if sharded else [BIN_SINGLE]
    files = {**SMALL, "tf_model.h5": "", **dict.fromkeys(names, "")}
    files |= {BIN_INDEX: weight_map(*names)} if sharded else {}
    assert downloaded(Hub(tmp_path, files), monkeypatch) == {*SMALL, *names, *([BIN_INDEX] if sharded else [])}


def test_no_weights_are_downloaded_for_a_dry_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(tmp_path, {**SMALL, SINGLE: "", **dict.fromkeys(BAGGAGE, "")})
    assert downloaded(hub, monkeypatch, weights=False) == set(SMALL)


def test_a_folder_of_the_working_directory_is_not_looked_for_on_the_hub_alone(
    recipes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``here`` lies where the command is given, and not beside the recipe."""

    def offline(*_arguments: object, **_options: object) -> None:
        raise OutsideError("the Hub cannot be reached")

    monkeypatch.setattr("patcher.checkpoint.prepare.fetch", offline)
    with pytest.raises(InputError, match="no such folder beside the recipe") as caught:
        find_model("here", recipes, weights=False)
    remedy = caught.value.problems[0].remedy
    assert remedy == "write ../elsewhere/here"
    found = locate(remedy.removeprefix("write "), recipe_folder=recipes)
    assert isinstance(found, Path) and found.resolve() == Path("here").resolve()
    with pytest.raises(OutsideError):
        find_model("there", recipes, weights=False)


def test_offline_the_cache_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(tmp_path, {**SMALL, SINGLE: ""}, online=False)
    assert downloaded(hub, monkeypatch) == {*SMALL, SINGLE}


def test_a_repository_without_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert downloaded(Hub(tmp_path, SMALL), monkeypatch) == set(SMALL)


def blocks(hub: Hub, monkeypatch: pytest.MonkeyPatch, *wanted: str) -> tuple[Source, set[str]]:
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)

    def needed(stored: Collection[str]) -> set[str]:
        assert set(stored) == set(json.loads(hub.files[INDEX])["weight_map"])
        return set(wanted)

    source = fetch_blocks("a/b", "main", needed)
    return source, {str(item.relative_to(hub.folder)) for item in hub.folder.rglob("*") if item.is_file()}


@pytest.mark.parametrize("shards", [SHARDS, ODD, ["model-[1].safetensors", "model-1.safetensors"]])
def test_of_a_sharded_model_only_what_is_needed(
    shards: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {**SMALL, INDEX: weight_map(*shards), **dict.fromkeys((*shards, *BAGGAGE), "")}
    for number, shard in enumerate(shards):
        hub = Hub(tmp_path / str(number), files)
        source, there = blocks(hub, monkeypatch, f"w{number}")
        assert there == {*SMALL, INDEX, shard}
        assert source == Source("a/b", True, hub.commit, hub.folder)
        assert [revision for revision, _ in hub.asked] == ["main", hub.commit]
    assert blocks(Hub(tmp_path / "all", files), monkeypatch, "w0", "w1")[1] == {*SMALL, INDEX, *shards}


@pytest.mark.parametrize("online", [True, False])
def test_a_model_in_one_file_comes_whole(online: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(tmp_path, {**SMALL, SINGLE: ""}, online=online)
    assert blocks(hub, monkeypatch)[1] == {*SMALL, SINGLE}
    files = {**SMALL, BIN_INDEX: weight_map("pytorch_model-1.bin"), "pytorch_model-1.bin": ""}
    assert blocks(Hub(tmp_path / "bin", files), monkeypatch)[1] == set(files)
    both = {**SMALL, SINGLE: "", INDEX: weight_map(*SHARDS), **dict.fromkeys(SHARDS, "")}
    assert blocks(Hub(tmp_path / "both", both), monkeypatch)[1] == {*SMALL, INDEX, SINGLE}


def test_a_shard_that_cannot_be_had_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(tmp_path, {**SMALL, INDEX: weight_map(*SHARDS), SHARDS[0]: ""}, online=False)
    assert blocks(hub, monkeypatch, "w0")[1] == {*SMALL, INDEX, SHARDS[0]}
    with pytest.raises(OutsideError, match="not in the local cache") as caught:
        blocks(hub, monkeypatch, "w0", "w1")
    assert SHARDS[1] in str(caught.value)


@pytest.mark.parametrize("shard", ["../model.safetensors", "config.json", 5])
def test_a_hostile_index_is_refused(shard: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(tmp_path, {**SMALL, INDEX: json.dumps({"weight_map": {"w0": shard}})})
    with pytest.raises(InputError, match="the index names a file"):
        blocks(hub, monkeypatch, "w0")
