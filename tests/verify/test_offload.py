"""Verification where base and copy do not fit in memory: it still passes what is right and fails what is wrong."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.quantised_models import quantise
from support.tiny_models import default_checkpoint, tiny_checkpoint
from support.unverified import PROBES, patch

from patcher.architectures.model_class import quiet_transformers
from patcher.checkpoint.folder import CheckpointFolder
from patcher.checkpoint.sizes import fp32_bytes
from patcher.errors import OutsideError
from patcher.patched.schema import Patch
from patcher.recipe.schema import VerifySpec
from patcher.verify import offload, transformers_stack
from patcher.verify.comparison import Run
from patcher.verify.offload import RUNNER_BYTES, disk_is_full, memory_is_full, plan_offload
from patcher.verify.terms import VerifyTerms
from patcher.verify.transformers_stack import verify_in_transformers

LLAMA, GPT_OSS, MOE = "meta-llama--Llama-3.2-1B", "openai--gpt-oss-20b", "qwen2_moe"


def as_bin(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def make(folder: Path, kind: str) -> int:
    """A tiny bf16 checkpoint; the layer to steer."""
    if kind == MOE:
        return default_checkpoint(folder, kind, dtype=torch.bfloat16, trained_scale=True)
    plain = {"quantization_config": None} if kind == "mxfp4" else {}
    layer = tiny_checkpoint(folder, GPT_OSS if kind == "mxfp4" else LLAMA, dtype=torch.bfloat16, **plain)
    if kind in ("fp8", "mxfp4"):
        quantise(folder, kind)
    if kind == "bin":
        as_bin(folder)
    return layer


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, int]]:
    """``bases(kind)``: a tiny checkpoint and the layer to steer, made once."""
    made: dict[str, tuple[Path, int]] = {}

    def get(kind: str) -> tuple[Path, int]:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind) / "base"
            made[kind] = folder, make(folder, kind)
        return made[kind]

    return get


@pytest.fixture
def spread(monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict[str, Any], int]]:
    """Verifications think that nearly no memory is left; every run's job, and the bytes that it wrote for itself."""
    monkeypatch.setattr(transformers_stack, "available_memory", lambda: 200_000)
    runs: list[tuple[dict[str, Any], int]] = []
    remove = shutil.rmtree

    def watched(folder: Any, **options: Any) -> None:
        if Path(folder).name == "offload":
            runs[-1] = runs[-1][0], written(Path(folder))
        remove(folder, **options)

    honest = transformers_stack._run

    def run(job: Any, place: Path) -> Any:
        runs.append((job, 0))
        return honest(job, place)

    monkeypatch.setattr(transformers_stack.shutil, "rmtree", watched)
    monkeypatch.setattr(transformers_stack, "_run", run)
    return runs


def written(folder: Path) -> int:
    return sum(item.stat().st_size for item in folder.rglob("*") if item.is_file())


def failed(entry: dict[str, Any]) -> set[str]:
    return {check["name"] for check in entry["checks"] if check["passed"] is False}


of = Patch.model_validate
TERMS = VerifyTerms(VerifySpec(probes=list(PROBES)))


def move(folder: Path, manifest: dict[str, Any], layer: int) -> dict[str, Any]:
    """Put the vector after the next block, in the weights and in the manifest: only the computation can tell."""
    file = folder / "model-00002-of-00002.safetensors"
    bias = "model.layers.{}.mlp.down_proj.bias".format
    tensors = load_file(file)
    tensors[bias(layer)], tensors[bias(layer + 1)] = tensors[bias(layer + 1)], tensors[bias(layer)]
    save_file(tensors, file, {"format": "pt"})
    return json.loads(json.dumps(manifest).replace(bias(layer), bias(layer + 1)))


