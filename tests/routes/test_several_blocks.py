"""As many inserted blocks as a pattern of block types is long: for stacks that compute a type from a block's index."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.default_configs import default_config
from support.tiny_models import default_checkpoint
from support.tiny_patch import patch_tiny, planned

from patcher.architectures.analysis import Architecture
from patcher.errors import InputError
from patcher.patched.route import RecordedRoute
from patcher.routes.carrier import search as choosing
from patcher.routes.carrier.fills import Fill
from patcher.routes.carrier.insertion import CannotInsert, as_stated, continued, insert_blocks, pattern_length
from patcher.routes.carrier.neutral import neutral_fills
from patcher.routes.carrier.search import choose_insertion, length_of_pattern
from patcher.routes.planner import choose_route

ALL = ("transformers", "vllm", "llama.cpp")


@pytest.mark.parametrize(
    ("kinds", "length"),
    [("SFSFSF", 2), ("SSSFSSSFSS", 4), ("DDSFSFSFSFSF", 2), ("AAAA", 1), ("SSFSFFFSSFSF", None), ("SF", None)],
)
def test_a_pattern_is_as_long_as_what_repeats_itself(kinds: str, length: int | None) -> None:
    assert pattern_length(kinds) == length


@pytest.mark.parametrize(("model_type", "length"), [("gemma2", 2), ("gemma3_text", 6), ("olmo3", 4), ("qwen3", 1)])
def test_the_pattern_of_a_model_is_read_from_its_class(model_type: str, length: int) -> None:
    assert length_of_pattern(Architecture(default_config(model_type))) == length


@pytest.mark.parametrize("layer", [0, 3, 12, 24, 25])
def test_every_block_keeps_its_type_in_a_pattern(layer: int) -> None:
    config = default_config("gemma3_text")
    config.num_hidden_layers, config.layer_types = 26, config.layer_types[:26]
    insertion = insert_blocks(config, [layer], {layer: continued(layer, 6, 26)}, carriers={layer: 2})
    types = insertion.changes["layer_types"]
    assert len(types) == 32 and insertion.copy_layers == {layer: layer + 3}
    assert types == [("sliding_attention", "full_attention")[place % 6 == 5] for place in range(32)]


def test_several_blocks_after_several_layers() -> None:
    config = default_config("cohere2")
    insertion = insert_blocks(config, [7, 2], {2: (3, 4), 7: (8, 9)}, carriers={7: 1})
    assert insertion.inserted == {2: (3, 4), 7: (10, 11)} and insertion.copy_layers == {2: 3, 7: 11}
    assert insertion.templates == {2: 3, 7: 9} and insertion.total == config.num_hidden_layers + 4
    assert [insertion.moved(block) for block in (2, 3, 7, 8)] == [2, 5, 9, 12]


def test_a_pattern_of_letters_is_extended() -> None:
    config = default_config("nemotron_h")
    letters = {"linear_attention": "M", "full_attention": "*", "mlp": "-", "moe": "E"}
    text = "".join(letters[kind] for kind in config.layers_block_type)
    changes = as_stated(insert_blocks(config, [3], {3: 1}), config, {"hybrid_override_pattern": text})
    assert changes["hybrid_override_pattern"] == text[:4] + text[1] + text[4:]
    assert "layers_block_type" not in changes


def plan_of(model_type: str, layer: int = 1, **options: Any) -> Any:
    return choose_route(Architecture(default_config(model_type)), [layer], **options)


@pytest.mark.slow
def test_one_block_is_inserted_by_default_and_the_others_are_advice() -> None:
    plan = plan_of("gemma2")
    assert plan.cost.startswith("one more layer in") and plan.stacks["llama.cpp"] == "no"
    (advice,) = [note for note in plan.advice if "targets" in note]
    assert "2 blocks" in advice and "llama.cpp" in advice
    assert any("from their places" in warning for warning in plan.warnings)
    # As advised:
    wide = plan_of("gemma2", targets=advice.split("[")[1].split("]")[0].split(", "))
    assert wide.cost.startswith("2 more layers in") and wide.stacks == dict.fromkeys(ALL, "native")
    assert not any("from their places" in warning for warning in wide.warnings)
    assert not any("targets" in note for note in wide.advice)


def test_what_is_listed_needs_one_block_and_no_advice() -> None:
    plan = plan_of("olmo3", targets=["transformers", "llama.cpp"])
    assert plan.cost.startswith("one more layer") and not plan.advice


@pytest.mark.parametrize("count", [46, 44, 42])
@pytest.mark.slow_but("46")
def test_depths_that_mean_something_to_a_stack_are_left_alone(count: int) -> None:
    """llama.cpp takes 46 blocks of Gemma 2 for the 27B, whose attention has another scale."""
    config = default_config("gemma2")
    config.num_hidden_layers = count
    config.layer_types = (["sliding_attention", "full_attention"] * count)[:count]
    architecture = Architecture(config)
    if count == 42:
        assert choose_route(architecture, [3], targets=["llama.cpp"]).stacks["llama.cpp"] == "native"
    else:
        with pytest.raises(InputError) as caught:
            choose_route(architecture, [3], targets=["transformers", "llama.cpp"])
        assert "llama.cpp does not read it" in str(caught.value.problems[0].found)


@pytest.mark.parametrize("layers", [[0], [2], [0, 2, 3]])
def test_the_copy_is_what_the_hook_makes_of_the_base(tmp_path: Path, layers: list[int]) -> None:
    default_checkpoint(tmp_path / "base", "gemma2", 2, trained_scale=True)
    patched = patch_tiny(tmp_path / "base", tmp_path / "copy", layers, targets=["llama.cpp"], exact=True)
    assert len(patched.plan.inserted[layers[0]]) == 2 and not patched.report
    assert patched.difference < 1e-4 and patched.effect > 100 * patched.difference


@pytest.mark.slow
def test_a_block_that_does_something_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks beside the carrier must do nothing; the proof on the stand-in sees one that does not."""

    loud = dict.fromkeys(("mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"), Fill("constant", 0.3))
    architecture = Architecture(default_config("gemma2"))
    assert len(choose_insertion(architecture, [1], number=2).blocks) == 2
    monkeypatch.setattr(choosing, "neutral_fills", lambda trial: {**(neutral_fills(trial) or {}), **loud})
    with pytest.raises(CannotInsert, match="full depth the model then differs"):
        choose_insertion(Architecture(default_config("gemma2")), [1], number=2)


def test_the_manifest_knows_every_inserted_block(tmp_path: Path) -> None:
    default_checkpoint(tmp_path / "base", "gemma2", 2)
    plan = planned(tmp_path / "base", [1, 3], targets=["llama.cpp"])
    route = RecordedRoute.model_validate(plan.as_json())
    assert route.inserted_blocks == {1: 2, 3: 6} and route.new_blocks == [2, 3, 6, 7]
    # As folders of before say it:
    old = replace(plan, inserted={}).as_json()
    assert RecordedRoute.model_validate(old).new_blocks == [2, 6]


def test_a_class_that_computes_types_from_the_index_gains_a_whole_pattern() -> None:
    config = default_config("qwen3_moe")
    config.decoder_sparse_step = 2
    plan = choose_route(Architecture(config), [5])
    assert plan.route == "carrier" and plan.cost.startswith("2 more layers in")
    assert plan.stacks == dict.fromkeys(ALL, "no") | {"transformers": "native"}
