"""What a config states, where its blocks differ in it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from patcher.architectures.analysis import Architecture
from patcher.architectures.config_keys import block_count, of_block, stated, whole_number, windows
from patcher.architectures.default_configs import default_config
from patcher.architectures.model_class import quiet_transformers
from patcher.architectures.shrink import shrink_config
from patcher.capture.reader import token_budget
from patcher.capture.shared_prefixes import exactness, linear_tokens
from patcher.routes.inspection import Demands, inspect_config
from patcher.routes.relabel.guards import even_heads, has_window

MODELS = Path(transformers.__file__).parent / "models"
PACKAGE = Path(__file__).parents[2] / "patcher"


def heterogeneous() -> dict[str, Any]:
    """Model type -> default config, of all installed types whose blocks may differ in an attribute."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES, model_type_to_module_name

    found = {}
    for model_type in CONFIG_MAPPING_NAMES:
        code = (MODELS / model_type_to_module_name(model_type)).glob("configuration_*.py")
        if not any("per_layer_config" in path.read_text(encoding="utf-8") for path in code):
            continue
        try:
            config = default_config(model_type)
        except Exception:
            # A class that makes no config without being told what is in it.
            continue
        if getattr(config, "per_layer_attributes", None):
            found[model_type] = config
    return found


def causal() -> list[str]:
    """Those of them that a stock loader makes a causal LM of."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return [model_type for model_type in heterogeneous() if model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]


def test_an_attribute_that_differs_from_block_to_block_is_not_stated_for_all() -> None:
    found = heterogeneous()
    if not found:
        pytest.skip("this transformers has no config whose blocks differ")
    for model_type, config in found.items():
        differing = sorted(config.per_layer_attributes)
        for name in differing:
            with pytest.raises(RuntimeError):
                getattr(config, name, None)
            assert stated(config, name) is None, model_type
            assert stated(config, name, 7) == 7
            assert whole_number(config, name) is None
            of_blocks = [getattr(of_block(config, layer), name) for layer in range(block_count(config))]
            assert len({repr(value) for value in of_blocks}) > 1, (model_type, name)
        assert stated(config, "model_type") == config.model_type
        windows(config), even_heads(config), has_window(config)
        token_budget(config, torch.device("cpu"), torch.float32)


def test_of_other_configs_a_block_has_the_whole_config() -> None:
    config = default_config("llama")
    assert of_block(config, 3) is config
    assert stated(config, "head_dim") == config.head_dim
    assert stated(config, "no_such_key") is None
    assert stated(None, "hidden_size", 3) == 3


@pytest.mark.slow
@pytest.mark.parametrize("model_type", causal())
def test_a_model_whose_blocks_differ_is_analysed_shrunk_and_its_capture_planned(model_type: str) -> None:
    with quiet_transformers():
        architecture = Architecture(default_config(model_type))
        layer = architecture.block_count // 2
        assert linear_tokens(architecture) > 0
        tiny, stand_in = shrink_config(architecture.config, layer)
        assert 0 <= stand_in < block_count(tiny)
        exactness(architecture, layer)
    assert inspect_config(model_type, architecture.config, None, Demands()).verdicts


def unguarded(code: str) -> Iterator[int]:
    """Lines that read an attribute of a config, with a default, past the accessor."""
    for node in ast.walk(ast.parse(code)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
            continue
        with_default = (node.func.id == "getattr" and len(node.args) == 3) or node.func.id == "hasattr"
        if with_default and ast.unparse(node.args[0]).split(".")[-1] in ("config", "tiny", "tiny_config"):
            yield node.lineno


def test_configs_are_read_through_the_accessor() -> None:
    # What runs in an environment of a stock stack cannot import it.
    paths = [path for path in PACKAGE.rglob("*.py") if path.parent.name != "programs"]
    found = [
        f"{path.relative_to(PACKAGE)}:{line}"
        for path in paths
        if path.name != "config_keys.py"
        for line in unguarded(path.read_text(encoding="utf-8"))
    ]
    assert not found, "use patcher.architectures.config_keys.stated"


@pytest.mark.parametrize(
    "code", ['getattr(self.config, "head_dim", None)', "hasattr(tiny, name)", "x = getattr(config, name, 0) or 1"]
)
def test_a_read_past_the_accessor_is_found(code: str) -> None:
    assert list(unguarded(code)) == [1]
    assert not list(unguarded('getattr(config, "model_type")')) + list(unguarded('getattr(model, "config", None)'))