@pytest.mark.slow
def test_a_right_copy_passes_and_a_wrong_one_fails(
    bases: Any, spread: list[tuple[dict[str, Any], int]], tmp_path: Path
) -> None:
    base, layer = bases("dense")
    manifest = patch(base, tmp_path / "out", layer)
    entry = verify_in_transformers(tmp_path / "out", base, of(manifest), TERMS)
    assert entry["passed"], entry["checks"]
    assert entry["steering_effect"] > 1000 * entry["max_abs_logprob_diff"]
    made = {check["name"] for check in entry["checks"] if check["passed"] is True}
    assert {"log-probabilities", "residual stream", "greedy decoding with a cache", "own dtype (bfloat16)"} <= made
    # bf16 weights are read from the checkpoint and widened then; no copy of them is written.
    assert [(job["offload"] is not None, size) for job, size in spread] == [(True, 0)] * 2

    moved = move(tmp_path / "out", manifest, layer)
    entry = verify_in_transformers(tmp_path / "out", base, of(moved), TERMS)
    assert entry["status"] == "failed" and len(spread) == 4
    assert {"log-probabilities", "residual stream"} <= failed(entry)
    assert entry["max_abs_logprob_diff"] > 100 * entry["tolerance"]


SIX = (*PROBES, "The bread is warm", "Nobody came to the door", "Two and two", "It rained all night on the roof")


