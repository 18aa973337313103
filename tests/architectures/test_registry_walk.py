"""The installed transformers is what is walked: every causal LM is analysed, and the rows say what is not seen.

When transformers gains a model that cannot be analysed, this is the test that says so and prints what to add.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import transformers
from support.default_configs import NEEDED, TEXT_TYPES, default_config
from support.old_transformers import INSTALLED
from torch import nn

import patcher.architectures.registry as registry
from patcher.architectures.class_listing import ClassListing
from patcher.architectures.config_keys import block_count
from patcher.architectures.installed import language_models, multimodal_models, text_models
from patcher.architectures.model_class import longest_module_list, on_meta, submodule
from patcher.architectures.registry import excluded, rows
from patcher.architectures.shrink import shrink_config
from patcher.stacks.names import TRANSFORMERS_ALONE

FOLDER = Path(registry.__file__).parent
ROWS_ARE_FOR = (5, 24)


def test_nothing_is_both_covered_and_excluded() -> None:
    assert not set(rows()) & set(excluded())
    raw = json.loads((FOLDER / "excluded.json").read_text(encoding="utf-8"))
    assert list(raw) == sorted(raw), "keep excluded.json in alphabetical order"
    assert all(len(reason.split()) > 2 for reason in raw.values()), "say why in words"


@pytest.mark.parametrize("model_type", sorted({*rows(), *excluded()}))
def test_transformers_still_has_it(model_type: str) -> None:
    installed = {**multimodal_models(), **text_models()}
    if model_type not in installed and INSTALLED < ROWS_ARE_FOR:
        pytest.skip(f"transformers {transformers.__version__} does not have `{model_type}` yet")
    assert model_type in installed, (
        f"transformers {transformers.__version__} has no language model `{model_type}` any more. If it was renamed, "
        "rename its row; if it was removed, remove the row once the oldest transformers that pyproject.toml allows "
        "lacks it too"
    )


def test_no_row_says_what_is_seen() -> None:
    for name, row in rows().items():
        said = {key for key, value in vars(row).items() if value and key not in ("loads", "stacks")}
        assert said or row.loads != {**TRANSFORMERS_ALONE, "vllm": "no", "llama.cpp": "no"}, f"remove the row `{name}`"


@pytest.mark.parametrize("model_type", TEXT_TYPES)
def test_every_causal_lm_of_transformers_is_analysed(model_type: str) -> None:
    row = rows().get(model_type)
    try:
        config = default_config(model_type)
        layer = min(2, block_count(config) - 1)
        tiny, stand_in = shrink_config(config, layer)
        model = on_meta(tiny)
        blocks = ClassListing.of(model, tiny, row).blocks
    except Exception as error:
        pytest.fail(what_to_add(model_type, error), pytrace=False)
    assert type(model).__name__ == text_models()[model_type]
    assert len(submodule(model, blocks)) == block_count(tiny), (
        f"`{model_type}`: patcher/architectures/shrink.py counts other blocks"
    )
    if row is not None and row.blocks is not None:
        assert row.blocks != longest_module_list(model, block_count(tiny)), f"`{model_type}`: `blocks` is seen"
    if row is None or not row.slots:
        return
    found: set[str] = set()
    for place in {0, layer, block_count(config) - 1}:
        flagged, stand_in = shrink_config(config, place)
        for name, value in {**row.flags, **row.also}.items():
            setattr(flagged, name, value)
        block = on_meta(flagged).get_submodule(f"{blocks}.{stand_in}")
        found |= {name for name, _ in block.named_parameters()} & set(row.slots)
    assert found, f"`{model_type}`: none of {list(row.slots)} exists with {dict(row.flags) or 'its own config'}"


@pytest.mark.slow_but("bert", "falcon_h1", "gemma3_text", "gpt2", "jamba", "llama", "mixtral", "olmo2", "qwen3_moe")
@pytest.mark.parametrize("model_type", TEXT_TYPES)
def test_the_stand_in_of_every_kind_of_block_is_of_that_kind(model_type: str) -> None:
    """What is proven on a stand-in of another kind is proven of nothing."""
    config = default_config(model_type)
    types = getattr(config, "layer_types", None)

    def kinds(of: Any, model: nn.Module) -> list[tuple[str, ...]]:
        path = ClassListing.of(model, of, rows().get(model_type)).blocks
        blocks, names = model.get_submodule(path), getattr(of, "layer_types", None)
        # Zamba2 numbers its adapters by the block that they belong to.
        parts = [{re.sub(r"\.\d+\.\d+\.", ".", name) for name, _ in block.named_parameters()} for block in blocks]
        return [(*sorted(part), names[at] if types else "") for at, part in enumerate(parts)]

    real = kinds(config, on_meta(config))
    for layer in {kind: layer for layer, kind in reversed(list(enumerate(real)))}.values():
        tiny, stand_in = shrink_config(config, layer)
        assert kinds(tiny, on_meta(tiny))[stand_in] == real[layer], f"teach shrink.py how block {layer} gets its kind"


def what_to_add(model_type: str, error: Exception) -> str:
    """For whoever raises the version of transformers: what the analysis lacks."""
    first = (str(error).splitlines() or [type(error).__name__])[0]
    return (
        f"transformers {transformers.__version__} has a causal LM that cannot be analysed: `{model_type}` ({first}).\n"
        "If its default config makes no small model, add what it lacks to NEEDED in "
        "patcher/architectures/default_configs.py, or its sizes to patcher/architectures/shrink.py. If it is no text "
        "causal LM of decoder blocks, add it to patcher/architectures/excluded.json with a reason. Then run "
        f"`python tests/conformance/all_architectures.py --only {model_type}`."
    )


def test_a_new_model_that_fails_is_told_where_to_add_what(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NEEDED, "llama", {"hidden_act": None, "num_hidden_layers": "four"})
    with pytest.raises(pytest.fail.Exception, match="NEEDED"):
        test_every_causal_lm_of_transformers_is_analysed("llama")


def test_needed_names_known_types() -> None:
    if INSTALLED >= ROWS_ARE_FOR:
        assert all(name in language_models() for name in NEEDED)
