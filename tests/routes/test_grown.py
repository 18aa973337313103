"""Tensors that hold a part of every block: what an inserted block does to them, in the forms of Gemma 4."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.building import build_recipe
from support.default_configs import default_config
from support.tiny_models import parsed_config, randomise, tiny_tokenizer
from support.tiny_patch import Patched, architecture_of, patch_tiny
from support.tiny_wrappers import wrapper_checkpoint, wrapper_config
from support.verified import verify_folder
from transformers import AutoModelForCausalLM

from patcher.architectures.analysis import Architecture
from patcher.architectures.model_class import on_meta, quiet_transformers
from patcher.build.unpatch import unpatch
from patcher.checkpoint.difference import compare
from patcher.checkpoint.folder import CheckpointFolder
from patcher.patched.reading import read_manifest
from patcher.progress.stage import silent
from patcher.routes.carrier.grown import grown_tensors
from patcher.routes.carrier.guard import require_neutral
from patcher.routes.carrier.insertion import CannotInsert, insert_blocks
from patcher.routes.carrier.route import plan

pytest.importorskip("transformers.models.gemma4")

EMBEDDING, PROJECTION = "model.embed_tokens_per_layer.weight", "model.per_layer_model_projection.weight"
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "31B": ("gemma4", {}),
    "26B-A4B": ("gemma4_moe", {}),
    "E2B": ("gemma4_e2b", {}),
    "E4B": ("gemma4_e2b", {"use_double_wide_mlp": False, "num_key_value_heads": 2, "num_kv_shared_layers": 3}),
}
"""Form -> the tiny wrapper that its decoder is taken from, and what is other."""


def text_config(form: str) -> dict[str, Any]:
    name, changes = FORMS[form]
    return {**wrapper_config(name, **changes)["text_config"], "architectures": ["Gemma4ForCausalLM"]}


def text_checkpoint(folder: Path, form: str, *, dtype: torch.dtype = torch.float32, sharded: bool = False) -> Path:
    """A tiny text model of a form of Gemma 4, whose layer scalars are not 1."""
    raw = text_config(form)
    torch.manual_seed(0)
    with quiet_transformers():
        model = AutoModelForCausalLM.from_config(parsed_config(raw, folder.parent / f"{folder.name}-config")).float()
        randomise(model.eval(), 0)
        for block in model.model.layers:
            block.layer_scalar.fill_(0.9)
        model.to(dtype).save_pretrained(folder, max_shard_size="150KB" if sharded else "5GB")
    raw["dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(raw, indent=2), encoding="utf-8")
    tiny_tokenizer().save_pretrained(folder)
    return folder


def store_keys_that_nobody_reads(folder: Path, layer: int) -> None:
    """As the releases do: keys and values of a block that reads another's."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    shape = tensors["model.layers.0.self_attn.k_proj.weight"].shape
    tensors[f"model.layers.{layer}.self_attn.k_proj.weight"] = torch.randn(shape)
    save_file(tensors, path, {"format": "pt"})


def require_exact(found: Patched) -> None:
    assert found.plan.route == "carrier" and found.plan.exact
    assert not found.report
    assert found.effect > 0.05 and found.moved > 0.5 * found.effect
    assert found.difference <= max(1e-4, 5 * found.noise) and found.difference <= 0.01 * found.effect


@pytest.mark.parametrize(
    ("form", "layer"), [("E2B", 1), ("E2B", 3), pytest.param("26B-A4B", 5, marks=pytest.mark.slow)]
)
def test_a_form_of_gemma_4_is_steered_exactly(tmp_path: Path, form: str, layer: int) -> None:
    require_exact(patch_tiny(text_checkpoint(tmp_path / "base", form), tmp_path / "copy", [layer]))


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_every_block_of_every_form_is_steered_exactly(tmp_path: Path, form: str) -> None:
    base = text_checkpoint(tmp_path / "base", form)
    for layer in range(len(text_config(form)["layer_types"])):
        require_exact(patch_tiny(base, tmp_path / f"copy-{layer}", [layer]))


@pytest.mark.slow
def test_several_blocks_are_inserted_at_once_on_both_sides_of_the_border(tmp_path: Path) -> None:
    found = patch_tiny(text_checkpoint(tmp_path / "base", "E2B"), tmp_path / "copy", [1, 3, 6])
    require_exact(found)
    assert found.plan.grown[EMBEDDING].order == (0, 1, None, 2, 3, None, 4, 5, 6, None, 7)


