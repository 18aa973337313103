"""A command imports neither torch's compiler nor what several processes need; whoever asks for it gets the real one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BEGIN = "from patcher.cli.lean_imports import import_no_compiler\nimport_no_compiler()\n"
MODEL = "import sys, torch\nfrom transformers import LlamaConfig, LlamaForCausalLM\n"


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_model_class_is_imported_without_the_compiler() -> None:
    heavy = ("torch._dynamo.symbolic_convert", "torch._inductor", "sympy")
    code = f"print([name for name in {heavy} if name in sys.modules])"
    assert run(BEGIN + MODEL + code) == "[]\n"


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("import torch._dynamo.config as c; print(c is torch._dynamo.config)", "True"),
        ("print(torch._dynamo.is_compiling())", "False"),
        ("print(torch.compile(lambda x: x + 1, backend='eager')(torch.ones(2)).tolist())", "[2.0, 2.0]"),
        ("from torch._dynamo._trace_wrapped_higher_order_op import trace_wrapped as t; print(callable(t))", "True"),
        (
            "from transformers.masking_utils import TransformGetItemToIndex\n"
            "with TransformGetItemToIndex():\n    print(type(sys.modules['torch._dynamo']).__name__)",
            "module",
        ),
    ],
)
@pytest.mark.slow
def test_the_real_compiler_is_there_when_it_is_asked_for(asked: str, said: str) -> None:
    assert run(BEGIN + MODEL + asked) == f"{said}\n"


@pytest.mark.slow
def test_a_model_computes_what_it_computes_with_everything_imported() -> None:
    code = MODEL + (
        "torch.manual_seed(0)\n"
        "sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)\n"
        "model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=32)).eval()\n"
        "ids = torch.arange(8)[None]\n"
        "print(model(ids).logits.double().sum().item())\n"
        "print(model.generate(ids, max_new_tokens=4, do_sample=False).tolist())"
    )
    assert run(BEGIN + code) == run(code)
