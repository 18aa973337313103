"""The prompt that is longer than a sliding window: run whatever a config calls its window, or said why it is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.patched_folders import patched
from support.tiny_models import default_checkpoint

from patcher.patched.schema import Patch
from patcher.verify.terms import VerifyTerms
from patcher.verify.transformers_stack import long_prompt, verify_in_transformers


@pytest.mark.parametrize(
    ("model_type", "window"),
    [("recurrent_gemma", {"attention_window_size": 8}), ("modernbert-decoder", {"local_attention": 16})],
)
def test_it_is_run_past_the_window_of_the_class(tmp_path: Path, model_type: str, window: dict[str, int]) -> None:
    base, copy = tmp_path / "base", tmp_path / "copy"
    layer = default_checkpoint(base, model_type, **window)
    config = json.loads((base / "config.json").read_text())
    # Today's transformers may write another name beside it, which the configs on the Hub do not have.
    config.pop("sliding_window", None)
    (base / "config.json").write_text(json.dumps(config))
    manifest = Patch.model_validate(patched(base, copy, layer, exact=False))
    entry = verify_in_transformers(copy, base, manifest, VerifyTerms())
    (check,) = (check for check in entry["checks"] if check["name"] == "long prompt")
    assert check["passed"], check
    assert check["value"] <= check["limit"]


@pytest.mark.parametrize(
    ("config", "length"),
    [
        ({"sliding_window": 8}, 24),
        ({"sliding_window": 8, "attention_chunk_size": 100}, 116),
        ({"window_size": 256, "n_positions": 2048}, 272),
        ({"attention_window_size": 2048}, 2064),
        ({"local_attention": 128, "max_position_embeddings": 8192}, 144),
        ({"sliding_window_size": 512}, 528),
        ({"sliding_window": 4592}, 4608),
    ],
)
def test_its_length(config: dict[str, Any], length: int) -> None:
    assert long_prompt(config, 4608) == (length, "")


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({}, "no sliding window"),
        ({"sliding_window": None}, "no sliding window"),
        ({"sliding_window": True, "window_size": "8", "local_attention": -1}, "no sliding window"),
        ({"sliding_window": [8], "attention_window_size": {}}, "no sliding window"),
        ({"sliding_window": 4096, "use_sliding_window": False}, "no sliding window"),
        ({"sliding_window": 64, "max_position_embeddings": 64}, "the window (64) is as long as the model's positions"),
        ({"sliding_window": 4593}, "the window (4593) is longer than verify.long_prompt_limit (4608)"),
    ],
)
def test_why_none_is_run(config: dict[str, Any], why: str) -> None:
    assert long_prompt(config, 4608) == (0, why)
