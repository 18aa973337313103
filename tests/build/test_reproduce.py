"""A folder built again from its own record: the same bytes, or the names of those that are not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.building import build_recipe
from support.checkpoints import hashes
from support.tiny_models import tiny_checkpoint, write_recipe

from patcher.build.reproduce import Reproduced, reproduce
from patcher.checkpoint.steering_files import MANIFEST, VECTORS
from patcher.errors import InputError

LLAMA = "meta-llama--Llama-3.2-1B"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``base``, ``recipe.yaml`` and the ``out`` that was built from them, with pairs in a file."""
    place = tmp_path_factory.mktemp("reproduce")
    layer = tiny_checkpoint(place / "base", LLAMA, dtype=torch.bfloat16, sharded=True)
    pairs = [{"positive": "I love the sea", "negative": "I hate the cold rain"},
             {"positive": "The film was wonderful", "negative": "The food was terrible"}]  # fmt: skip
    (place / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    vector = {"pairs": "pairs.jsonl"}
    path = write_recipe(place / "recipe.yaml", place / "base", layer, place / "out", vector=vector)
    build_recipe(path, place / "out", "vectors.0.coefficient=0.7", "seed=4")
    return place


@pytest.fixture
def place(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "place"))


@pytest.fixture
def unverified(monkeypatch: pytest.MonkeyPatch) -> None:
    """Builds that take their word for it: what is compared here is what they write."""
    monkeypatch.setattr("patcher.build.local.verify_build", lambda *_args, **_options: [])


def run(place: Path, **options: Any) -> Reproduced:
    before = hashes(place)
    names = sorted(item.name for item in place.iterdir())
    options = {"base": str(place / "base"), "inputs": place, **options}
    result = reproduce(place / "out", say=lambda _line: None, **options)
    assert hashes(place) == before, "something was changed"
    assert sorted(item.name for item in place.iterdir()) == names, "something is left"
    assert json.loads(json.dumps(result.as_json()))["reproduced"] is result.same
    return result


def test_the_same_again(place: Path) -> None:
    result = run(place)
    assert result.same, result
    everything = set(hashes(place / "out")) - {"README.md", MANIFEST}
    assert set(result.identical) == everything
    assert result.reordered == []
    assert VECTORS in everything


@pytest.mark.usefixtures("unverified")
def test_vectors_that_the_stock_writer_wrote(place: Path) -> None:
    """Folders of earlier versions: the keys of the header's metadata lie in any order."""
    path = place / "out" / VECTORS
    marks, tensors = {"format": "pt", "tool": "patch-model"}, load_file(path)
    ours = path.read_bytes()
    for _attempt in range(64):
        save_file(tensors, path, marks)
        if path.read_bytes() != ours:
            break
    else:
        pytest.skip("this stock writer keeps the order")
    result = run(place)
    assert result.same
    assert result.reordered == [VECTORS]


@pytest.mark.usefixtures("unverified")
def test_a_header_in_another_order_is_the_same(place: Path) -> None:
    raw = (place / "out" / VECTORS).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header["__metadata__"] = dict(reversed(header["__metadata__"].items()))
    for change, same in ((header, True), ({**header, "__metadata__": {"format": "pt", "tool": "x"}}, False)):
        text = json.dumps(change).encode()
        (place / "out" / VECTORS).write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
        result = run(place)
        assert result.same is same
        assert (VECTORS in result.reordered) is same
        assert result.different == ({} if same else {VECTORS: 0.0})


def edit(place: Path, change: Callable[[dict[str, Any]], None]) -> None:
    manifest = json.loads((place / "out" / MANIFEST).read_text())
    change(manifest)
    (place / "out" / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.usefixtures("unverified")
def test_what_differs_is_named(place: Path) -> None:
    """Each file that was tampered with, by how much, and nothing else."""
    out = place / "out"
    shard = sorted(out.glob("model-*.safetensors"))[-1]
    tensors = load_file(shard)
    name = next(name for name in tensors if name.endswith("down_proj.bias") and tensors[name].any())
    save_file({**tensors, name: tensors[name] + 0.25}, shard, {"format": "pt"})
    (out / "extra.txt").write_text("mine")
    (out / "generation_config.json").unlink()
    (out / "README.md").write_text("another card")
    edit(place, lambda m: (m["edits"][0].update(norm=1.0), m["route"].update(reason="otherwise said"))[0])
    result = run(place)
    assert not result.same
    assert result.different == {shard.name: pytest.approx(0.25, abs=1e-6)}
    assert result.missing == ["extra.txt"]
    assert result.unexpected == ["generation_config.json"]
    assert result.manifest == ["edits"]


@pytest.mark.usefixtures("unverified")
def test_another_recipe_gives_another_vector(place: Path) -> None:
    edit(place, lambda m: m["recipe"]["resolved"]["vectors"][0].update(coefficient=0.5))
    result = run(place)
    assert VECTORS in result.different
    assert "edits" in result.manifest
    apart = result.different[VECTORS]
    assert apart is not None and apart > 0.01


@pytest.mark.usefixtures("unverified")
def test_other_pairs_give_another_vector(place: Path) -> None:
    text = (place / "pairs.jsonl").read_text()
    (place / "pairs.jsonl").write_text(text.replace("love", "see"))
    assert VECTORS in run(place).different


@pytest.mark.usefixtures("unverified")
def test_nothing_is_published(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edit(place, lambda m: m["recipe"]["resolved"].update(push={"repo": "me/out"}))
    monkeypatch.setattr("patcher.build.local.push", lambda *_args: pytest.fail("published"))
    assert run(place).same


@pytest.mark.usefixtures("unverified")
def test_another_version_is_said(place: Path) -> None:
    edit(place, lambda m: m.update(tool_version="0.0.1"))
    result = run(place)
    assert result.same
    assert "0.0.1" in result.notes[0]


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        (lambda m: m.pop("recipe"), {}, "no recipe"),
        (lambda m: m["recipe"].update(resolved={"model": 3}), {}, "not one that this version reads"),
        (lambda m: None, {"inputs": Path("/nowhere")}, "--inputs"),
        (lambda m: None, {"base": "./nowhere"}, "no such model folder"),
        (lambda m: m["base"].update(path="/nowhere"), {"base": None}, "--base PATH"),
        (lambda m: m["base"]["files"][0].update(sha256="0" * 64), {}, "not the base"),
        (lambda m: m["base"].update(adapter={"name": "a", "given": "/nowhere", "sha256": "0"}), {}, "--adapter"),
    ],
)
def test_what_cannot_be_built_again(
    place: Path, change: Callable[[dict[str, Any]], None], options: dict[str, Any], words: str
) -> None:
    edit(place, change)
    with pytest.raises(InputError) as caught:
        run(place, **options)
    assert words in str(caught.value)
