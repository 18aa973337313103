"""The check is itself checked: a folder that is broken in any of these ways must fail, for the right reason."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from support.verified import verify_folder

from patcher.build.result import BuildResult
from patcher.errors import InputError


def failed(entry: dict[str, Any]) -> set[str]:
    return {check["name"] for check in entry["checks"] if check["passed"] is False}


def steering_shard(folder: Path) -> Path:
    return folder / "model-00002-of-00002.safetensors"


def edit_vector(folder: Path, change: Callable[[Any], Any]) -> None:
    tensors = load_file(steering_shard(folder))
    for name, tensor in tensors.items():
        if tensor.abs().sum() > 0:
            tensors[name] = change(tensor).contiguous()
    save_file(tensors, steering_shard(folder), {"format": "pt"})


def edit_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def move_to_next_layer(folder: Path) -> None:
    tensors = load_file(steering_shard(folder))
    name = next(name for name, tensor in tensors.items() if tensor.abs().sum() > 0)
    number = int(name.split(".")[2])
    other = name.replace(f".{number}.", f".{number + 1}.")
    tensors[name], tensors[other] = tensors[other].float(), tensors[name]
    save_file(tensors, steering_shard(folder), {"format": "pt"})


def move_in_manifest_as_well(folder: Path) -> None:
    """The manifest follows the tensor, so that only the computation can tell."""
    move_to_next_layer(folder)

    def follow(manifest: dict[str, Any]) -> None:
        for tensor in manifest["route"]["tensors"]:
            tensor["name"] = tensor["name"].replace(f".{tensor['layer']}.", f".{tensor['layer'] + 1}.")
            tensor["parameter"] = tensor["name"]

    edit_json(folder / "steering.json", follow)


def change_tokenizer(folder: Path) -> None:
    def swap(tokenizer: dict[str, Any]) -> None:
        vocabulary = tokenizer["model"]["vocab"]
        vocabulary["e"], vocabulary["t"] = vocabulary["t"], vocabulary["e"]

    edit_json(folder / "tokenizer.json", swap)


def forget_the_flag(folder: Path) -> None:
    edit_json(folder / "config.json", lambda config: config.pop("mlp_bias"))


def put_the_base_beside_the_index(folder: Path, base: Path) -> None:
    shutil.copyfile(base / "model.safetensors", folder / "model.safetensors")


def drop_a_zero(folder: Path) -> None:
    """vLLM would compute not-a-number from a bias that the flag demands and the file lacks."""
    tensors = load_file(steering_shard(folder))
    name = next(name for name, tensor in tensors.items() if tensor.abs().sum() == 0)
    del tensors[name]
    save_file(tensors, steering_shard(folder), {"format": "pt"})
    edit_json(folder / "model.safetensors.index.json", lambda index: index["weight_map"].pop(name))


def put_not_a_number(folder: Path) -> None:
    edit_vector(folder, lambda tensor: tensor * float("nan"))


MUTATIONS = {
    "vector dropped": (lambda folder, base: edit_vector(folder, lambda v: 0 * v), {"stored vector"}),
    "vector halved": (lambda folder, base: edit_vector(folder, lambda v: v / 2), {"stored vector"}),
    "vector negated": (lambda folder, base: edit_vector(folder, lambda v: -v), {"stored vector"}),
    "at layer k+1": (lambda folder, base: move_to_next_layer(folder), {"stored vector"}),
    "at layer k+1, manifest too": (
        lambda folder, base: move_in_manifest_as_well(folder),
        {"log-probabilities", "residual stream"},
    ),
    "tokenizer changed": (lambda folder, base: change_tokenizer(folder), {"tokenizer"}),
    "flag forgotten": (
        lambda folder, base: forget_the_flag(folder),
        {"loading", "log-probabilities", "residual stream"},
    ),
    "a zero missing": (lambda folder, base: drop_a_zero(folder), {"loading"}),
    "not a number": (lambda folder, base: put_not_a_number(folder), {"stored vector", "finite", "log-probabilities"}),
}


def test_an_untouched_folder_passes(built: tuple[Path, BuildResult]) -> None:
    _, result = built
    entry = verify_folder(result.output)
    assert entry["passed"] and not failed(entry)
    made = {check["name"] for check in entry["checks"] if check["passed"] is True}
    assert {"stored vector", "loading", "tokenizer", "finite", "log-probabilities", "share of the effect"} <= made
    assert {"residual stream", "left padding", "greedy decoding with a cache", "own dtype (bfloat16)"} <= made
    assert entry["steering_effect"] > 100 * entry["max_abs_logprob_diff"]


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_folder_fails(built: tuple[Path, BuildResult], tmp_path: Path, name: str) -> None:
    base, result = built
    folder = tmp_path / "broken"
    shutil.copytree(result.output, folder)
    mutate, expected = MUTATIONS[name]
    mutate(folder, base)
    entry = verify_folder(folder)
    assert entry["passed"] is False
    assert entry["status"] == "failed"
    assert expected <= failed(entry), entry["checks"]


def test_a_single_file_beside_the_index_is_seen(built: tuple[Path, BuildResult], tmp_path: Path) -> None:
    """Transformers reads `model.safetensors` and ignores the index: the silent loss of all steering."""
    base, result = built
    folder = tmp_path / "broken"
    shutil.copytree(result.output, folder)
    put_the_base_beside_the_index(folder, base)
    with pytest.raises(InputError, match="names a tensor that is not in the folder"):
        verify_folder(folder)


def test_another_base_is_refused(built: tuple[Path, BuildResult], tmp_path: Path) -> None:
    base, result = built
    other = tmp_path / "base"
    shutil.copytree(base, other)
    assert verify_folder(result.output, base=str(other))["passed"]
    (other / "config.json").write_text((other / "config.json").read_text() + "\n")
    with pytest.raises(InputError, match="not the base that the folder was made from"):
        verify_folder(result.output, base=str(other))


def test_a_base_that_has_moved_is_asked_for(built: tuple[Path, BuildResult], tmp_path: Path) -> None:
    _, result = built
    folder = tmp_path / "moved"
    shutil.copytree(result.output, folder)
    edit_json(folder / "steering.json", lambda manifest: manifest["base"].update(path="/nowhere/base"))
    with pytest.raises(InputError) as caught:
        verify_folder(folder)
    assert "--base PATH" in str(caught.value)


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"format": 99, "edits": [], "verification": [], "base": {}, "route": {}}']
)
def test_a_manifest_that_is_not_ours_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "steering.json").write_text(content)
    with pytest.raises(InputError):
        verify_folder(tmp_path)


def test_the_checking_process_cannot_import_this_package(tmp_path: Path) -> None:
    import subprocess
    import sys

    from patcher.verify.transformers_stack import RUNNER

    program, main, _ = RUNNER.read_text(encoding="utf-8").partition('if __name__ == "__main__":')
    assert main
    probe = f"{program}import patcher\n"
    script = tmp_path / "probe.py"
    script.write_text(probe, encoding="utf-8")
    finished = subprocess.run([sys.executable, "-I", str(script)], capture_output=True, text=True, check=False)
    assert finished.returncode == 1
    assert "ModuleNotFoundError" in finished.stderr and "patcher" in finished.stderr


@pytest.mark.slow
def test_a_model_that_does_not_fit_in_memory_is_spread_over_the_disk(
    built: tuple[Path, BuildResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    from patcher.verify import transformers_stack

    _, result = built
    monkeypatch.setattr(transformers_stack, "available_memory", lambda: 200_000)
    jobs: list[Any] = []
    honest = transformers_stack._run

    def watched(job: Any, place: Path) -> Any:
        jobs.append(job)
        return honest(job, place)

    monkeypatch.setattr(transformers_stack, "_run", watched)
    entry = verify_folder(result.output)
    assert all(job["offload"] is not None for job in jobs) and len(jobs) == 2
    assert entry["passed"], entry["checks"]
