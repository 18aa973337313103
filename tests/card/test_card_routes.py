"""The model card of every route, from plans that were made for tiny checkpoints: it must be true, and read well."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.old_transformers import skip_if_too_old
from support.tiny_models import default_checkpoint, tiny_checkpoint

from patcher.architectures.analysis import Architecture
from patcher.build.manifest import Copied, build_manifest
from patcher.card.card import render_card
from patcher.checkpoint.folder import CheckpointFolder
from patcher.checkpoint.prepare import read_config
from patcher.checkpoint.source import Source
from patcher.patched.schema import Manifest
from patcher.recipe.file import LoadedRecipe
from patcher.recipe.schema import Recipe
from patcher.routes.apply import write_plan
from patcher.routes.plan import Plan
from patcher.routes.planner import choose_route
from patcher.vectors.steering_vector import SteeringVector

FIT_OF_LAYER = {"tokens": 9000, "held_out_tokens": 1000, "error_mean": 0.0712, "error_p95": 0.1498, "mean": 0.98}
FIT_OF_LAYER |= {"cosine": 0.9961, "ridge": 0.01}
FIT = {
    **{**FIT_OF_LAYER, "layers": {"1": FIT_OF_LAYER}, "sampled_tokens": 4000},
    **{"kl_hook_fit": 0.0021, "kl_hook_base": 0.1, "ratio": 0.021, "kl_tokens": 1000},
}


def planned(folder: Path, name: str, layers: list[int] | None, **options: Any) -> tuple[Plan, CheckpointFolder]:
    if "--" in name:
        skip_if_too_old(name)
        layer = tiny_checkpoint(folder, name, tokenizer=False)
    else:
        layer = default_checkpoint(folder, name, tokenizer=False)
    checkpoint = CheckpointFolder(folder)
    exact = options.get("route") != "rank_one"
    plan = choose_route(Architecture(read_config(folder)), layers or [layer], checkpoint, exact=exact, **options)
    if exact:
        return plan, checkpoint
    fitted = tuple(replace(write, right=torch.ones(write.shape[-1])) for write in plan.tensors)
    return replace(plan, tensors=fitted, fit=FIT), checkpoint


def manifest_of(plan: Plan, checkpoint: CheckpointFolder) -> Manifest:
    """What a build would write, without its measurements."""
    values = torch.tensor([1.0, -1.0] * 32)
    vectors = [SteeringVector(f"v{layer}", layer, layer, 2.0, values, 40.0) for layer in plan.sites]
    spec = {"name": "v", "pairs": [{"positive": "a", "negative": "b"}], "layer": 1, "coefficient": 2.0}
    recipe = Recipe.model_validate(
        {"model": "me/base", "vectors": [{**spec, "name": vector.name} for vector in vectors], "output": "out"}
    )
    stage = checkpoint.path / "copy"
    stage.mkdir()
    written = write_plan(plan, vectors, checkpoint, stage)
    source = Source("me/base", True, "0" * 40, checkpoint.path)
    copied = Copied(stage, source, checkpoint, plan, vectors, written, [])
    return build_manifest(copied, LoadedRecipe(recipe, "", checkpoint.path / "recipe.yaml"))


def card_of(plan: Plan, checkpoint: CheckpointFolder, **changes: Any) -> str:
    return render_card(manifest_of(plan, checkpoint).with_parts(**changes), None)


# (model, layers, what the recipe says, what the card says, what it does not say)
CASES: dict[str, tuple[str, list[int] | None, dict[str, Any], list[str], list[str]]] = {
    "native": (
        "openai-community--gpt2",
        None,
        {},
        [
            "apart from what stores that vector, the weights are those of the base.",
            "the vector was added to it | F32 |",
            "`config.json` is the base's.",
            "kept in that file under `original/`. The base itself is at [me/base](https://huggingface.co/me/base).",
        ],
        ["Keep in mind", "renamed", "of zeros"],
    ),
    "parallel": (
        "cohere",
        None,
        {"route": "parallel"},
        [
            "apart from what stores that vector, the weights are those of the base.",
            "Beside these, 15 tensors of zeros, which the changed configuration makes the class expect.",
            "Changed in `config.json`: `attention_bias: true`.",
            "delete the created tensors; undo the changes of `config.json`",
        ],
        ["Keep in mind"],
    ),
    "relabel": (
        "phi3",
        None,
        {"prefer": "free"},
        [
            "`LlamaForCausalLM` instead of `Phi3ForCausalLM`; both compute the same function. Nothing was trained: 20 "
            "tensors were rewritten for the new class; apart from them and what stores that vector, the weights are",
            "Beside these, 11 tensors of zeros, which the new class expects.",
            "| `model.layers.0.self_attn.q_proj.weight` | `model.layers.0.self_attn.qkv_proj.weight`, its rows of q |",
            "They stand in place of 8 tensors of the base.",
            "`config.json` is a new one, for `LlamaForCausalLM` instead of `Phi3ForCausalLM`",
            "- The copy is of model type `llama`, the base of `phi3`.",
            "cannot be turned back into the base, since tensors of it were replaced: take the base itself, [me/base]",
            "To only switch the steering off, set `model.layers.1.mlp.down_proj.bias` to zero.",
        ],
        ["`config.json` is the base's", "Changed in `config.json`"],
    ),
    "relabel, nothing rewritten": (
        "Qwen--Qwen3-8B",
        None,
        {"prefer": "free"},
        [
            "`HYV3ForCausalLM` instead of `Qwen3ForCausalLM`; both compute the same function. Nothing was trained: "
            "apart from what stores that vector, the weights are those of the base.",
            "delete the created tensors; put the base's `config.json` back.",
        ],
        ["rewritten", "cannot be turned back"],
    ),
    "relabel, centred": (
        "olmo",
        None,
        {"prefer": "free"},
        [
            "it is what the base's residual stream would gain.",
            "its mean over the residual's dimension (1) taken off",
            "| `model.layers.0.input_layernorm.weight` | all 1 | 8 more |",
            "- The copy's residual stream is the base's without its mean",
            "- Some of them are stored in fp32; loaded in half precision they are rounded",
            "as the base's residual stream would gain it; the copy's gains it less its mean.",
        ],
        ["exactly as the residual stream gains it"],
    ),
    "carrier": (
        "Qwen--Qwen3-8B",
        None,
        {"route": "carrier"},
        [
            "In the copy one more block adds it and nothing else. Nothing was trained: all other weights are those",
            "| v1 | 1 (added by block 2 of the copy) |",
            "created: outer product of the vector and a row of constants | ",
            "Block 2 is new in the copy. The ",
            "22 tensors of the blocks after it were renamed, such as `model.layers.2.input_layernorm.weight` to "
            "`model.layers.3.input_layernorm.weight`",
            "`num_hidden_layers: 5`",
            "- LoRA adapters made for the base address blocks by index: from block 2 on they hit the wrong one.",
            "remove block 2; ",
            "give the renamed tensors their old names, so that later blocks move back (`route.renamed`); undo",
        ],
        ["apart from what stores", "delete the created tensors", "prefer: free"],
    ),
    "carriers": (
        "google--gemma-3-1b-it",
        [0, 2],
        {"route": "carrier"},
        [
            "In the copy 2 more blocks add them and nothing else.",
            "| v2 | 2 (added by block 4 of the copy) |",
            "created: a norm's weight, which holds the vector",
            "Blocks 1 and 4 are new in the copy. The 24 other tensors there, ",
            "39 tensors of the blocks after the first of them were renamed",
            "remove blocks 1 and 4; ",
        ],
        ["tensors of zeros", "outer product"],
    ),
    "carriers, a pattern each": (
        "gemma2",
        [0, 2],
        {"targets": ["transformers", "llama.cpp"]},
        [
            "In the copy 2 more blocks add them and nothing else. 2 further blocks do nothing: they keep every later "
            "block's place in the pattern of block types.",
            "| v2 | 2 (added by block 5 of the copy) |",
            "Blocks 1, 2, 5 and 6 are new in the copy. The ",
            "remove blocks 1, 2, 5 and 6; ",
        ],
        ["tensors of zeros in other", "from their places"],
    ),
    "carriers, where a stack counts": (
        "gemma2",
        [1],
        {},
        ["- The types of blocks are computed from their places by llama.cpp, which computes another function"],
        ["further block"],
    ),
    "embedding, untied": (
        "meta-llama--Llama-3.2-1B",
        [-1],
        {},
        [
            "what enters block 0 gains a fixed vector at every position. The base uses one matrix as input embedding",
            "only the input embedding holds the vector. Nothing was trained: apart from that, the weights are those",
            "| v-1 | embedding |",
            "| `model.embed_tokens.weight` | the vector was added to every row | F32 | 400 × 64 |",
            "1 other tensor was made:",
            "| `lm_head.weight` | a copy of `model.embed_tokens.weight`, which the base ties to it |",
            "`tie_word_embeddings: false`",
            "under `original/`; delete the created tensors; undo the changes of `config.json`",
        ],
        ["of zeros"],
    ),
    "embedding": (
        "openai-community--gpt2",
        [-1],
        {},
        ["| `transformer.wpe.weight` | the vector was added to every row |", "apart from what stores that vector"],
        ["one matrix", "other tensor"],
    ),
    "rank-one": (
        "gemma2",
        None,
        {"route": "rank_one"},
        [
            "gains approximately a fixed vector",
            "In the copy, 1 weight tensor has an addition that was fitted on calibration text by least squares",
            "is off by 7.1 % of the vector on average, and by at most 15 % for 95 % of the tokens. The next-token "
            "distributions are off by 2.1 % of what the steering changes (KL divergence).",
            "it is what the residual stream should gain.",
            "| 1 | 7.1 % | 15 % | 0.9961 | 98 % |",
            "The fit saw 9,000 tokens of calibration text; the numbers are of 1,000 tokens that it did not see (of "
            "both together, the model wrote 4,000 itself).",
            "this copy 0.0021 nats, the unsteered base 0.1 nats; the ratio is 0.021.",
            "the outer product of the vector and a fitted row was added to it",
            "(fitted, not exact; runtime cost: none)",
            "and the other factors of what was added (`right/`, `spread/`)",
            "write back the original values of the changed tensors",
        ],
        ["exactly as", "of zeros", "apart from what stores"],
    ),
    "rank-one, experts": (
        "mixtral",
        None,
        {"route": "rank_one"},
        ["In the copy, 4 weight tensors have an addition that was fitted"],
        ["was added to every row"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_card_says_what_its_route_did(tmp_path: Path, case: str) -> None:
    name, layers, options, said, not_said = CASES[case]
    card = card_of(*planned(tmp_path / "base", name, layers, **options))
    for words in said:
        assert words in card
    for words in not_said:
        assert words not in card
    assert "None" not in card and "\n\n\n" not in card and "{" not in card.split("```python")[0]
    assert ("## How well it fits" in card) == case.startswith("rank-one")


def test_advice_to_the_builder_is_reported_but_not_in_the_card(tmp_path: Path) -> None:
    plan, checkpoint = planned(tmp_path / "base", "Qwen--Qwen3-8B", None, route="carrier")
    plan = replace(plan, advice=("`prefer: free` takes the `relabel` route at no run-time cost",))
    written = manifest_of(plan, checkpoint)
    assert written.route.advice == list(plan.advice)
    assert "prefer: free" not in render_card(written, None)


def test_flags_draft_blocks_and_tokenizer_of_a_carrier(tmp_path: Path) -> None:
    plan, checkpoint = planned(tmp_path / "base", "Qwen--Qwen3-8B", None, route="carrier")
    draft = frozenset({"model.layers.4.eh_proj.weight"})
    outside = replace(plan.tensors[0], name="model.layers.0.self_attn.q_proj.bias", layer=None, make=None)
    plan = replace(plan, dropped=draft, tensors=(*plan.tensors, outside), tokenizer_changes={"tokenizer_class": "T"})
    card = card_of(plan, checkpoint)
    for words in (
        "Its blocks that only draft further tokens are left out.",
        "tensor of zeros in other blocks, which the changed configuration makes the class expect",
        "1 tensor of the base is left out, such as `model.layers.4.eh_proj.weight`.",
        'so that text becomes the same tokens as with the base: `tokenizer_class: "T"`.',
        "delete the tensors of zeros that were created in other blocks (`route.zeros`)",
        "take the tensors that were left out from the base",
        "take `tokenizer_config.json` from the base",
    ):
        assert words in card
