"""A base that is stored in bf16 is measured in bf16 where that is fast, as transformers would load it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.building import build_recipe
from support.tiny_models import tiny_checkpoint, write_recipe
from transformers import AutoModelForCausalLM

from patcher.capture import half_precision
from patcher.capture.half_precision import turned_to_half

LLAMA = "meta-llama--Llama-3.2-1B"


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(half_precision, "fast_in_half", lambda: True)
    monkeypatch.setattr(half_precision, "_FEWEST", 1)


def loaded(folder: Path, dtype: torch.dtype) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize("name", [LLAMA, "openai-community--gpt2", "google--gemma-3-1b-it"])
def test_it_is_the_model_that_transformers_loads_in_bf16(tmp_path: Path, name: str) -> None:
    tiny_checkpoint(tmp_path / "base", name, dtype=torch.bfloat16)
    model, wanted = loaded(tmp_path / "base", torch.float32), loaded(tmp_path / "base", torch.bfloat16)
    assert turned_to_half(model, torch.bfloat16)
    mine = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for path, tensor in wanted.named_parameters():
        assert mine[path].dtype == tensor.dtype and torch.equal(mine[path], tensor), path
    for path, tensor in wanted.named_buffers():
        # Some are made in the dtype of the moment; none is rounded here.
        assert torch.equal(mine[path].to(tensor.dtype), tensor), path
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, wanted(input_ids=ids).logits)


@pytest.mark.usefixtures("fast")
def test_what_stays_in_fp32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_checkpoint(tmp_path / "base", LLAMA, dtype=torch.bfloat16)
    model = loaded(tmp_path / "base", torch.float32)
    assert not turned_to_half(model, torch.float32) and not turned_to_half(model, torch.float16)
    # A class that cannot compute so is what it was.
    monkeypatch.setattr(half_precision, "forward", lambda *_: (_ for _ in ()).throw(RuntimeError("dtypes differ")))
    before = {path: parameter.clone() for path, parameter in model.named_parameters()}
    assert not turned_to_half(model, torch.bfloat16)
    assert all(torch.equal(parameter, before[path]) for path, parameter in model.named_parameters())
    monkeypatch.setattr(half_precision, "fast_in_half", lambda: False)
    assert not turned_to_half(model, torch.bfloat16)


@pytest.mark.usefixtures("fast")
@pytest.mark.slow
def test_a_build_says_in_what_it_measured(tmp_path: Path) -> None:
    layer = tiny_checkpoint(tmp_path / "base", LLAMA, dtype=torch.bfloat16)
    path = write_recipe(tmp_path / "recipe.yaml", tmp_path / "base", layer, tmp_path / "out", evaluate={})
    half = build_recipe(path, tmp_path / "out").manifest["evaluation"]
    asked = build_recipe(path, tmp_path / "asked", "dtype=float32").manifest["evaluation"]
    assert (half["dtype"], asked["dtype"]) == ("bfloat16", "float32")
    assert half["steered"] == pytest.approx(asked["steered"], abs=0.05)
    assert half["guard"]["kl"] == pytest.approx(asked["guard"]["kl"], rel=0.1, abs=0.01)


def test_a_cpu_that_torch_does_not_know_is_tried_out(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False, raising=False)
    for times, expected in ((1.3, True), (1.2, False)):
        half_precision.fast_in_half.cache_clear()
        taken = {torch.float32: times, torch.bfloat16: 1.0}
        monkeypatch.setattr(half_precision, "_seconds", taken.__getitem__)
        assert half_precision.fast_in_half() is expected
    half_precision.fast_in_half.cache_clear()
