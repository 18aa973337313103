"""The registry covers the installed transformers: every causal LM has a row or a reason why it has none.

When transformers gains a model, this is the test that says so and prints what to add.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import transformers
from support.default_configs import NEEDED, default_config
from support.old_transformers import INSTALLED
from torch import nn
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as INSTALLED_TYPES

import patcher.architectures.registry as registry
from patcher.architectures.config_keys import block_count
from patcher.architectures.model_class import longest_module_list, on_meta, submodule
from patcher.architectures.registry import excluded, rows
from patcher.architectures.shrink import shrink_config

FOLDER = Path(registry.__file__).parent
ROWS_ARE_FOR = (5, 24)


def test_nothing_is_both_covered_and_excluded() -> None:
    assert not set(rows()) & set(excluded())
    raw = json.loads((FOLDER / "excluded.json").read_text(encoding="utf-8"))
    assert list(raw) == sorted(raw), "keep excluded.json in alphabetical order"
    assert all(len(reason.split()) > 2 for reason in raw.values()), "say why in words"


@pytest.mark.parametrize("model_type", sorted(INSTALLED_TYPES))
def test_every_causal_lm_of_transformers_has_a_row_or_a_reason(model_type: str) -> None:
    if model_type not in rows() and model_type not in excluded():
        pytest.fail(what_to_add(model_type), pytrace=False)


@pytest.mark.parametrize("model_type", [*rows(), *excluded()])
def test_transformers_still_has_it(model_type: str) -> None:
    if model_type not in INSTALLED_TYPES and INSTALLED < ROWS_ARE_FOR:
        pytest.skip(f"transformers {transformers.__version__} does not have `{model_type}` yet")
    assert model_type in INSTALLED_TYPES, (
        f"transformers {transformers.__version__} has no causal LM `{model_type}` any more. If the type was renamed, "
        "rename its row; if it was removed, remove the row once the oldest transformers that pyproject.toml allows "
        "lacks it too"
    )


@pytest.mark.parametrize("model_type", [name for name in rows() if name in INSTALLED_TYPES])
def test_the_row_describes_the_installed_class(model_type: str) -> None:
    row = rows()[model_type]
    assert INSTALLED_TYPES[model_type] == row.class_name, (
        f"correct `class` of `{model_type}` in rows.json, and look at the new class: is everything still there?"
    )
    config = default_config(model_type)
    layer = min(2, block_count(config) - 1)
    tiny, stand_in = shrink_config(config, layer)
    model = on_meta(tiny)
    assert type(model).__name__ == row.class_name
    blocks = submodule(model, row.blocks)
    assert isinstance(blocks, nn.ModuleList), (
        f"correct `blocks` of `{model_type}`: there is no list of blocks at {row.blocks!r}; the longest one is "
        f"{longest_module_list(model, block_count(tiny))!r}"
    )
    assert len(blocks) == block_count(tiny), f"`{model_type}`: patcher/architectures/shrink.py counts other blocks"
    if not row.slots:
        return
    found: set[str] = set()
    for place in {0, layer, block_count(config) - 1}:
        flagged, stand_in = shrink_config(config, place)
        for name, value in {**row.flags, **row.also}.items():
            setattr(flagged, name, value)
        block = on_meta(flagged).get_submodule(f"{row.blocks}.{stand_in}")
        found |= {name for name, _ in block.named_parameters()} & set(row.slots)
    assert found, f"`{model_type}`: none of {list(row.slots)} exists with {dict(row.flags) or 'its own config'}"


@pytest.mark.slow_but("bert", "falcon_h1", "gemma3_text", "gpt2", "jamba", "llama", "mixtral", "olmo2", "qwen3_moe")
@pytest.mark.parametrize("model_type", [name for name in rows() if name in INSTALLED_TYPES])
def test_the_stand_in_of_every_kind_of_block_is_of_that_kind(model_type: str) -> None:
    """What is proven on a stand-in of another kind is proven of nothing."""
    config = default_config(model_type)
    types = getattr(config, "layer_types", None)

    def kinds(of: Any, model: nn.Module) -> list[tuple[str, ...]]:
        blocks, names = model.get_submodule(rows()[model_type].blocks), getattr(of, "layer_types", None)
        # Zamba2 numbers its adapters by the block that they belong to.
        parts = [{re.sub(r"\.\d+\.\d+\.", ".", name) for name, _ in block.named_parameters()} for block in blocks]
        return [(*sorted(part), names[at] if types else "") for at, part in enumerate(parts)]

    real = kinds(config, on_meta(config))
    for layer in {kind: layer for layer, kind in reversed(list(enumerate(real)))}.values():
        tiny, stand_in = shrink_config(config, layer)
        assert kinds(tiny, on_meta(tiny))[stand_in] == real[layer], f"teach shrink.py how block {layer} gets its kind"


def what_to_add(model_type: str) -> str:
    """For whoever raises the version of transformers: the line to add, as far as it can be known."""
    version = transformers.__version__
    head = f"transformers {version} has a causal LM that the registry does not know: `{model_type}`.\n"
    line = {"class": INSTALLED_TYPES[model_type], "blocks": "?", "loads": {"vllm": "no", "llama.cpp": "no"}}
    try:
        config = default_config(model_type)
        if hasattr(config, "text_config") and not hasattr(config, "num_hidden_layers"):
            reason = f"a multimodal wrapper: its text decoder is {config.text_config.model_type}"
            return (
                f"{head}It looks like a wrapper. Add to patcher/architectures/excluded.json:\n"
                f"  {json.dumps({model_type: reason})[1:-1]}"
            )
        tiny, _ = shrink_config(config, min(2, block_count(config) - 1))
        model = on_meta(tiny)
        line["blocks"] = longest_module_list(model, block_count(tiny)) or "?"
        flags = [name for name, value in vars(config).items() if value is False and "bias" in name]
        biases = [name for name, _ in model.named_parameters() if f"{line['blocks']}.0." in name and "bias" in name]
        found = f"Its block 0 has the biases {biases}; its config has the flags {flags}."
    except Exception as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        found = (
            f"Its default config makes no small model ({first}): add what it lacks to NEEDED in "
            "tests/support/default_configs.py, or its sizes to patcher/architectures/shrink.py."
        )
    return (
        f"{head}{found}\nAdd to patcher/architectures/rows.json, in alphabetical order:\n"
        f"  {json.dumps(model_type)}: {json.dumps(line)},\n"
        "`loads`: native, if vLLM's and llama.cpp's lists of models name the class; backend, if only vLLM's "
        "Transformers backend takes it. `slots`, `flags`, `scale` and `stacks` only if a block has (or a flag creates) "
        "a bias after its MLP; without them the class is analysed when it is used. If it is no text causal LM of "
        "decoder blocks, add it to excluded.json with a reason instead. Then run "
        f"`python tests/conformance/all_architectures.py --only {model_type}`."
    )


def test_a_new_model_gets_its_exact_line(monkeypatch: pytest.MonkeyPatch) -> None:
    text = what_to_add("llama")
    assert '"llama": {"class": "LlamaForCausalLM", "blocks": "model.layers", "loads": ' in text
    assert "mlp_bias" in text
    assert '"gemma3": "a multimodal wrapper: its text decoder is gemma3_text"' in what_to_add("gemma3")
    monkeypatch.setitem(NEEDED, "llama", {"hidden_act": None, "num_hidden_layers": "four"})
    assert "NEEDED" in what_to_add("llama")


def test_needed_names_known_types() -> None:
    unknown = [name for name in NEEDED if name not in rows() and name not in excluded()]
    assert not unknown
    if INSTALLED >= ROWS_ARE_FOR:
        assert all(name in CONFIG_MAPPING for name in NEEDED)
