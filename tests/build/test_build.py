"""The build as a whole: what it keeps, what it refuses, and what it leaves behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.building import build_recipe
from support.tiny_models import VOCABULARY, tiny_checkpoint, write_recipe

from patcher.build.result import BuildResult
from patcher.errors import CheckFailed, InputError
from patcher.routes import apply

LLAMA = "meta-llama--Llama-3.2-1B"


def run(recipe_path: Path, output: Path, **options: Any) -> BuildResult:
    return build_recipe(recipe_path, output, **options)


def test_the_manifest_holds_what_is_needed(tmp_path: Path) -> None:
    layer = tiny_checkpoint(tmp_path / "base", LLAMA, dtype=torch.bfloat16, sharded=True)
    path = write_recipe(tmp_path / "recipe.yaml", tmp_path / "base", layer, tmp_path / "out", seed=3)
    manifest = run(path, tmp_path / "out").manifest
    edit = manifest["edits"][0]
    assert edit["layer"] == edit["read_layer"] == layer
    assert edit["site"] == f"model.layers.{layer}.mlp.down_proj"
    assert edit["stored_rel_error"] < 1e-6
    vectors = load_file(tmp_path / "out" / "steering.safetensors")
    assert vectors[edit["tensor"]].dtype == torch.float32
    assert float(vectors[edit["tensor"]].norm()) == pytest.approx(edit["norm"])
    assert edit["norm"] == pytest.approx(0.5 * edit["residual_norm"], rel=1e-4)
    files = {record["name"]: record for record in manifest["base"]["files"]}
    assert {"config.json", "model.safetensors.index.json", "tokenizer.json"} <= set(files)
    assert all(len(record["sha256"]) == 64 for record in files.values())
    assert manifest["recipe"]["text"] == path.read_text()
    assert manifest["recipe"]["resolved"]["seed"] == 3
    assert manifest["route"]["config_before"] == {"mlp_bias": False}


def test_a_native_bias_keeps_its_original_values(tmp_path: Path) -> None:
    layer = tiny_checkpoint(tmp_path / "base", "openai-community--gpt2")
    path = write_recipe(tmp_path / "recipe.yaml", tmp_path / "base", layer, tmp_path / "out")
    manifest = run(path, tmp_path / "out").manifest
    name = manifest["route"]["tensors"][0]["name"]
    base = load_file(tmp_path / "base" / "model.safetensors")
    steered = load_file(tmp_path / "out" / "model.safetensors")
    held = load_file(tmp_path / "out" / "steering.safetensors")
    assert torch.equal(held[f"original/{name}"], base[name])
    assert torch.equal(steered[name], base[name] + held[manifest["edits"][0]["tensor"]])
    assert {key for key in base if not torch.equal(base[key], steered[key])} == {name}
    assert sorted(item.name for item in (tmp_path / "out").iterdir() if item.suffix == ".safetensors") == [
        "model.safetensors", "steering.safetensors"
    ]  # fmt: skip


def test_a_failed_check_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = tiny_checkpoint(tmp_path / "base", LLAMA)
    path = write_recipe(tmp_path / "recipe.yaml", tmp_path / "base", layer, tmp_path / "out")
    honest = apply.tensors_to_write

    def dishonest(*arguments: Any) -> Any:
        created, replaced = honest(*arguments)
        halved = {name: tensor / 2 if isinstance(tensor, torch.Tensor) else tensor for name, tensor in created.items()}
        return halved, replaced

    monkeypatch.setattr(apply, "tensors_to_write", dishonest)
    with pytest.raises(CheckFailed) as caught:
        run(path, tmp_path / "out")
    assert caught.value.exit_code == 1 and "stored vector" in str(caught.value)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*partial*"))


def test_a_half_precision_bias_that_cannot_hold_the_vector_is_refused(tmp_path: Path) -> None:
    layer = tiny_checkpoint(tmp_path / "base", "openai-community--gpt2")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    for name in weights:
        if name.endswith("mlp.c_proj.bias"):
            weights[name] = weights[name] + 300.0
    save_file({name: w.bfloat16() for name, w in weights.items()}, tmp_path / "base" / "model.safetensors")
    path = write_recipe(
        tmp_path / "recipe.yaml", tmp_path / "base", layer, tmp_path / "out", vector={"scale": 1.0, "coefficient": 0.5}
    )
    with pytest.raises(CheckFailed, match=r"in BF16 it would be off by \d+\.\d%"):
        run(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tiny_coefficient_is_verified_at_an_amplified_vector(tmp_path: Path) -> None:
    layer = tiny_checkpoint(tmp_path / "base", LLAMA)
    vector = {"scale": "residual", "coefficient": 1e-5}
    path = write_recipe(tmp_path / "recipe.yaml", tmp_path / "base", layer, tmp_path / "out", vector=vector)
    entry = run(path, tmp_path / "out").manifest["verification"][0]
    notes = {check["name"]: check["note"] for check in entry["checks"]}
    assert entry["passed"] and entry["steering_effect"] < 0.01
    assert "times the vector" in notes["share of the effect"]


def test_bin_weights_become_safetensors(tmp_path: Path) -> None:
    layer = tiny_checkpoint(tmp_path / "base", "facebook--opt-125m")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "model.safetensors").unlink()
    # OPT's released files leave the class's prefix out.
    renamed = {name.removeprefix("model."): weight for name, weight in weights.items()}
    torch.save(renamed, tmp_path / "base" / "pytorch_model.bin")
    path = write_recipe(tmp_path / "recipe.yaml", tmp_path / "base", layer, tmp_path / "out")
    manifest = run(path, tmp_path / "out").manifest
    assert manifest["verification"][0]["passed"]
    assert manifest["route"]["tensors"][0]["name"] == f"decoder.layers.{layer}.fc2.bias"
    assert not list((tmp_path / "out").glob("*.bin"))


def test_an_adapter_is_merged_first(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from support.verified import verify_folder
    from transformers import AutoModelForCausalLM

    layer = tiny_checkpoint(tmp_path / "base", LLAMA)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    torch.manual_seed(1)
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    tuned.save_pretrained(tmp_path / "adapter")
    path = write_recipe(tmp_path / "recipe.yaml", tmp_path / "base", layer, tmp_path / "out", adapter="./adapter")
    manifest = run(path, tmp_path / "out").manifest
    assert manifest["verification"][0]["passed"] and manifest["base"]["adapter"]["name"] == "adapter"
    assert verify_folder(tmp_path / "out")["passed"]

    vector = load_file(tmp_path / "out" / "steering.safetensors")[manifest["edits"][0]["tensor"]]
    block = tuned.get_submodule(f"base_model.model.model.layers.{layer}")
    block.register_forward_hook(
        lambda _module, _inputs, out: out + vector if isinstance(out, torch.Tensor) else (out[0] + vector, *out[1:])
    )
    ids = torch.randint(3, VOCABULARY, (2, 15), generator=torch.Generator().manual_seed(5))
    steered = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        wanted, found = tuned.eval()(input_ids=ids).logits, steered(input_ids=ids).logits
    assert float((wanted.log_softmax(-1) - found.log_softmax(-1)).abs().max()) <= 2e-5


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_a_vector_from_a_file_needs_no_pairs(tmp_path: Path, kind: str) -> None:
    layer = tiny_checkpoint(tmp_path / "base", LLAMA)
    width = json.loads((tmp_path / "base" / "config.json").read_text())["hidden_size"]
    vector = torch.randn(width, generator=torch.Generator().manual_seed(0))
    if kind == "pt":
        torch.save(vector, tmp_path / "vector.pt")
    else:
        save_file({"direction": vector}, tmp_path / "vector.safetensors")
    changes = {"method": "file", "file": f"vector.{kind}", "pairs": None, "scale": "raw", "coefficient": 2.0}
    path = write_recipe(tmp_path / "recipe.yaml", tmp_path / "base", layer, tmp_path / "out", vector=changes)
    manifest = run(path, tmp_path / "out").manifest
    held = load_file(tmp_path / "out" / "steering.safetensors")[manifest["edits"][0]["tensor"]]
    torch.testing.assert_close(held, 2 * vector)
    assert manifest["edits"][0]["residual_norm"] > 0


def test_a_base_without_a_tokenizer_takes_a_vector_from_a_file_and_refuses_pairs(tmp_path: Path) -> None:
    layer = tiny_checkpoint(tmp_path / "base", LLAMA, tokenizer=False)
    path = write_recipe(tmp_path / "recipe.yaml", tmp_path / "base", layer, tmp_path / "out")
    with pytest.raises(InputError, match="no tokenizer"):
        run(path, tmp_path / "out")
    width = json.loads((tmp_path / "base" / "config.json").read_text())["hidden_size"]
    save_file({"v": torch.randn(width)}, tmp_path / "vector.safetensors")
    changes = {"method": "file", "file": "vector.safetensors", "pairs": None, "scale": 4.0}
    path = write_recipe(tmp_path / "recipe.yaml", tmp_path / "base", layer, tmp_path / "out", vector=changes)
    assert run(path, tmp_path / "out").manifest["verification"][0]["passed"]


def test_vectors_that_cancel_out_are_refused(tmp_path: Path) -> None:
    layer = tiny_checkpoint(tmp_path / "base", LLAMA)
    path = write_recipe(tmp_path / "recipe.yaml", tmp_path / "base", layer, tmp_path / "out")
    raw = json.loads(path.read_text())
    raw["vectors"].append({**raw["vectors"][0], "name": "minus", "coefficient": -0.5})
    path.write_text(json.dumps(raw))
    with pytest.raises(InputError, match="zero"):
        run(path, tmp_path / "out")


def test_a_meaningless_vector_is_verified_but_visible(tmp_path: Path) -> None:
    """Exactness is not meaning: the controls must say so."""
    layer = tiny_checkpoint(tmp_path / "base", LLAMA)
    words = ["sea", "rain", "film", "food", "train", "ticket", "winter", "station", "wonderful", "love"] * 3
    answers = [(" (A)", " (B)"), (" (B)", " (A)")]
    questions = [
        {
            "question": f"Is {word} here?",
            "answer_matching_behavior": answers[number % 2][0],
            "answer_not_matching_behavior": answers[number % 2][1],
        }
        for number, word in enumerate(words)
    ]
    (tmp_path / "pairs.json").write_text(json.dumps(questions))
    vector = {"pairs": "pairs.json", "scale": "residual", "coefficient": 0.01}
    path = write_recipe(
        tmp_path / "recipe.yaml", tmp_path / "base", layer, tmp_path / "out", vector=vector, evaluate={}
    )
    manifest = run(path, tmp_path / "out").manifest
    evaluation = manifest["evaluation"]
    assert evaluation["measure"] == "answer_probability" and evaluation["pairs"] >= 5
    assert len(evaluation["random"]) == 3 and {"base", "steered", "negative"} <= set(evaluation)
    if not evaluation["distinguishable"]:
        assert "cannot be told from" in (tmp_path / "out" / "README.md").read_text()
