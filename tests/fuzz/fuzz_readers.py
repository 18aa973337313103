"""Every reader of files that come from elsewhere, with its stock counterpart where there is one."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import fuzz_seeds as seeds
import torch
from fuzz_loop import Case, Reader
from fuzz_stock import same_as_gguf, same_as_safetensors, same_numbers, same_pairs, same_yaml
from safetensors.torch import load_file, save
from tiny_models import CONFIGS

from patcher.checkpoint.adapter import require_adapter
from patcher.checkpoint.bin_files import convert_bin, load_bin
from patcher.checkpoint.difference import compare
from patcher.checkpoint.folder import CheckpointFolder
from patcher.checkpoint.gguf.in_place import finish_interrupted
from patcher.checkpoint.gguf.model import GgufModel, read_model
from patcher.checkpoint.gguf.values import read_floats, read_values
from patcher.checkpoint.hashes import base_files
from patcher.checkpoint.prepare import read_config
from patcher.checkpoint.safetensors_file import DTYPES, TensorInfo, read_header, read_tensor
from patcher.checkpoint.sizes import fp32_bytes, largest_part
from patcher.checkpoint.writer import write_copy
from patcher.evaluate.of_build import read_passages
from patcher.export import export_folder
from patcher.pairs import load_pairs
from patcher.pairs.questions import load_questions
from patcher.publish.contents import check_verified, published_files
from patcher.publish.contents import read_manifest as read_published_manifest
from patcher.recipe_file import load_recipe
from patcher.routes.fitting.calibration import load_calibration
from patcher.routes.gguf import provenance
from patcher.routes.gguf.edits import GgufEdit, edits_of_folder
from patcher.routes.gguf.patch import write_patched
from patcher.unpatch import unpatch
from patcher.vectors import load_vector_file
from patcher.vectors.peft_files import read_adapter
from patcher.verify.later import verify_folder_in
from patcher.verify.stored import read_manifest, read_stored

_RELEASED = ("meta-llama--Llama-3.2-1B", "openai-community--gpt2", "google--gemma-3-4b-it", "openai--gpt-oss-20b")
READERS: dict[str, Reader] = {}
"""By name. A new one is a function with a decorator."""


def reader(
    name: str,
    seeds: Callable[[], list[Case]],
    same: Callable[[Path, Any], None] = lambda _folder, _result: None,
    cost: int = 1,
) -> Callable[[Callable[[Path, Path], Any]], Callable[[Path, Path], Any]]:
    def register(read: Callable[[Path, Path], Any]) -> Callable[[Path, Path], Any]:
        READERS[name] = Reader(name, seeds, read, same, cost)
        return read

    return register


def _one(name: str, *contents: Callable[[], bytes] | bytes) -> Callable[[], list[Case]]:
    return lambda: [{name: content if isinstance(content, bytes) else content()} for content in contents]


@reader(
    "safetensors",
    _one("x.safetensors", seeds.safetensors_file),
    lambda at, got: same_as_safetensors(at / "x.safetensors", got),
)
def _safetensors(folder: Path, _out: Path) -> dict[str, TensorInfo]:
    found = read_header(folder / "x.safetensors")
    for info in found.values():
        if info.dtype in DTYPES:
            read_tensor(info)
    return found


def _same_checkpoint(folder: Path, found: CheckpointFolder) -> None:
    stated = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert same_numbers(found.config, stated)
    for name in found.weight_files:
        own = {key: info for key, info in found.tensors.items() if info.file.name == name}
        same_as_safetensors(folder / name, own)


@reader("checkpoint folder", seeds.checkpoints, _same_checkpoint)
def _checkpoint(folder: Path, out: Path) -> CheckpointFolder:
    found = CheckpointFolder(folder)
    assert found.tensors is not None
    base_files(found)
    fp32_bytes(found)
    largest_part(found)
    if all(info.dtype in DTYPES for info in found.tensors.values()):
        write_copy(found, out, created={"new.bias": torch.ones(2)}, replaced={}, config_changes={"a": 1})
        copied = CheckpointFolder(out)
        assert set(copied.tensors) == {*found.tensors, "new.bias"}
    return found


@reader("bin checkpoint", seeds.bin_checkpoints)
def _bin(folder: Path, out: Path) -> Any:
    found = CheckpointFolder(folder)
    for name in found.weight_files:
        load_bin(folder / name)
    return convert_bin(found, out / "converted").tensors


def _ggufs() -> list[Case]:
    return [{"model.gguf": content} for content in (seeds.gguf_file(), seeds.gguf_file("qwen2"), seeds.patched_gguf())]


@reader("gguf", _ggufs, lambda at, got: same_as_gguf(at / "model.gguf", got))
def _gguf(folder: Path, _out: Path) -> GgufModel:
    model = read_model(folder / "model.gguf")
    for key, entry in model.first.entries.items():
        if entry.type != 8 and not isinstance(entry.scalar, str):
            read_values(model.first, key)
    for tensor in model.tensors.values():
        if tensor.type == 0:
            read_floats(tensor)
    provenance.read_edits(model.first)
    return model


@reader("gguf patch", _ggufs, cost=5)
def _gguf_patch(folder: Path, out: Path) -> Any:
    edit = GgufEdit("love", seeds.LAYER, seeds.tensor(seeds.GGUF_HIDDEN), 1.0)
    target = out / "out.gguf"
    write_patched(read_model(folder / "model.gguf"), [edit], target, add=True, link=False, force=False)
    return read_model(target)


def _journals() -> list[Case]:
    words = {"size": 8, "insert": 0, "writes": [[0, 4], [6, 2]]}
    return [{"head.json": json.dumps(words).encode(), "payload": b"abcdef", "m.gguf": b"GGUF1234"}]


@reader(
    "recipe",
    lambda: [{"recipe.yaml": seeds.RECIPE.encode()}, *_json_recipe()],
    lambda at, got: same_yaml(at / "recipe.yaml", got),
)
def _recipe(folder: Path, _out: Path) -> Any:
    return load_recipe(folder / "recipe.yaml")[0]


def _json_recipe() -> list[Case]:
    import yaml

    return [{"recipe.yaml": json.dumps(yaml.safe_load(seeds.RECIPE)).encode()}]


def _rows(suffix: str) -> list[Case]:
    text: list[str] = []
    for rows in (seeds.PAIRS, seeds.QUESTIONS):
        if suffix == "json":
            text += [json.dumps(rows, indent=1), json.dumps({"pairs": rows})]
        elif suffix == "jsonl":
            text.append("\n".join(map(json.dumps, rows)))
        else:
            keys = list(dict.fromkeys(key for row in rows for key in row))
            lines = [",".join(keys)]
            lines += [",".join('"' + row.get(key, "").replace('"', '""') + '"' for key in keys) for row in rows]
            text.append("\r\n".join(lines))
    return [{f"pairs.{suffix}": content.encode()} for content in text]


def _add_pairs(suffix: str) -> None:
    @reader(f"pairs {suffix}", lambda: _rows(suffix), lambda at, got: same_pairs(at / f"pairs.{suffix}", got))
    def read(folder: Path, _out: Path) -> Any:
        return load_pairs(f"pairs.{suffix}", base_folder=folder, where="recipe.yaml: vectors.0.pairs")


for _suffix in ("json", "jsonl", "csv"):
    _add_pairs(_suffix)


def _question_files() -> list[Case]:
    texts = ["What is it?", {"question": "Why?"}, {"prompt": "How?"}]
    return [
        {"questions.json": json.dumps({"questions": texts}).encode()},
        {"questions.json": json.dumps(texts).encode()},
        {"questions.jsonl": "\n".join(map(json.dumps, texts)).encode()},
        {"questions.txt": b"What?\n\nWhy?\n"},
        {"questions.csv": b"question\nWhat?\n"},
    ]


@reader("questions", _question_files)
def _questions(folder: Path, _out: Path) -> Any:
    name = next(item.name for item in folder.iterdir())
    return load_questions(name, base_folder=folder, where="recipe.yaml: vectors.0.questions")


def _text_files() -> list[Case]:
    return [{"texts.txt": b"One passage.\n\nAnother\none."}, {"texts.jsonl": b'{"text": "One."}\n{"text": "Two."}\n'}]


@reader("passages", _text_files)
def _passages(folder: Path, _out: Path) -> Any:
    name = next(item.name for item in folder.iterdir())
    return load_calibration(name, folder), read_passages(folder, name, "evaluate.on_topic")


def _patched() -> list[Case]:
    return list(seeds.patched_folders())


@reader("steering.json: stored", _patched)
def _stored(folder: Path, _out: Path) -> Any:
    manifest = read_manifest(folder)
    return read_stored(folder, manifest), consumed(manifest)


def consumed(manifest: Mapping[str, Any]) -> list[Any]:
    """What the runs of stock software take from a manifest."""
    route = manifest["route"]
    written = [str(tensor["parameter"]) for tensor in route["tensors"]]
    written += [str(name) for name in (*route.get("zeros", {}).get("names", []), *route.get("derived", {}))]
    fit = None if route["exact"] else float((route.get("fit") or {}).get("error_mean", "inf"))
    return [written, str(route["architecture"]), str(route["blocks"]), route.get("residual"), fit]


@reader("steering.json: verify", _patched)
def _verify(folder: Path, _out: Path) -> Any:
    def only_read(_stacks: Any, folder: Path, base: Path, manifest: Any, options: Any, **_rest: Any) -> list[Any]:
        return [read_stored(folder, manifest), consumed(manifest), list(options.probes or ())]

    import patcher.verify.later as later

    former, later.verify_in_stacks = later.verify_in_stacks, only_read  # type: ignore[assignment]
    try:
        return verify_folder_in(folder, ["transformers"], base=str(folder / "base"))
    finally:
        later.verify_in_stacks = former


@reader("steering.json: publish", _patched)
def _publish(folder: Path, _out: Path) -> Any:
    manifest = read_published_manifest(folder)
    check_verified(manifest, folder)
    return [file.read() for file in published_files(folder, manifest)]


@reader("steering.json: export", _patched)
def _export(folder: Path, out: Path) -> Any:
    done = export_folder(folder, "vector", out / "v.safetensors")
    json.dumps(done.as_json())
    return load_file(done.output)


@reader("steering.json: control vector", _patched, cost=4)
def _export_gguf(folder: Path, out: Path) -> Any:
    return export_folder(folder, "control-vector", out / "v.gguf")


@reader("steering.json: gguf", _patched)
def _edits(folder: Path, _out: Path) -> Any:
    edits = edits_of_folder(folder, seeds.HIDDEN, seeds.BLOCKS)
    return [edit.as_json() for edit in edits]


def _vector(folder: Path, name: str) -> torch.Tensor:
    return load_vector_file(folder / name, layer=1, hidden=8)


def _add_vectors(suffix: str, *contents: Callable[[], bytes] | bytes) -> None:
    @reader(f"vector .{suffix}", _one(f"v.{suffix}", *contents))
    def read(folder: Path, _out: Path) -> Any:
        return _vector(folder, f"v.{suffix}")


_BY_LAYER = {"layer.1": seeds.tensor(8), "layer.2": seeds.tensor(1, 8)}
_add_vectors("safetensors", save(_BY_LAYER, {"format": "pt"}), save({"x": seeds.tensor(3, 8).half()}))
_add_vectors(
    "pt",
    seeds.torch_file(_BY_LAYER),
    seeds.torch_file(seeds.tensor(8)),
    seeds.torch_file({1: seeds.tensor(8)}, _use_new_zipfile_serialization=False),
)
_add_vectors("gguf", lambda: seeds.gguf_file("controlvector", vectors=True))


def _adapters() -> list[Case]:
    stem = "base_model.model.model.layers.1.mlp.down_proj"
    tensors = {f"{stem}.lora_A.weight": torch.zeros(1, 4), f"{stem}.lora_B.weight": torch.zeros(8, 1)}
    tensors[f"{stem}.lora_B.bias"] = seeds.tensor(8)
    config = {
        "peft_type": "LORA",
        "r": 1,
        "lora_alpha": 2.0,
        "lora_bias": True,
        "target_modules": [stem],
        "bias": "none",
    }
    gains = json.dumps({"1": f"{stem}.lora_B.bias"})
    files = [save(tensors, {"format": "pt", "residual_gains": gains}), save(tensors, {"format": "pt"})]
    beft = save({f"{stem}.beft_bias": seeds.tensor(8)}, {"format": "pt"})
    lora = [{"adapter_config.json": json.dumps(config).encode(), "adapter_model.safetensors": file} for file in files]
    return [*lora, {"adapter_config.json": b'{"peft_type": "BEFT"}', "adapter_model.safetensors": beft}]


@reader("adapter", _adapters)
def _adapter(folder: Path, _out: Path) -> Any:
    require_adapter(folder, "adapter")
    found = read_adapter(folder)
    return found, load_vector_file(folder, layer=1, hidden=8, tensor=next(iter(found)))


def _content(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""


@reader("gguf journal", _journals)
def _journal(folder: Path, out: Path) -> Any:
    target = out / "m.gguf"
    head, payload, content = (_content(folder / name) for name in ("head.json", "payload", "m.gguf"))
    target.write_bytes(content)
    # The sum is made to hold, or nothing behind it would be reached.
    with contextlib.suppress(ValueError, RecursionError, TypeError):
        head = json.dumps({**json.loads(head), "sha256": hashlib.sha256(payload).hexdigest()}).encode()
    (out / ".m.gguf.steering-journal").write_bytes(head + b"\n" + payload)
    return finish_interrupted(target)


def _configs() -> list[Case]:
    return [{"config.json": (CONFIGS / f"{name}.json").read_bytes()} for name in _RELEASED]


@reader("config.json", _configs, cost=10)
def _config(folder: Path, _out: Path) -> Any:
    return read_config(folder)


@reader("steering.json: unpatch", lambda: list(seeds.whole_folders()), cost=4)
def _unpatch(folder: Path, out: Path) -> Any:
    done = unpatch(folder, out / "base", say=lambda _line: None)
    json.dumps(done.as_json())
    return done


def _two() -> list[Case]:
    one, other = seeds.checkpoints()
    return [{**{f"b/{name}": one[name] for name in one}, **{f"a/{name}": other[name] for name in other}}]


@reader("diff", _two)
def _diff(folder: Path, _out: Path) -> Any:
    found = compare(
        CheckpointFolder(folder / "a"), CheckpointFolder(folder / "b"), {"model.norm.weight": "lm_head.weight"}
    )
    return json.dumps(found.as_json())
