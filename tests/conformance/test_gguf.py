"""Patched GGUF files in stock llama.cpp: they load, and are steered as its own control vector steers the source.

It is taken from wherever `patch-model stacks` finds it. The tests make quantised files themselves; where
PATCH_MODEL_LLAMA_QUANTIZE names llama.cpp's own quantiser, its files are tried as well.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from support.gguf_models import BLOCKS, HIDDEN, KINDS, write_model
from support.stack_runs import xllamacpp_python

from patcher.checkpoint.gguf.file import read_gguf
from patcher.checkpoint.gguf.model import read_model
from patcher.gguf.edits import GgufEdit
from patcher.gguf.patch import patch_in_place, write_patched
from patcher.gguf.slots import rows

PYTHON = xllamacpp_python()
QUANTISE = os.environ.get("PATCH_MODEL_LLAMA_QUANTIZE", "")
RUNNER = Path(__file__).parents[1] / "support" / "gguf_logits.py"
IDS = [5, 17, 200, 3, 99, 42, 250, 7, 11, 63]
LAYER = 1
FLOORS = 3
EXACT = 1e-4
# Activations are rounded to the weights' type there, so that a difference in the last bit moves some of them by a step.
ROUNDED = {"F16", "BF16", "Q8_0", "Q4_0", "Q4_K_M", "Q6_K"}
STEPS = 0.15

pytestmark = [
    pytest.mark.stacks,
    pytest.mark.skipif(not PYTHON, reason="there is no xllamacpp: patch-model stacks install llama.cpp"),
]
SLOTS = [name for name in rows()["slots"] if name in KINDS]
RELABELS = list(rows()["relabels"])


def logits(scratch: Path, jobs: list[dict[str, Any]]) -> list[torch.Tensor | str]:
    """Log-probabilities [positions, vocabulary] of each job, or llama.cpp's refusal."""
    path = scratch / "jobs.json"
    path.write_text(json.dumps(jobs), encoding="utf-8")
    done = subprocess.run(
        [PYTHON, str(RUNNER), str(path)], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [
        torch.log_softmax(torch.tensor(result["logits"], dtype=torch.float64), -1)
        if "logits" in result
        else done.stderr
        for result in json.loads(done.stdout.splitlines()[-1])
    ]


def job(model: Path, vectors: Mapping[int, torch.Tensor] | None = None) -> dict[str, Any]:
    told = {str(layer): vector.tolist() for layer, vector in (vectors or {}).items()}
    return {"model": str(model), "ids": IDS, "vectors": told}


def vector(seed: int = 0) -> torch.Tensor:
    return torch.randn(HIDDEN, generator=torch.Generator().manual_seed(seed))


def patched(source: Path, output: Path, vectors: Mapping[int, torch.Tensor]) -> Path:
    edits = [GgufEdit("v", layer, values, 1.0) for layer, values in vectors.items()]
    return write_patched(read_model(source), edits, output, add=False, link=False, force=False).files[0]


def check(
    tmp_path: Path, source: Path, copies: list[Path], vectors: Mapping[int, torch.Tensor], *, exact: bool
) -> None:
    """The copies are steered as the source is by a control vector."""
    generator = torch.Generator().manual_seed(7)
    near = [
        {layer: v * (1 + 1e-6 * torch.randn(HIDDEN, generator=generator)) for layer, v in vectors.items()}
        for _ in range(FLOORS)
    ]
    found = logits(tmp_path, [job(source), job(source, vectors), *(job(source, v) for v in near), *map(job, copies)])
    assert not any(isinstance(result, str) for result in found), found
    base, wanted, *others = [result for result in found if isinstance(result, torch.Tensor)]
    effect = float((wanted - base).abs().max())
    floor = max(float((result - wanted).abs().max()) for result in others[:FLOORS])
    assert effect > 0.2
    for result in others[FLOORS:]:
        difference = (result - wanted).abs().amax(dim=-1)
        if exact:
            assert float(difference.max()) < max(EXACT, 5 * floor)
        else:
            # Where no activation was near a step, the results are equal to the last digits.
            assert float(difference.min()) < EXACT
            assert float(difference.max()) < max(EXACT, 5 * floor, STEPS * effect)
            assert float((result - wanted).norm() / (wanted - base).norm()) < STEPS / 2


@pytest.mark.parametrize("architecture", [*SLOTS, *RELABELS])
def test_every_architecture_is_steered_as_by_a_control_vector(tmp_path: Path, architecture: str) -> None:
    source = tmp_path / "base.gguf"
    write_model(source, architecture)
    # Of nemotron_h, blocks 1 and 3 have a feed-forward part.
    vectors = {1: vector(), (3 if architecture.startswith("nemotron_h") else 2): vector(1)}
    check(tmp_path, source, [patched(source, tmp_path / "steered.gguf", vectors)], vectors, exact=True)


@pytest.mark.parametrize("quantisation", sorted(ROUNDED))
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "phi3", "gpt2", "granite", "gpt-oss"])
def test_every_quantisation_is_steered_as_by_a_control_vector(
    tmp_path: Path, architecture: str, quantisation: str
) -> None:
    source = tmp_path / "base.gguf"
    write_model(source, architecture, quantisation)
    vectors = {LAYER: vector()}
    check(tmp_path, source, [patched(source, tmp_path / "steered.gguf", vectors)], vectors, exact=False)