def test_the_inserted_block_is_no_source_of_keys_and_values_and_other_stacks_read_the_plain_keys(
    tmp_path: Path,
) -> None:
    base = text_checkpoint(tmp_path / "base", "E2B")
    for layer in (0, 2, 3, 4, 7):
        found = plan(architecture_of(base), [layer], CheckpointFolder(base))
        config = parsed_config({**text_config("E2B"), **found.config_changes}, tmp_path / f"config-{layer}")
        assert config.kv_sharing_modes[found.copy_layers[layer]] != "store"
        # The class makes the blocks' own settings of their types.
        assert set(found.config_changes) <= {"num_hidden_layers", "layer_types", "num_kv_shared_layers"}
        assert set(found.grown) == {EMBEDDING, PROJECTION}


def test_a_block_that_others_read_is_not_moved_away_from_them() -> None:
    kind, stated = type(default_config("gemma4_text")), text_config("E2B")
    config = kind(**stated)
    with pytest.raises(CannotInsert, match="store_full_length_kv"):
        require_neutral(on_meta(config), insert_blocks(config, [3], {3: 3}), "model.layers")
    config = kind(**{**stated, "num_kv_shared_layers": 0, "use_double_wide_mlp": False})
    require_neutral(on_meta(config), insert_blocks(config, [7], {7: 7}), "model.layers")


def test_what_grows_otherwise_than_by_a_part_a_block_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = default_config("gemma4_text")
    base, insertion = on_meta(config), insert_blocks(config, [2], {2: 2})
    extended = require_neutral(base, insertion, "model.layers")
    assert grown_tensors(base, extended, insertion, "model.layers").keys() == {EMBEDDING, PROJECTION}
    projection = extended.model.per_layer_model_projection
    monkeypatch.setattr("patcher.routes.carrier.guard.on_meta", lambda *_args, **_options: extended)
    projection.weight = torch.nn.Parameter(torch.empty(projection.weight.shape[0] + 1, 2304, device="meta"))
    with pytest.raises(CannotInsert, match="per_layer_model_projection"):
        require_neutral(base, insertion, "model.layers")


@pytest.mark.slow
@pytest.mark.parametrize("layer", [4, 14, 15, 34])
def test_the_release_with_its_own_sizes_is_planned(layer: int) -> None:
    sizes = {
        "hidden_size": 1536, "intermediate_size": 6144, "num_hidden_layers": 35, "num_attention_heads": 8,
        "num_key_value_heads": 1, "num_kv_shared_layers": 20, "use_double_wide_mlp": True,
        "layer_types": [*["sliding_attention"] * 4, "full_attention"] * 7,
    }  # fmt: skip
    config = type(default_config("gemma4_text"))(**sizes)
    found = plan(Architecture(config), [layer], None)
    assert found.exact and found.config_changes["num_hidden_layers"] == 36


def test_keys_that_the_class_ignores_may_be_stored(tmp_path: Path) -> None:
    base = text_checkpoint(tmp_path / "base", "E2B")
    store_keys_that_nobody_reads(base, 5)
    require_exact(patch_tiny(base, tmp_path / "copy", [5]))
    stored = CheckpointFolder(tmp_path / "copy").tensors
    assert "model.layers.7.self_attn.k_proj.weight" not in stored
    assert ("model.layers.5.self_attn.k_proj.weight" in stored) != ("model.layers.6.self_attn.k_proj.weight" in stored)


