"""The command line as a person, and as a program, uses it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.command_line import Run, runner
from support.tiny_models import PAIRS, tiny_checkpoint, write_recipe


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    return runner(capsys)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    folder = tmp_path_factory.mktemp("llama") / "tiny-llama"
    return folder, tiny_checkpoint(folder, "meta-llama--Llama-3.2-1B")


def test_help_answers_without_the_heavy_imports() -> None:
    program = (
        "import sys\nfrom patcher.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = ('torch', 'pydantic', 'transformers', 'rich', 'huggingface_hub')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "RECIPE" in finished.stdout and "verify" in finished.stdout
    assert finished.stdout.strip().endswith("[]")


def test_no_arguments_is_help(run: Run) -> None:
    code, out, _ = run()
    assert code == 0 and "Commands:" in out


@pytest.mark.parametrize("command", ["build", "verify", "push", "demo", "schema"])
def test_every_command_has_help(run: Run, command: str) -> None:
    code, out, _ = run(command, "--help")
    assert code == 0 and "Usage: patch-model" in out


def test_build_verify_and_force(run: Run, llama: tuple[Path, int], tmp_path: Path) -> None:
    base, layer = llama
    recipe = write_recipe(tmp_path / "recipe.yaml", base, layer, tmp_path / "steered")
    code, out, err = run(recipe)
    assert code == 0, err
    assert "passed" in out and "flag" in out and "from_pretrained" in out and str(tmp_path / "steered") in out
    assert "loading the model" in err

    code, out, err = run("verify", tmp_path / "steered", "--json")
    assert code == 0
    assert json.loads(out)["checks"][0]["status"] == "passed"

    code, out, err = run(recipe)
    assert code == 2 and "not empty" in err and "--force" in err and out == ""

    code, out, err = run(recipe, "--force", "--json", "--set", "vectors.0.coefficient=0.25")
    assert code == 0
    result = json.loads(out)
    assert set(result) == {"output", "manifest", "timings", "timing_parts", "peak_rss_bytes", "bytes_written", "placed"}
    stages = {"start", "plan", "load", "capture", "evaluate", "write", "hash", "verify", "card", "other"}
    assert set(result["timings"]) == {*stages, "total"}
    assert result["manifest"]["edits"][0]["coefficient"] == 0.25
    assert json.loads((tmp_path / "steered" / "steering.json").read_text()) == result["manifest"]
    assert not list(tmp_path.glob(".*partial*"))


def test_dry_run_writes_nothing(run: Run, llama: tuple[Path, int], tmp_path: Path) -> None:
    base, layer = llama
    recipe = write_recipe(tmp_path / "recipe.yaml", base, layer, tmp_path / "steered")
    code, out, _ = run(recipe, "--dry-run")
    assert code == 0 and f"model.layers.{layer}.mlp.down_proj.bias" in out and "mlp_bias = True" in out
    code, out, _ = run("--dry-run", recipe, "--json")
    plan = json.loads(out)
    assert code == 0 and plan["route"]["name"] == "flag" and plan["vectors"][0]["pairs"] == len(PAIRS)
    assert not (tmp_path / "steered").exists()


WRONG: dict[str, tuple[dict, str]] = {
    "no such layer": ({"layer": 99}, "use 0 to 3"),
    "negative layer": ({"layer": -1}, "not counted from the end"),
    "same ids": ({"pairs": [{"positive": "a", "negative": "a"}]}, "same tokens"),
    "no pairs file": ({"pairs": "nowhere.jsonl"}, "nowhere.jsonl"),
    "no vector file": ({"pairs": None, "method": "file", "file": "nowhere.safetensors"}, "nowhere.safetensors"),
    "zero vector": (
        {"pairs": [{"positive": "a", "negative": "b"}, {"positive": "b", "negative": "a"}], "position": "last"},
        "zero",
    ),
    "template without one": ({"chat_template": True}, "chat template"),
    "centred pca of one pair": ({"method": "pca", "center": True, "pairs": PAIRS[:1]}, "pair"),
    "position out of range": ({"position": 400}, "position"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_one_clear_message_and_exit_2(
    run: Run, llama: tuple[Path, int], tmp_path: Path, name: str
) -> None:
    base, layer = llama
    change, expected = WRONG[name]
    vector = {"layer": layer, **change}
    recipe = write_recipe(tmp_path / "recipe.yaml", base, layer, tmp_path / "out", vector=vector)
    code, out, err = run(recipe)
    assert code == 2, err
    assert expected in err and "Traceback" not in err and out == ""
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*partial*"))


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"model": "./nowhere"}, "no such model folder"),
        ({"model": "not a / model"}, "neither a folder nor a Hub id"),
        ({"route": "magic"}, "known routes"),
        ({"adapter": "./nowhere"}, "no such model folder"),
        ({"device": "cuda:77"}, "device"),
        ({"targets": ["lama.cpp"]}, "llama.cpp"),
        ({"evaluate": {"pairs": "nowhere.jsonl"}}, "nowhere.jsonl"),
        ({"evaluate": {"on_topic": "nowhere.txt"}}, "nowhere.txt"),
    ],
)
def test_wrong_keys_are_explained(run: Run, llama: tuple[Path, int], tmp_path: Path, keys: dict, expected: str) -> None:
    base, layer = llama
    recipe = write_recipe(tmp_path / "recipe.yaml", base, layer, tmp_path / "out")
    raw = {**json.loads(recipe.read_text()), **keys}
    recipe.write_text(json.dumps(raw))
    code, _, err = run(recipe)
    assert code == 2, err
    assert expected in err and "Traceback" not in err
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*partial*"))


def test_json_errors_are_one_object(run: Run, tmp_path: Path) -> None:
    code, out, _ = run(tmp_path / "nowhere.yaml", "--json")
    assert code == 2
    error = json.loads(out)["error"]
    assert {"code", "where", "found", "remedy"} <= set(error) and "nowhere.yaml" in error["where"]
    code, out, _ = run("--json", "--no-such-option", "x.yaml")
    assert code == 2 and json.loads(out)["error"]["code"] == "usage"


def test_the_output_may_not_be_the_base(run: Run, llama: tuple[Path, int], tmp_path: Path) -> None:
    base, layer = llama
    for output in (base, base / "inside", base.parent):
        code, _, err = run(write_recipe(tmp_path / "recipe.yaml", base, layer, output), "--force")
        assert code == 2 and "overlaps the base" in err


def test_force_keeps_a_folder_that_is_not_ours(run: Run, llama: tuple[Path, int], tmp_path: Path) -> None:
    base, layer = llama
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    code, _, err = run(write_recipe(tmp_path / "recipe.yaml", base, layer, tmp_path / "out"), "--force")
    assert code == 2 and "steering.json" in err
    assert (tmp_path / "out" / "thesis.tex").read_text() == "mine"


def test_verify_of_something_else(run: Run, tmp_path: Path) -> None:
    code, _, err = run("verify", tmp_path)
    assert code == 2 and "not a patched folder" in err


def test_schema_is_json_and_knows_the_keys(run: Run) -> None:
    code, out, _ = run("schema")
    schema = json.loads(out)
    assert code == 0 and {"model", "vectors", "push"} <= set(schema["properties"])


def test_a_base_that_is_quantised_in_another_way_is_refused(run: Run, tmp_path: Path) -> None:
    layer = tiny_checkpoint(tmp_path / "base", "meta-llama--Llama-3.2-1B")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "hqq", "bits": 4}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    code, _, err = run(write_recipe(tmp_path / "recipe.yaml", tmp_path / "base", layer, tmp_path / "out"))
    assert code == 2 and "quantised (hqq)" in err


def test_a_build_in_a_log_has_a_line_a_stage_and_quiet_has_none(
    run: Run, llama: tuple[Path, int], tmp_path: Path
) -> None:
    base, layer = llama
    recipe = write_recipe(tmp_path / "recipe.yaml", base, layer, tmp_path / "steered", evaluate={})
    code, out, err = run(recipe, "--no-cache")
    said = err.splitlines()
    assert code == 0 and {"reading activations", "writing the copy", "hashing the base"} <= set(said)
    assert len(said) == len(set(said)) and not [line for line in said if re.search(r"\d+ of \d+|%", line)], said
    code, quiet, err = run(recipe, "--force", "-q")
    assert code == 0 and err == ""
    assert [line[:20] for line in quiet.splitlines()[:5]] == [line[:20] for line in out.splitlines()[:5]]
    code, out, err = run(recipe, "-q", "-v")
    assert code == 2 and "give one of them" in err and out == ""
    code, out, err = run("verify", tmp_path / "steered", "-q")
    assert code == 0 and err == "" and "passed" in out
    code, out, err = run("export", tmp_path / "steered", "--format", "peft", "--output", tmp_path / "peft", "-q")
    assert code == 0 and "exporting" not in err and "written" in err


@pytest.mark.parametrize(
    "command",
    [
        "build",
        "sweep",
        "verify",
        "push",
        "export",
        "gguf",
        "unpatch",
        "reproduce",
        "chat",
        "inspect",
        "diff",
        "install",
    ],
)
def test_what_takes_long_can_be_quiet(run: Run, command: str) -> None:
    code, out, _ = run(*(["stacks"] if command == "install" else []), command, "--help")
    assert code == 0 and "-q, --quiet" in out
