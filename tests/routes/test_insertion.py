"""One more block in a config, and the comparison that finds what it would change."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.default_configs import default_config
from support.families import families, family_base
from support.tiny_patch import planned
from transformers.models.qwen3 import modeling_qwen3

from patcher.architectures.analysis import Architecture
from patcher.architectures.model_class import on_meta
from patcher.architectures.registry import rows
from patcher.routes.carrier.guard import block_kinds, require_neutral
from patcher.routes.carrier.insertion import CannotInsert, insert_blocks
from patcher.routes.plan import Plan


def inserted(model_type: str, layer: int, template: int | None = None, *, dense: bool = False, **changes: Any) -> Any:
    """The insertion after ``layer`` of a default config, held to the base."""
    config = default_config(model_type)
    for name, value in changes.items():
        setattr(config, name, value)
    insertion = insert_blocks(config, [layer], {layer: layer if template is None else template}, dense=dense)
    require_neutral(on_meta(config), insertion, Architecture(config).blocks)
    return insertion


def test_a_list_with_an_entry_a_layer_gains_the_templates() -> None:
    before = default_config("gemma3_text").layer_types
    insertion = inserted("gemma3_text", 4, template=5)
    assert insertion.changes["layer_types"] == [*before[:5], before[5], *before[5:]]
    assert insertion.changes["num_hidden_layers"] == len(before) + 1
    assert before[5] != before[4]


def test_a_list_that_is_derived_from_the_index_is_written_out() -> None:
    insertion = inserted("qwen3", 3)
    assert insertion.changes["layer_types"] == ["full_attention"] * 33


def test_several_blocks_are_inserted_at_once() -> None:
    config = default_config("cohere2")
    insertion = insert_blocks(config, [7, 2], {2: 2, 7: 3})
    types = config.layer_types
    assert insertion.copy_layers == {2: 3, 7: 9}
    assert [insertion.moved(block) for block in (2, 3, 7, 8)] == [2, 4, 8, 10]
    assert insertion.changes["layer_types"] == [*types[:3], types[2], *types[3:8], types[3], *types[8:]]
    require_neutral(on_meta(config), insertion, "model.layers")


def test_lists_of_indices_are_shifted() -> None:
    config = default_config("llama4_text")
    config.moe_layers = [1, 3, 5, 7]
    insertion = insert_blocks(config, [3], {3: 3})
    assert insertion.changes["moe_layers"] == [1, 3, 4, 6, 8]
    assert insert_blocks(config, [3], {3: 2}).changes["moe_layers"] == [1, 3, 6, 8]
    nested = default_config("qwen3")
    nested.hybrid = {"full_attn_layers": [4, 8, 32], "kda_layers": [1, 2, 3]}  # counted from 1
    changed = insert_blocks(nested, [2], {2: 3}).changes["hybrid"]
    assert changed == {"full_attn_layers": [4, 5, 9, 33], "kda_layers": [1, 2, 3]}


def test_settings_of_single_blocks_move_with_them() -> None:
    config = default_config("gemma4_text")
    config.hidden_size_per_layer_input = 0
    own = config.to_dict()["per_layer_config"]
    assert list(own) == ["05", "11", "17", "23", "29"]
    insertion = insert_blocks(config, [5], {5: 5})
    assert list(insertion.changes["per_layer_config"]) == ["05", "06", "12", "18", "24", "30"]
    require_neutral(on_meta(config), insertion, "model.layers")
    assert "id2label" not in insert_blocks(config, [0], {0: 0}).changes


def test_counts_of_first_blocks_grow_with_what_is_inserted_among_them() -> None:
    assert inserted("deepseek_v3", 1).changes["first_k_dense_replace"] == 4
    assert "first_k_dense_replace" not in inserted("deepseek_v3", 30).changes
    with pytest.raises(CannotInsert, match=r"the inserted block: mlp"):
        inserted("deepseek_v3", 30, template=0)


def test_token_lists_are_left_alone() -> None:
    config = default_config("qwen3")
    config.num_hidden_layers, config.layer_types, config.eos_token_id = 4, ["full_attention"] * 4, [1, 2, 3, 4]
    assert "eos_token_id" not in insert_blocks(config, [1], {1: 1}).changes


def test_a_dense_block_among_experts() -> None:
    insertion = inserted("qwen3_moe", 5, dense=True)
    assert insertion.changes["mlp_only_layers"] == [6]
    assert inserted("mellum", 5, dense=True).changes["mlp_layer_types"][5:8] == ["sparse", "dense", "sparse"]
    with pytest.raises(CannotInsert, match="a single block of it dense"):
        inserted("deepseek_v3", 30, dense=True)


def test_draft_blocks_are_declared_gone() -> None:
    assert inserted("glm4_moe", 5, num_nextn_predict_layers=1).changes["num_nextn_predict_layers"] == 0


@pytest.mark.parametrize(
    ("model_type", "layer", "found"),
    [
        ("diffllama", 5, r"block 6: self_attn\.lambda_init"),
        ("jamba", 5, r"block 6: feed_forward"),
        ("minimax", 5, "num_hidden_layers"),
        ("gemma3n_text", 19, r"block 19: self_attn\.store_full_length_kv"),
        ("beam", 20, "residual_add_idx"),
        ("gpt_neox_japanese", 31, r"block 31: attention\.dense_bias"),
    ],
)
def test_what_a_class_computes_from_the_index_is_found(model_type: str, layer: int, found: str) -> None:
    with pytest.raises(CannotInsert, match=found):
        inserted(model_type, layer)


def test_a_block_that_reads_anothers_cache_must_still_read_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    original = modeling_qwen3.Qwen3DecoderLayer.__init__

    def shared_with(source: Any) -> Any:
        def init(self: Any, config: Any, layer_idx: int) -> None:
            original(self, config, layer_idx)
            self.kv_shared_layer_idx = source(config, layer_idx)

        return init

    def use(source: Any) -> None:
        monkeypatch.setattr(modeling_qwen3.Qwen3DecoderLayer, "__init__", shared_with(source))

    def last_six(config: Any, index: int) -> bool:
        return index >= config.num_hidden_layers - 6

    use(lambda config, index: 9 if last_six(config, index) else None)
    inserted("qwen3", 12)
    with pytest.raises(CannotInsert, match="block 26: kv_shared_layer_idx"):
        inserted("qwen3", 4)
    use(lambda config, index: config.num_hidden_layers - 7 if last_six(config, index) else None)
    inserted("qwen3", 4)
    with pytest.raises(CannotInsert, match="kv_shared_layer_idx"):
        inserted("qwen3", 25)


@pytest.mark.parametrize(
    "value", [lambda index: 1.0 / (index + 1), lambda index: index % 4 == 3, lambda index: {"a": index}]
)
def test_a_doctored_class_is_refused(monkeypatch: pytest.MonkeyPatch, value: Any) -> None:
    original = modeling_qwen3.Qwen3MLP.__init__
    built = iter(range(10_000))

    def init(self: Any, config: Any) -> None:
        original(self, config)
        self.depth = value(next(built) % config.num_hidden_layers)

    monkeypatch.setattr(modeling_qwen3.Qwen3MLP, "__init__", init)
    config = default_config("qwen3")
    insertion = insert_blocks(config, [3], {3: 3})
    with pytest.raises(CannotInsert, match=r"changes .*block.*mlp\.depth"):
        base = on_meta(config)
        built = iter(range(10_000))
        require_neutral(base, insertion, "model.layers")


def test_blocks_of_one_type_are_recognised() -> None:
    kinds = block_kinds(on_meta(default_config("gemma3_text")), "model.layers")
    assert len(set(kinds)) == 2 and kinds[0] == kinds[4] != kinds[5] == kinds[11]


def test_block_types_are_written_in_the_words_of_the_release(tmp_path: Path) -> None:
    """transformers reads `mamba` as `linear_attention`; llama.cpp's converter knows the release's word only."""
    plan = hybrid_plan(tmp_path)
    types = plan.config_changes["layer_types"]
    assert len(types) > 6 and set(types) == {"mamba", "attention"}


def test_a_flag_of_inserted_blocks_is_read_where_that_was_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = hybrid_plan(tmp_path)
    if "attention_bias" not in plan.config_changes:
        pytest.skip("a block without a flag carries the vector")
    assert set(plan.stacks.values()) == {"native"}
    row = replace(rows()["granitemoehybrid"], block_flags={"attention_bias": ("vllm",)})
    monkeypatch.setattr(Architecture, "row", row)
    plan = planned(tmp_path / "base", [3], route="carrier")
    assert (plan.stacks["vllm"], plan.stacks["llama.cpp"]) == ("native", "no")


def hybrid_plan(place: Path) -> Plan:
    family = next(family for family in families() if family.title == "Granite 4 (hybrid)")
    family_base(family, place / "base")
    return planned(place / "base", [family.layer], route="carrier")