RECIPE = """
model: ./base
vectors:
  - name: happy
    pairs:
      - {positive: I love this, negative: I hate this}
      - {positive: What a wonderful day, negative: What a terrible day}
      - {positive: She smiled, negative: She cried}
    layer: LAYER
    scale: residual
    coefficient: 0.3
evaluate: {enabled: false}
output: ./out
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "layer", "sharded", "dtype", "text"),
    [
        ("gemma4_e2b", 3, False, torch.float32, False),
        ("gemma4_e2b", 5, True, torch.bfloat16, False),
        ("gemma4_moe", 2, True, torch.float32, False),
        ("gemma4", 5, False, torch.bfloat16, False),
        ("E2B", 1, True, torch.bfloat16, True),
        ("E4B", 4, False, torch.float32, True),
    ],
)
def test_from_a_recipe_to_a_verified_folder_and_back(
    tmp_path: Path, name: str, layer: int, sharded: bool, dtype: torch.dtype, text: bool
) -> None:
    make = text_checkpoint if text else wrapper_checkpoint
    base = make(tmp_path / "base", name, sharded=sharded, dtype=dtype)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.replace("LAYER", str(layer)), encoding="utf-8")
    out = tmp_path / "out"
    build_recipe(recipe, out)
    patch = read_manifest(out).patches[-1]
    assert patch.verification[0].passed and patch.route.name == "carrier"
    widened = {change.name for change in compare(CheckpointFolder(base), CheckpointFolder(out)).changed}
    assert set(patch.route.grown) <= widened
    assert bool(patch.route.grown) == ("e2b" in name or text)
    if patch.route.grown:
        assert "a part of zeros more for the inserted block" in (out / "README.md").read_text(encoding="utf-8")
    unpatch(out, tmp_path / "back", say=silent)
    for path in base.glob("model*"):
        assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.slow
def test_a_slice_at_another_place_is_found_out(tmp_path: Path) -> None:
    text_checkpoint(tmp_path / "base", "E2B")
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("LAYER", "1"), encoding="utf-8")
    build_recipe(tmp_path / "recipe.yaml", tmp_path / "out")
    assert verify_folder(tmp_path / "out")["passed"]
    path = CheckpointFolder(tmp_path / "out").tensors[EMBEDDING].file
    tensors = load_file(path)
    slices = list(tensors[EMBEDDING].chunk(9, 1))
    tensors[EMBEDDING] = torch.cat([slices[2], *slices[:2], *slices[3:]], 1)
    save_file(tensors, path, {"format": "pt"})
    assert not verify_folder(tmp_path / "out")["passed"]


def gemma_3n(folder: Path, *, dtype: torch.dtype = torch.float32) -> Path:
    """A tiny text model of Gemma 3n; its blocks share keys and values."""
    raw = {
        "model_type": "gemma3n_text", "architectures": ["Gemma3nForCausalLM"], "hidden_size": 64,
        "intermediate_size": [160] * 8, "num_hidden_layers": 8, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 16, "vocab_size": 400, "vocab_size_per_layer_input": 400, "hidden_size_per_layer_input": 16,
        "num_kv_shared_layers": 3, "laurel_rank": 8, "sliding_window": 16, "altup_num_inputs": 4,
        "layer_types": [*["sliding_attention"] * 2, "full_attention", "sliding_attention", "full_attention",
                        *["sliding_attention"] * 2, "full_attention"],
        "activation_sparsity_pattern": [0.95] * 2 + [0.0] * 6, "max_position_embeddings": 512,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "final_logit_softcapping": 30.0,
    }  # fmt: skip
    torch.manual_seed(0)
    with quiet_transformers():
        model = AutoModelForCausalLM.from_config(parsed_config(raw, folder.parent / f"{folder.name}-config")).float()
        randomise(model.eval(), 0)
        model.to(dtype).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(raw, indent=2), encoding="utf-8")
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("layer", [2, 4, 6])
def test_two_blocks_carry_a_vector_in_gemma_3n(tmp_path: Path, layer: int) -> None:
    found = patch_tiny(gemma_3n(tmp_path / "base"), tmp_path / "copy", [layer])
    require_exact(found)
    assert found.plan.streams == 4 and len(found.plan.inserted[layer]) == 2
    assert found.plan.cost.startswith("2 more layers")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gemma_3n_from_a_recipe_to_a_verified_folder_and_back(tmp_path: Path, dtype: torch.dtype) -> None:
    base = gemma_3n(tmp_path / "base", dtype=dtype)
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("LAYER", "4"), encoding="utf-8")
    build_recipe(tmp_path / "recipe.yaml", tmp_path / "out")
    patch = read_manifest(tmp_path / "out").patches[-1]
    assert patch.verification[0].passed and patch.route.name == "carrier"
    assert patch.route.grown[EMBEDDING].order == [0, 1, 2, 3, 4, None, None, 5, 6, 7]
    unpatch(tmp_path / "out", tmp_path / "back", say=silent)
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()
