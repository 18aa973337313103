"""What a verification computes, counted: loads, tokens, processes; never seconds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_models import tiny_checkpoint
from support.unverified import patch

from patcher.patched.schema import Patch
from patcher.verify import transformers_stack
from patcher.verify.comparison import Run
from patcher.verify.probes import PROBE_TOKENS, PROBES
from patcher.verify.terms import VerifyTerms
from patcher.verify.transformers_stack import pick_device, verify_in_transformers

LLAMA = "meta-llama--Llama-3.2-1B"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Patch, int]:
    place = tmp_path_factory.mktemp("counted")
    layer = tiny_checkpoint(place / "base", LLAMA, dtype=torch.bfloat16)
    manifest = patch(place / "base", place / "out", layer, share=5.0)
    return place / "base", place / "out", Patch.model_validate(manifest), layer


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    """Every run whose result is read, in order."""
    found: list[Run] = []
    honest = transformers_stack._read

    def read(path: Path, *asked: float) -> Run:
        found.append(honest(path, *asked))
        return found[-1]

    monkeypatch.setattr(transformers_stack, "_read", read)
    return found


def test_one_process_loads_each_folder_once(
    made: tuple[Path, Path, Patch, int], runs: list[Run], stock_processes: Any
) -> None:
    base, out, manifest, layer = made
    before = stock_processes.forks
    entry = verify_in_transformers(out, base, manifest, VerifyTerms())
    assert entry["passed"], entry["checks"]
    assert stock_processes.forks == before + 1
    reference, candidate = runs
    assert [run.facts["loads"] for run in runs] == [1, 1]
    assert all(run.facts["cast"] for run in runs)
    blocks = json.loads((base / "config.json").read_text())["num_hidden_layers"]
    whole, later = len(PROBES) * PROBE_TOKENS, 1 - layer / blocks
    one, two = PROBE_TOKENS, 2 * PROBE_TOKENS
    # The base whole, the hook from the edited block on, the hook elsewhere on one probe.
    assert reference.facts["counted"] == {"passes": 3, "tokens": pytest.approx(whole + later * whole + one)}
    # The copy and the copy without its vector from that block on, and one probe whole.
    assert candidate.facts["counted"] == {"passes": 3, "tokens": pytest.approx(later * (whole + two) + one)}
    assert candidate.facts["shared"] == layer
    assert "shared start" in {check["name"] for check in entry["checks"] if check["passed"]}


def change(folder: Path, name: str, by: float) -> None:
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors and not file.name.startswith("steering"):
            tensors[name] = tensors[name] + by
            save_file(tensors, file, {"format": "pt"})


def state(folder: Path, key: str, value: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config[key] = value
    (folder / "config.json").write_text(json.dumps(config))


EARLIER: dict[str, tuple[Callable[[Path], None], str]] = {
    "a block before": (lambda out: change(out, "model.layers.0.mlp.up_proj.weight", 0.5), "they differ in"),
    "the embedding": (lambda out: change(out, "model.embed_tokens.weight", 0.5), "they differ in"),
    "a norm before": (lambda out: change(out, "model.layers.0.input_layernorm.weight", 0.5), "they differ in"),
    "rms epsilon": (lambda out: state(out, "rms_norm_eps", 0.5), "configs differ in rms_norm_eps"),
    "rope theta": (lambda out: state(out, "rope_theta", 3.0), "configs differ in rope_parameters"),
}


@pytest.mark.parametrize("name", EARLIER)
def test_what_differs_before_the_edit_is_not_shared_and_fails(
    made: tuple[Path, Path, Patch, int], runs: list[Run], tmp_path: Path, name: str
) -> None:
    base, out, manifest, _ = made
    copy = Path(shutil.copytree(out, tmp_path / "out"))
    mutate, why = EARLIER[name]
    mutate(copy)
    entry = verify_in_transformers(copy, base, manifest, VerifyTerms())
    assert entry["status"] == "failed"
    assert "log-probabilities" in {check["name"] for check in entry["checks"] if check["passed"] is False}
    assert why in runs[1].facts["whole_because"] and "shared" not in runs[1].facts


def test_a_start_that_is_not_the_copys_own_is_seen(made: tuple[Path, Path, Patch, int], runs: list[Run]) -> None:
    """The check of the shared start fails where the whole pass and the one that starts later disagree."""
    from patcher.verify.comparison import _shared_start

    base, out, manifest, _ = made
    verify_in_transformers(out, base, manifest, VerifyTerms())
    candidate = runs[1]
    assert _shared_start(candidate, len(PROBES), 1e-4).passed
    (name,) = (name for name in candidate.tensors if name.startswith("candidate_whole/"))
    candidate.tensors[name][0, 0] += 1e-3
    assert _shared_start(candidate, len(PROBES), 1e-4).passed is False
    del candidate.tensors[name]  # type: ignore[attr-defined]
    assert _shared_start(candidate, len(PROBES), 1e-4).passed is False


@pytest.mark.parametrize(
    ("asked", "free", "device"), [("auto", 1 << 40, "cuda"), ("cpu", 1 << 40, "cpu"), ("auto", 1 << 20, "cpu")]
)
def test_a_gpu_is_used_where_both_fit(
    made: tuple[Path, Path, Patch, int], monkeypatch: pytest.MonkeyPatch, asked: str, free: int, device: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, free))
    assert pick_device(asked, made[1]) == device
