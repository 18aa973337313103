"""The stand-in keeps the structure of the released config and of the chosen block; everything else is made small."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from support.old_transformers import is_too_old
from support.tiny_models import parsed_config, released_config, released_names
from transformers import CONFIG_MAPPING

from patcher.architectures.analysis import Architecture
from patcher.architectures.config_keys import block_count
from patcher.architectures.model_class import (
    causal_lm_from_config,
    longest_module_list,
    on_meta,
    parameter_shapes,
    quiet_transformers,
)
from patcher.architectures.shrink import HIDDEN, LAYERS, VOCABULARY, shrink_config

NAMES = [name for name in released_names() if not is_too_old(name)]
PLACES = ("first", "middle", "last")


@functools.cache
def released(name: str) -> Any:
    """The parsed config of a fixture; of a multimodal wrapper its text decoder's."""
    with tempfile.TemporaryDirectory() as scratch:
        config = parsed_config(released_config(name), Path(scratch))
    return config if hasattr(config, "num_hidden_layers") else config.text_config


def layer_at(config: Any, place: str) -> int:
    count = block_count(config)
    return {"first": 0, "middle": count // 2, "last": count - 1}[place]


def head_counts(config: Any) -> tuple[int, int]:
    """Query heads and key-value heads, in whatever way the config says them."""
    heads = config.num_attention_heads
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
        return heads, 1
    for name in ("num_key_value_heads", "num_kv_heads"):
        if getattr(config, name, None) is not None:
            return heads, getattr(config, name)
    return heads, heads


def attention_kind(config: Any) -> str:
    heads, shared = head_counts(config)
    assert heads % shared == 0
    return "mha" if shared == heads else "mqa" if shared == 1 else "gqa"


def per_layer_lists(config: Any) -> dict[str, list[Any]]:
    count = block_count(config)
    return {
        name: list(value)
        for name, value in vars(config).items()
        if isinstance(value, (list, tuple)) and len(value) == count
    }


def block_parameters(config: Any, layer: int) -> set[str]:
    """Names and ranks of what the class creates in one block."""
    model = on_meta(config)
    blocks = longest_module_list(model, block_count(config))
    prefix = f"{blocks}.{layer}."
    shapes = parameter_shapes(model)
    found = {f"{name.removeprefix(prefix)} {len(shape)}" for name, shape in shapes.items() if name.startswith(prefix)}
    assert found
    return found


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", NAMES)
def test_structure_is_kept(name: str, place: str) -> None:
    config = released(name)
    tiny, _ = shrink_config(config, layer_at(config, place))
    for key, value in vars(config).items():
        # Flags, names of activations and position encodings, multipliers, epsilons: all but sizes.
        if key.startswith("_") or key == "transformers_version":
            continue
        if isinstance(value, (bool, str, float, type(None))):
            assert getattr(tiny, key) == value, key
    assert tiny.tie_word_embeddings == config.tie_word_embeddings
    assert attention_kind(tiny) == attention_kind(config)
    assert getattr(tiny, "sliding_window", None) == getattr(config, "sliding_window", None)
    for key in ("rope_parameters", "rope_scaling"):
        rope, small = vars(config).get(key), vars(tiny).get(key)
        if isinstance(rope, dict):
            assert rope.keys() == small.keys()
            assert {k: v for k, v in rope.items() if isinstance(v, (str, float, int))} == {
                k: v for k, v in small.items() if isinstance(v, (str, float, int))
            }
    rotary = getattr(config, "rotary_dim", None)
    if rotary is not None:
        assert (rotary < config.hidden_size // config.num_attention_heads) == (
            tiny.rotary_dim < tiny.hidden_size // tiny.num_attention_heads
        )


@pytest.mark.slow_but("*-middle")
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", NAMES)
def test_the_stand_in_has_the_parameters_of_the_block_it_stands_for(name: str, place: str) -> None:
    config = released(name)
    layer = layer_at(config, place)
    tiny, stand_in = shrink_config(config, layer)
    assert block_parameters(tiny, stand_in) == block_parameters(config, layer)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_small(name: str) -> None:
    config = released(name)
    tiny, _ = shrink_config(config, block_count(config) // 2)
    assert (tiny.vocab_size, tiny.hidden_size) == (VOCABULARY, HIDDEN) == (256, 64)
    assert block_count(tiny) == min(LAYERS, block_count(config))
    model = causal_lm_from_config(tiny)
    assert sum(parameter.numel() for parameter in model.parameters()) < 2_000_000
    with quiet_transformers():
        assert type(model) is type(on_meta(config))


@pytest.mark.parametrize("name", NAMES)
def test_the_stand_in_is_first_in_the_middle_or_last_as_the_block_is(name: str) -> None:
    config = released(name)
    places = {}
    for place in PLACES:
        tiny, stand_in = shrink_config(config, layer_at(config, place))
        places[place] = stand_in
        last = block_count(tiny) - 1
    assert places["first"] == 0
    assert places["last"] == last
    assert 0 < places["middle"] < last, "a block in the middle has one before it and one after it"


def test_the_config_that_is_shrunk_is_left_alone() -> None:
    for name in NAMES:
        config = released(name)
        before = config.to_dict()
        shrink_config(config, 1)
        assert config.to_dict() == before


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_every_layer_keeps_its_own_entry_of_every_list(data: st.DataObject) -> None:
    config = released(data.draw(st.sampled_from(NAMES)))
    count = block_count(config)
    layer = data.draw(st.integers(0, count - 1))
    tiny, stand_in = shrink_config(config, layer)
    assert block_count(tiny) == min(LAYERS, count)
    assert 0 <= stand_in < block_count(tiny)
    assert (stand_in == 0) == (layer == 0)
    assert (stand_in == block_count(tiny) - 1) == (layer == count - 1)
    for key, values in per_layer_lists(config).items():
        small = getattr(tiny, key)
        assert len(small) == block_count(tiny), key
        assert small[stand_in] == values[layer], key
        if layer + 1 < count:
            assert small[stand_in + 1] == values[layer + 1], f"{key}: the block that reads the shifted residual"


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_any_depth_and_any_layer(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 200))
    layer = data.draw(st.integers(0, count - 1))
    with quiet_transformers():
        types = ["full_attention" if index % 3 == 2 else "sliding_attention" for index in range(count)]
        config = CONFIG_MAPPING["gemma3_text"](num_hidden_layers=count, layer_types=types)
    tiny, stand_in = shrink_config(config, layer)
    assert tiny.num_hidden_layers == len(tiny.layer_types) == min(LAYERS, count)
    assert tiny.layer_types[stand_in] == types[layer]


# Where the kind of a block follows from its index


@pytest.mark.slow_but("deepseek_v3-*", "qwen3_moe-*")
@pytest.mark.parametrize(
    ("model_type", "changes", "special", "marker"),
    [
        ("deepseek_v2", {"first_k_dense_replace": 3}, {0, 1, 2}, "mlp.gate_proj.weight"),
        ("deepseek_v3", {"first_k_dense_replace": 3}, {0, 1, 2}, "mlp.gate_proj.weight"),
        ("ernie4_5_moe", {"moe_layer_start_index": 3}, {0, 1, 2}, "mlp.gate_proj.weight"),
        ("ernie4_5_moe", {"moe_layer_interval": 2, "moe_layer_end_index": 9}, {0, 2, 4, 6, 8, *range(10, 28)},
         "mlp.gate_proj.weight"),
        ("bamba", {"attn_layer_indices": [9, 18, 27]}, {9, 18, 27}, "self_attn.q_proj.weight"),
        ("zamba2", {}, {6, 12, 18, 24, 30, 36, 42, 47, 51}, "linear.weight"),
        ("qwen3_moe", {"mlp_only_layers": [0, 5]}, {0, 5}, "mlp.gate_proj.weight"),
        ("granitemoeshared", {"shared_intermediate_size": 0}, set(), "shared_mlp.input_linear.weight"),
        ("granitemoeshared", {"shared_intermediate_size": 1024}, set(range(32)), "shared_mlp.input_linear.weight"),
    ],
)  # fmt: skip
def test_a_kind_that_follows_from_the_index_is_kept(
    model_type: str, changes: dict[str, Any], special: set[int], marker: str
) -> None:
    with quiet_transformers():
        config = CONFIG_MAPPING[model_type](**changes)
    architecture = Architecture(config)
    for layer in range(architecture.block_count):
        assert (f"{architecture.blocks}.{layer}.{marker}" in architecture.parameters) == (layer in special)
        tiny, stand_in = shrink_config(config, layer)
        shapes = parameter_shapes(on_meta(tiny))
        assert (f"{architecture.blocks}.{stand_in}.{marker}" in shapes) == (layer in special), layer


def test_a_decoder_beside_an_encoder_counts_its_own_blocks() -> None:
    """``num_hidden_layers`` of these configs is the encoder's."""
    with quiet_transformers():
        config = CONFIG_MAPPING["blenderbot"](encoder_layers=2, decoder_layers=24)
    tiny, stand_in = shrink_config(config, 12)
    assert (block_count(config), block_count(tiny)) == (24, LAYERS)
    assert stand_in == 1
    assert Architecture(config).block_count == 24


def test_opt_350m_keeps_its_narrow_embedding() -> None:
    config = released("facebook--opt-350m")
    tiny, _ = shrink_config(config, 3)
    assert (config.word_embed_proj_dim, config.hidden_size) == (512, 1024)
    assert tiny.word_embed_proj_dim < tiny.hidden_size


def new_config(model_type: str, **values: Any) -> Any:
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no `{model_type}`")
    return CONFIG_MAPPING[model_type](**values)


@pytest.mark.parametrize(("layer", "parts"), [(0, (2, 1, 1)), (2, (3, 1, 1)), (8, (1, 2, 1)), (35, (2, 1, 1))])
def test_blocks_before_in_and_after_a_loop_stay_there(layer: int, parts: tuple[int, int, int]) -> None:
    config = new_config("dory")
    tiny, stand_in = shrink_config(config, layer)
    assert (tiny.n_input_layers, tiny.n_recurrent_layers, tiny.n_output_layers) == parts
    assert tiny.n_recurrent_loops == config.n_recurrent_loops and block_count(tiny) == sum(parts)
    assert tiny.layer_types[stand_in] == config.layer_types[layer]
    on_meta(tiny)


@pytest.mark.parametrize("model_type", ["inkling2_text", "inkling2_loop_text"])
def test_a_vocabulary_without_its_padding_is_small_too(model_type: str) -> None:
    tiny, _ = shrink_config(new_config(model_type, unpadded_vocab_size=200058), 2)
    assert tiny.vocab_size == tiny.unpadded_vocab_size == VOCABULARY
    with quiet_transformers():
        assert causal_lm_from_config(tiny) is not None