@pytest.mark.skipif(not QUANTISE, reason="PATCH_MODEL_LLAMA_QUANTIZE names no llama-quantize")
@pytest.mark.parametrize("quantisation", [*sorted(ROUNDED), "IQ4_XS"])
def test_files_of_llama_quantize(tmp_path: Path, quantisation: str) -> None:
    for architecture in ("llama", "qwen2"):
        write_model(tmp_path / "plain.gguf", architecture)
        source = tmp_path / f"{architecture}.gguf"
        subprocess.run(
            [QUANTISE, str(tmp_path / "plain.gguf"), str(source), quantisation, "1"], check=True, capture_output=True
        )
        vectors = {LAYER: vector()}
        copy = patched(source, tmp_path / f"{architecture}-steered.gguf", vectors)
        check(tmp_path, source, [copy], vectors, exact=False)


@pytest.mark.parametrize("architecture", ["llama", "phi3"])
def test_block_0_which_no_control_vector_reaches(tmp_path: Path, architecture: str) -> None:
    """With an idle block in front, block 0 is block 1, which one does reach."""
    source, longer = tmp_path / "base.gguf", tmp_path / "longer.gguf"
    write_model(source, architecture)
    write_model(longer, architecture, idle_first=True)
    copy = patched(source, tmp_path / "steered.gguf", {0: vector()})
    base, same, wanted, found = logits(tmp_path, [job(source), job(longer), job(longer, {1: vector()}), job(copy)])
    assert float((same - base).abs().max()) < EXACT
    assert float((wanted - base).abs().max()) > 0.2
    assert float((found - wanted).abs().max()) < EXACT


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_split_models(tmp_path: Path, architecture: str) -> None:
    from support.gguf_splits import split

    source = tmp_path / "base.gguf"
    write_model(source, architecture)
    first = split(source, 3)
    vectors = {LAYER: vector()}
    copies = [patched(first, tmp_path / "steered.gguf", vectors)]
    check(tmp_path, source, copies, vectors, exact=True)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_in_place(tmp_path: Path, architecture: str) -> None:
    from patcher.errors import OutsideError

    source, copy = tmp_path / "base.gguf", tmp_path / "copy.gguf"
    for path in (source, copy):
        write_model(path, architecture, "Q8_0")
    try:
        patch_in_place(read_model(copy), [GgufEdit("v", LAYER, vector(), 1.0)], add=False)
    except OutsideError as error:
        pytest.skip(str(error))
    check(tmp_path, source, [copy], {LAYER: vector()}, exact=False)


@pytest.mark.parametrize("wrong", ["dropped", "negated", "halved", "next block"])
def test_the_comparison_has_teeth(tmp_path: Path, wrong: str) -> None:
    source = tmp_path / "base.gguf"
    write_model(source, "llama", "Q8_0")
    mistaken = {
        "dropped": {LAYER: 1e-6 * vector()},
        "negated": {LAYER: -vector()},
        "halved": {LAYER: vector() / 2},
        "next block": {LAYER + 1: vector()},
    }[wrong]
    copy = patched(source, tmp_path / "steered.gguf", mistaken)
    with pytest.raises(AssertionError):
        check(tmp_path, source, [copy], {LAYER: vector()}, exact=False)


@pytest.mark.parametrize("architecture", ["arcee", "llada"])
def test_what_is_refused_would_not_work(tmp_path: Path, architecture: str) -> None:
    """llama.cpp refuses the tensor, or ignores it, where patch-model refuses to write it."""
    from patcher.checkpoint.gguf.writer import NewGgufFile, NewGgufTensor, kept_entry, kept_tensor
    from patcher.checkpoint.pieces import Bytes

    source, forced = tmp_path / "base.gguf", tmp_path / "forced.gguf"
    write_model(source, architecture)
    file = read_gguf(source)
    bias = NewGgufTensor(f"blk.{LAYER}.ffn_down.bias", (HIDDEN,), 0, Bytes(vector().numpy().tobytes()))
    with forced.open("xb") as target:
        entries = [kept_entry(entry, file) for entry in file.entries.values()]
        NewGgufFile(3, 32, entries, [*map(kept_tensor, file.tensors.values()), bias]).write(target)
    base, found = logits(tmp_path, [job(source), job(forced)])
    assert isinstance(base, torch.Tensor)
    assert isinstance(found, str) if architecture == "arcee" else torch.equal(base, found)
    assert BLOCKS > LAYER
