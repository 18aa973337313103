"""Products by oneDNN are those of torch; memory that is freed is used again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.old_transformers import skip_if_too_old
from support.tiny_models import OF_EACH_FORWARD_PASS, tiny_checkpoint
from torch import nn
from transformers import AutoModelForCausalLM

from patcher.architectures.model_class import quiet_transformers
from patcher.capture import products
from patcher.capture.batches import padded
from patcher.capture.forward import forward
from patcher.capture.freed_memory import _glibc


@pytest.fixture
def onednn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """On this CPU oneDNN is the one to call, whatever CPU it is; the rows of each call."""
    try:
        products._onednn(torch.ones(2, 2), torch.ones(2, 2), None)
    except (RuntimeError, AttributeError, TypeError):
        pytest.skip("this build of torch has no such operator")
    calls: list[int] = []
    original = products._onednn

    def counted(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        calls.append(inputs.numel() // inputs.shape[-1])
        return original(inputs, weight, bias)

    monkeypatch.setattr(products, "_onednn", counted)
    monkeypatch.setattr(products, "available", lambda: True)
    return calls


@pytest.mark.parametrize("name", OF_EACH_FORWARD_PASS)
def test_a_forward_pass_gives_the_same_and_leaves_nothing(tmp_path: Path, name: str, onednn: list[int]) -> None:
    skip_if_too_old(name)
    changes = {"quantization_config": None} if "gpt-oss" in name else {}
    tiny_checkpoint(tmp_path, name, tokenizer=False, **changes)
    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    inputs, _ = padded([range(3, 33), range(40, 60)], "right", 0)
    found = forward(model, inputs, logits_to_keep=0).logits
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert onednn, "at least its LM head is a linear layer"
    with torch.no_grad(), quiet_transformers():
        wanted = model(**inputs, use_cache=False).logits
    assert float((found - wanted).abs().max()) <= 1e-5 * max(1.0, float(wanted.abs().max()))


def test_what_does_not_fit_is_left_to_torch(onednn: list[int]) -> None:
    module, rows = nn.Linear(8, 4), torch.randn(20, 8)
    for given in (rows[:3], rows[:0]):
        with torch.no_grad():
            torch.testing.assert_close(products.product(module, given), module(given))
    products.product(module, rows).sum().backward()
    assert module.weight.grad is not None
    with torch.no_grad():
        products.product(nn.Linear(8, 4, dtype=torch.bfloat16), rows.bfloat16())
        module.weight = nn.Parameter(torch.randn(8, 4).T)
        products.product(module, rows)
    assert onednn == []
    with torch.no_grad():
        module.weight = nn.Parameter(torch.randn(4, 8))
        # Neither its stride nor what lies between its rows matters.
        wide = torch.randn(8, 40).T[::2]
        torch.testing.assert_close(products.product(module, wide), module(wide))
    assert onednn == [20]


def test_a_forward_of_the_instance_stays(onednn: list[int]) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    own: Any = lambda inputs: inputs + 1  # noqa: E731
    model[0].forward = own
    rows = torch.randn(20, 8)
    with torch.no_grad(), products.fast_products(model):
        with products.fast_products(model):
            model(rows)
        torch.testing.assert_close(model(rows), nn.functional.linear(rows + 1, model[1].weight, model[1].bias))
    assert model[0].forward is own and "forward" not in model[1].__dict__
    assert onednn == [20, 20]


def absent(*_: Any) -> torch.Tensor:
    raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute '_linear_pointwise'")


@pytest.mark.parametrize("operator", [lambda *_: torch.zeros(32, 32), absent])
def test_an_operator_that_computes_something_else_is_not_used(monkeypatch: pytest.MonkeyPatch, operator: Any) -> None:
    monkeypatch.setattr(products, "_is_amd", lambda: True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(products, "_onednn", operator)
    products.available.cache_clear()
    try:
        assert not products.available()
    finally:
        products.available.cache_clear()


FAULTS = """
import resource, torch
from patcher.capture.freed_memory import give_back_freed_memory, keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        parts = [torch.zeros(5 << 20) for _ in range(4)]  # 20 MiB each
        del parts
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
usual = faults()
keep_freed_memory()
faults()
kept = faults()
give_back_freed_memory()
print(usual, kept, faults())
"""


@pytest.mark.skipif(_glibc() is None, reason="its C library is not glibc")
def test_freed_memory_is_used_again() -> None:
    run = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    _usual, kept, after = map(int, run.stdout.split())
    # 80 MiB are 20,480 pages of 4 KiB; given back, they have to be cleared once more.
    assert kept < 200 and after > kept + 200
