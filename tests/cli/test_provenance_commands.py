"""diff, unpatch and reproduce as a person, and as a program, uses them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.checkpoints import hashes
from support.command_line import Run, runner
from support.patched_folders import patch, vector_of
from support.tiny_models import default_checkpoint, tiny_checkpoint

from patcher.build.reproduce import Reproduced


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    return runner(capsys)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bf16 GPT-2 with a patch in place, and a Llama with created tensors: base and out of each."""
    place = tmp_path_factory.mktemp("provenance")
    for name, model in (("gpt2", "openai-community--gpt2"), ("llama", "meta-llama--Llama-3.2-1B")):
        layer = tiny_checkpoint(place / name, model, dtype=torch.bfloat16)
        patch(place / name, place / f"{name}-out", {layer: vector_of(64, 1)})
    return place


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "place"))


@pytest.mark.parametrize("command", ["diff", "unpatch", "reproduce"])
def test_help_answers_without_the_heavy_imports(command: str) -> None:
    program = (
        "import sys\nfrom patcher.cli import main\n"
        f"try:\n    main([{command!r}, '--help'])\nexcept SystemExit:\n    pass\n"
        "print([name for name in ('torch', 'pydantic', 'transformers', 'rich') if name in sys.modules])"
    )
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert f"Usage: patch-model {command}" in finished.stdout
    assert finished.stdout.strip().endswith("[]")


def test_diff_lists_exactly_what_differs(run: Run, place: Path) -> None:
    code, out, _ = run("diff", place / "gpt2", place / "gpt2-out")
    assert code == 0
    lines = out.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("~ transformer.h.1.mlp.c_proj.bias BF16 [64]: 64 numbers differ, by at most ")
    assert lines[1].startswith("tensors: 1 changed, ") and lines[1].endswith("config.json: no keys differ")

    code, out, _ = run("diff", place / "llama", place / "llama-out", "--json")
    found = json.loads(out)
    assert code == 0 and found["same"] is False
    assert len(found["tensors"]["added"]) == 12
    assert found["tensors"]["removed"] == found["tensors"]["changed"] == []
    assert found["config"] == {"added": {}, "removed": {}, "changed": {"mlp_bias": [False, True]}}

    code, out, _ = run("diff", place / "llama", place / "llama")
    assert code == 0 and out.splitlines()[-1].startswith("tensors: 38 the same")


def test_diff_counts_long_lists_unless_told_otherwise(run: Run, place: Path) -> None:
    _, out, _ = run("diff", place / "gpt2", place / "llama")
    assert "more that are removed (--every names them)" in out
    _, out, _ = run("diff", place / "gpt2", place / "llama", "--every")
    assert "more that are" not in out and out.count("\n- ") > 20


def test_unpatch_gives_the_base_back(run: Run, place: Path) -> None:
    code, out, err = run("unpatch", place / "gpt2-out", place / "back")
    assert code == 0, err
    assert out == "" and "taken out: love, layer 1" in err and "model.safetensors" in err
    assert hashes(place / "back") == hashes(place / "gpt2")
    code, out, _ = run("diff", place / "gpt2", place / "back", "--json")
    assert json.loads(out)["same"] is True

    code, out, err = run("unpatch", place / "llama-out", place / "back2", "--json", "--link")
    result = json.loads(out)
    assert code == 0 and result["removed"] == [{"name": "love", "layer": 1}]
    assert "model.safetensors" in result["identical"] and result["output"] == str(place / "back2")
    assert (place / "back2" / "model.safetensors").samefile(place / "llama-out" / "model-00001-of-00002.safetensors")


def test_unpatch_refuses_and_says_what_to_do(run: Run, place: Path) -> None:
    layer = default_checkpoint(place / "phi3", "phi3")
    patch(place / "phi3", place / "phi3-out", {layer: vector_of(64)}, prefer="free")
    code, out, err = run("unpatch", place / "phi3-out", place / "back", "--json")
    assert code == 2 and json.loads(out)["error"]["code"] == "base_needed"
    assert f"--base {place / 'phi3'}" in err and "Traceback" not in err
    assert not (place / "back").exists()
    code, _, err = run("unpatch", place / "phi3-out", place / "back", "--base", place / "phi3")
    assert code == 0, err
    assert hashes(place / "back") == hashes(place / "phi3")
    code, _, err = run("unpatch", place / "phi3", place / "back3")
    assert code == 2 and "not a patched folder" in err


def test_unpatch_of_damaged_weights_is_a_failed_check(run: Run, place: Path) -> None:
    file = place / "gpt2-out" / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    code, out, err = run("unpatch", place / "gpt2-out", place / "back", "--json")
    assert code == 1 and json.loads(out)["error"]["code"] == "unpatch" and "did not come back" in err
    assert not (place / "back").exists() and not list(place.glob(".*"))


def test_reproduce_reports(run: Run, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it finds is tested beside its module; this is how it is said."""
    same = Reproduced(place, identical=["a", "b"])
    other = Reproduced(place, identical=["a"], different={"b.safetensors": 0.125, "c": None}, missing=["d"],
                       unexpected=["e"], manifest=["edits"], notes=["a note"])  # fmt: skip
    monkeypatch.setattr("patcher.build.reproduce.reproduce", lambda *_args, **_options: same)
    code, out, err = run("reproduce", place / "gpt2-out")
    assert code == 0 and out == "" and "reproduced: 2 files" in err
    monkeypatch.setattr("patcher.build.reproduce.reproduce", lambda *_args, **_options: other)
    code, out, err = run("reproduce", place / "gpt2-out")
    assert code == 1 and out == ""
    for words in ("differs: b.safetensors, numbers by at most 0.125", "differs: c\n", "not built again: d",
                  "not in the folder: e", "edits", "note: a note", "not reproduced"):  # fmt: skip
        assert words in err
    code, out, _ = run("reproduce", place / "gpt2-out", "--json")
    assert code == 1 and json.loads(out)["reproduced"] is False and json.loads(out)["missing"] == ["d"]