@pytest.mark.slow
@pytest.mark.parametrize(("probes", "share"), [(PROBES[:1], 0.5), (SIX, 0.5), (SIX, 5e-4)])
def test_each_weight_is_read_at_most_twice(
    bases: Any,
    spread: list[tuple[dict[str, Any], int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    probes: tuple[str, ...],
    share: float,
) -> None:
    """By the files' own account, whatever the number of probes, and where the effect is so small that it is probed."""
    base, layer = bases("dense")
    manifest = patch(base, tmp_path / "out", layer, share=share)
    monkeypatch.setenv("READS", str(tmp_path / "reads"))
    monkeypatch.setenv("STOCK_RUN", str(transformers_stack.RUNNER))
    monkeypatch.setattr(transformers_stack, "RUNNER", Path(__file__).parents[1] / "support" / "counted_run.py")
    entry = verify_in_transformers(tmp_path / "out", base, of(manifest), VerifyTerms(VerifySpec(probes=list(probes))))
    assert entry["passed"], entry["checks"]
    amplified = [check["note"] for check in entry["checks"] if check["name"] == "share of the effect"]
    assert bool(amplified[0]) is (share < 0.01)
    made = {check["name"] for check in entry["checks"] if check["passed"] is True}
    assert {"own dtype (bfloat16)", "greedy decoding with a cache", "left padding", "without the vector"} <= made
    reads = Counter(tuple(line.split("\t")) for line in (tmp_path / "reads").read_text().splitlines())
    for folder in (base, tmp_path / "out"):
        counts = {name: count for (file, name), count in reads.items() if Path(file).parent == folder}
        assert counts.keys() == CheckpointFolder(folder).tensors.keys()
        assert max(counts.values()) <= 2, counts


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bin", MOE])
def test_what_must_be_written_is_written_and_removed(
    bases: Any, spread: list[tuple[dict[str, Any], int]], tmp_path: Path, kind: str
) -> None:
    base, layer = bases(kind)
    manifest = patch(base, tmp_path / "out", layer)
    (tmp_path / "scratch").mkdir()
    entry = verify_in_transformers(tmp_path / "out", base, of(manifest), replace(TERMS, scratch=tmp_path / "scratch"))
    assert entry["passed"], entry["checks"]
    assert entry["steering_effect"] > 1000 * entry["max_abs_logprob_diff"]
    (reference, _), (_, size) = spread
    assert (reference["folder"] == str(base)) is (kind != "bin")
    assert (size > 0) is (kind == MOE)
    assert not list((tmp_path / "scratch").iterdir())


@pytest.mark.parametrize("memory", [0, 400_000, 1_500_000])
@pytest.mark.parametrize("kind", ["dense", MOE, "fp8", "mxfp4"])
def test_no_more_is_written_than_was_reckoned_with(bases: Any, tmp_path: Path, kind: str, memory: int) -> None:
    base, _ = bases(kind)
    undo = {"fp8": "FineGrainedFP8Config", "mxfp4": "Mxfp4Config"}.get(kind)
    options = {} if undo is None else {"quantization_config": getattr(transformers, undo)(dequantize=True)}
    with quiet_transformers():
        model = transformers.AutoModelForCausalLM.from_pretrained(
            base,
            dtype=torch.float32,
            device_map="auto",
            offload_folder=str(tmp_path / "offload"),
            max_memory={"cpu": memory},
            **options,
        )
    checkpoint = CheckpointFolder(base)
    reckoned = min(offload.rewritten_bytes(checkpoint), offload._beyond(checkpoint, memory))
    headers = 500 * len(list(model.parameters()))
    assert written(tmp_path / "offload") <= reckoned + headers
    if kind != "dense" and memory == 0:
        assert written(tmp_path / "offload") > 0.5 * reckoned > 0
    if kind == "dense":
        assert reckoned == 0


def planned(base: Path, scratch: Path, memory: int, address_space: int | None = None) -> Any:
    return plan_offload(base, base, scratch, memory=memory, address_space=address_space)


def test_what_fits_is_not_spread(bases: Any, tmp_path: Path) -> None:
    base, _ = bases("dense")
    needed = fp32_bytes(CheckpointFolder(base))
    enough = int((needed + RUNNER_BYTES) / offload.FOR_WEIGHTS) + 2
    assert planned(base, tmp_path, enough) is None
    plan = planned(base, tmp_path, enough - 10)
    assert plan.base == base and 0 < plan.memory < needed
    assert planned(base, tmp_path, enough, address_space=4 * enough) is None
    # The files themselves are mapped beside the weights.
    assert planned(base, tmp_path, enough, address_space=enough) is not None


def test_a_disk_without_room_is_said_before_anything_runs(
    bases: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, layer = bases(MOE)
    manifest = patch(base, tmp_path / "out", layer)
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(offload.shutil, "disk_usage", lambda _path: usage)
    monkeypatch.setattr(transformers_stack, "available_memory", lambda: 200_000)
    monkeypatch.setattr(transformers_stack, "_run", lambda *_: pytest.fail("it ran"))
    with pytest.raises(OutsideError, match="the disk has no room") as caught:
        verify_in_transformers(tmp_path / "out", base, of(manifest), TERMS)
    assert caught.value.code == "disk" and "0.0 GB free" in str(caught.value)


def test_bitsandbytes_cannot_be_spread(bases: Any, tmp_path: Path) -> None:
    base, _ = bases("dense")
    copy = Path(shutil.copytree(base, tmp_path / "base"))
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(OutsideError, match="cannot be spread") as caught:
        planned(copy, tmp_path, 200_000)
    assert caught.value.code == "memory"


@pytest.mark.parametrize(
    ("code", "stderr", "memory", "disk"),
    [
        (-9, "", True, False),
        (
            1,
            "RuntimeError: [enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory",
            True,
            False,
        ),
        (1, "RuntimeError: unable to mmap 87143976 bytes from file <x>: Cannot allocate memory (12)", True, False),
        (1, "MemoryError", True, False),
        (1, "SafetensorError: I/O error: No space left on device (os error 28)", False, True),
        (1, "OSError: [Errno 122] Disk quota exceeded", False, True),
        (1, "KeyError: 'lm_head.weight'", False, False),
    ],
)
def test_why_a_run_died(code: int, stderr: str, memory: bool, disk: bool) -> None:
    assert memory_is_full(code, stderr) is memory
    assert disk_is_full(stderr) is disk


@pytest.mark.parametrize(("words", "code"), [("No space left on device", "disk"), ("can't allocate memory", "memory")])
def test_a_candidate_that_dies_of_the_machine_is_not_a_failed_check(
    bases: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str, code: str
) -> None:
    base, layer = bases("dense")
    manifest = patch(base, tmp_path / "out", layer)
    honest = transformers_stack._run

    def run(job: Any, place: Path) -> Any:
        return Run({}, {"amplify": 1.0}) if job["role"] == "reference" else honest(job, place)

    dead = subprocess.CompletedProcess([], 1, "", f"Traceback\nOSError: {words}\n")
    monkeypatch.setattr(transformers_stack, "_run", run)
    monkeypatch.setattr(transformers_stack, "run_watched", lambda *_: dead)
    with pytest.raises(OutsideError) as caught:
        verify_in_transformers(tmp_path / "out", base, of(manifest), TERMS)
    assert caught.value.code == code
