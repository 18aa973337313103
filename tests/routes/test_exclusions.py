"""The lists of a quantised config after a block was inserted: each entry means the modules that it meant before."""

from __future__ import annotations

import re
from typing import Any

import pytest

from patcher.architectures.quantised import FORMATS
from patcher.routes.exclusions import Modules, module_of, moved_config
from patcher.routes.plan import NotApplicable

COUNT, AFTER = 12, 3
PARTS = ("self_attn.q_proj", "mlp.gate", "mlp.gate_proj", "mlp.experts")


def index(block: int) -> int:
    return block + (block > AFTER)


def moved(name: str) -> tuple[str, ...]:
    return (re.sub(r"(?<=layers\.)\d+", lambda match: str(index(int(match[0]))), name),)


OLD = [f"model.layers.{block}.{part}" for block in range(COUNT) for part in PARTS] + ["lm_head"]
GATES = {name for name in OLD if name.endswith("mlp.gate")}
ADDED = [f"model.layers.{AFTER + 1}.{part}" for part in PARTS]
MODULES = Modules({name: moved(name) for name in OLD}, set(OLD) - GATES - {"lm_head"}, {"lm_head"}, ADDED, index)


def rewritten(method: str, stated: dict[str, Any]) -> dict[str, Any]:
    return moved_config(FORMATS[method], {"quant_method": method, **stated}, MODULES)


def listed(method: str, entries: list[str] | None) -> list[str]:
    skip = FORMATS[method].skip
    result = rewritten(method, {skip: entries})[skip]
    assert result[-len(ADDED) :] == ADDED
    return result[: -len(ADDED)]


@pytest.mark.parametrize("entries", [None, []])
@pytest.mark.parametrize("method", ["fp8", "awq", "bitsandbytes"])
def test_what_a_loader_leaves_out_without_a_list_is_listed(method: str, entries: list[str] | None) -> None:
    assert listed(method, entries) == ["lm_head"]


def test_a_loader_without_a_list_of_its_own_gets_nothing_else() -> None:
    assert listed("compressed-tensors", []) == []


@pytest.mark.parametrize(
    ("entry", "after"),
    [
        ("lm_head", ["lm_head"]),
        ("gate", ["gate"]),
        ("model.layers.*.self_attn", ["model.layers.*.self_attn"]),
        ("model.layers.1.mlp.gate", ["model.layers.1.mlp.gate"]),
        ("model.layers.4.mlp.gate", ["model.layers.5.mlp.gate"]),
        (r"model\.layers\.4\.mlp", [r"model\.layers\.5\.mlp"]),
        ("model.layers.11", ["model.layers.12"]),
        ("layers.11.mlp.gate", ["layers.12.mlp.gate"]),
        ("model.layers.12.eh_proj", ["model.layers.12.eh_proj"]),
        ("model.layers.12", ["model.layers.13"]),
        (r"model.layers.(3|4).mlp.gate", ["model.layers.3.mlp.gate", "model.layers.5.mlp.gate"]),
        (r"model.layers.[45].self_attn", ["model.layers.5.self_attn.q_proj", "model.layers.6.self_attn.q_proj"]),
        ("*odd", ["*odd"]),
    ],
)
def test_an_entry_means_the_same_modules(entry: str, after: list[str]) -> None:
    assert listed("fp8", ["lm_head", entry])[-len(after) :] == after


@pytest.mark.parametrize(
    ("entry", "after"),
    [
        ("model.layers.4.mlp.gate", ["model.layers.5.mlp.gate"]),
        (r"re:.*mlp.gate$", [r"re:.*mlp.gate$"]),
        (r"re:model\.layers\.4\.mlp\..*", [r"re:model\.layers\.5\.mlp\..*"]),
        (r"re:.*layers\.(3|10)\.mlp\.gate$", ["model.layers.11.mlp.gate", "model.layers.3.mlp.gate"]),
    ],
)
def test_the_same_of_regular_expressions(entry: str, after: list[str]) -> None:
    assert listed("compressed-tensors", [entry]) == after


def test_groups_of_layers_move() -> None:
    groups = {"a": {"targets": ["Linear"]}, "b": {"targets": [r"re:.*layers\.[0-4]\.mlp\.gate_proj"]}}
    result = rewritten("compressed-tensors", {"config_groups": groups})["config_groups"]
    assert result["a"]["targets"] == ["Linear"]
    assert result["b"]["targets"] == [f"model.layers.{block}.mlp.gate_proj" for block in (0, 1, 2, 3, 5)]
    assert groups["b"]["targets"] == [r"re:.*layers\.[0-4]\.mlp\.gate_proj"]


def test_settings_of_single_layers_move() -> None:
    dynamic = {r"-:.*mlp\.gate$": {}, r"+:model\.layers\.4\..*": {"bits": 8}, r".*\.[01]\.mlp\.gate_proj": {"bits": 2}}
    result = rewritten("gptq", {"dynamic": dynamic})
    assert result["dynamic"] == {
        **{f"-:^{re.escape(name)}$": {} for name in ADDED},
        r"-:.*mlp\.gate$": {},
        r"+:model\.layers\.5\..*": {"bits": 8},
        r".*\.[01]\.mlp\.gate_proj": {"bits": 2},
    }
    (modules,) = result["modules_in_block_to_quantize"]
    assert set(modules) == {new for name in MODULES.quantised for new in moved(name)}


def test_lists_of_another_form_are_refused() -> None:
    with pytest.raises(NotApplicable, match="lists modules in a way that is not known here"):
        rewritten("fp8", {"modules_to_not_convert": "lm_head"})


def test_experts_that_are_stored_one_by_one_are_one_module() -> None:
    assert module_of("model.layers.0.mlp.experts.17.up_proj.weight_scale_inv") == "model.layers.0.mlp.experts"
    assert module_of("model.layers.0.mlp.experts.gate_up_proj") == "model.layers.0.mlp.experts"
    assert module_of("model.layers.0.mlp.gate.weight") == "model.layers.0.mlp.gate"
