"""A decoder's config remembers its wrapper, and a config.json is changed where the decoder's keys are."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from support.tiny_wrappers import tiny_wrapper

from patcher.architectures.analysis import Architecture
from patcher.architectures.decoder import (
    checkpoint_config,
    decoder_config,
    decoder_part,
    own_values,
    put_inside,
    with_changes,
    wrapper_of,
)
from patcher.architectures.model_class import auto_class_of, on_meta
from patcher.architectures.registry import rows, rows_inside
from patcher.architectures.shrink import shrink_config
from patcher.architectures.stand_in import build_stand_in
from patcher.architectures.towers import towers_of


@pytest.fixture(scope="module")
def gemma3(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny_wrapper("gemma3", tmp_path_factory.mktemp("gemma3"))


def test_a_text_model_is_its_own_decoder() -> None:
    from patcher.architectures.default_configs import default_config

    config = default_config("llama")
    assert decoder_config(config) is config and checkpoint_config(config) is config and wrapper_of(config) is None
    assert auto_class_of(config) == "AutoModelForCausalLM"


def test_there_and_back(gemma3: Any) -> None:
    text = decoder_config(gemma3.config)
    assert text.model_type == "gemma3_text" and decoder_config(text) is text
    changed = copy.deepcopy(text)
    changed.num_hidden_layers, changed.layer_types = 2, text.layer_types[:2]
    read = type(changed).from_dict(changed.to_dict())
    for config in (changed, read):
        whole = checkpoint_config(config)
        assert type(whole) is type(gemma3.config) and whole.text_config.num_hidden_layers == 2
        assert len(on_meta(config).get_submodule("model.language_model.layers")) == 2
    assert gemma3.config.text_config.num_hidden_layers != 2
    assert not [key for key in checkpoint_config(text).to_dict()["text_config"] if key.startswith("_wrapper")]
    assert not [key for key in own_values(text) if key.startswith("_wrapper")]


def test_a_wrapper_may_take_no_other_decoder() -> None:
    from patcher.architectures.default_configs import default_config

    other = default_config("qwen2")
    with pytest.raises(ValueError, match="takes no decoder"):
        put_inside(other, decoder_config(default_config("qwen2_5_vl")))


def test_towers_of_a_stand_in_have_no_weights(gemma3: Any) -> None:
    assert towers_of(gemma3) == ("model.vision_tower",)
    tiny, _ = shrink_config(Architecture(gemma3.config).config, 1)
    model = build_stand_in(tiny, trust_remote_code=False)
    on_meta_now = {name for name, parameter in model.named_parameters() if parameter.is_meta}
    assert on_meta_now and all(name.startswith("model.vision_tower.") for name in on_meta_now)


def test_changes_go_where_the_decoders_keys_are() -> None:
    nested = {"model_type": "w", "architectures": ["W"], "text_config": {"num_hidden_layers": 4, "a": 1}}
    changed = with_changes(nested, {"num_hidden_layers": 5, "a": None, "architectures": ["V"]})
    assert changed == {"model_type": "w", "architectures": ["V"], "text_config": {"num_hidden_layers": 5}}
    untied = with_changes(nested, {"tie_word_embeddings": False})
    assert untied["tie_word_embeddings"] is False and untied["text_config"]["tie_word_embeddings"] is False
    other = {"model_type": "llama", "architectures": ["L"]}
    assert with_changes(nested, {}, other) == {**nested, "text_config": other}
    flat = {"model_type": "w", "num_hidden_layers": 4, "vision_config": {}}
    assert with_changes(flat, {"num_hidden_layers": 5}) == {**flat, "num_hidden_layers": 5}
    assert decoder_part(flat) is flat and decoder_part(nested) == nested["text_config"]


def test_which_stacks_read_a_wrapper_is_known_of_the_wrapper_and_the_decoder_in_it(tmp_path: Path) -> None:
    """Of a wrapper that no other stack was run on, nothing of what reads its decoder alone is claimed."""
    for name, read in (("gemma3", {"transformers", "vllm", "llama.cpp"}), ("llava", {"transformers"})):
        architecture = Architecture(tiny_wrapper(name, tmp_path / name).config)
        assert {stack for stack, support in architecture.loads.items() if support != "no"} == read
        assert {stack for stack, support in architecture.stacks.items() if support != "no"} <= read
    alone = rows()["llama"]
    inside = rows_inside()["mistral3"]["llama"]
    assert (inside.slots, inside.flags, inside.stacks["vllm"]) == (alone.slots, alone.flags, "native")
    assert rows_inside()["gemma3"]["gemma3_text"].patterns == rows()["gemma3_text"].patterns
