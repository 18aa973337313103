"""Verification under a true limit of the address space, as ``ulimit -v`` sets it; the runs inherit it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.tiny_models import tiny_checkpoint
from support.unverified import patch

from patcher.architectures.model_class import quiet_transformers

LLAMA = "meta-llama--Llama-3.2-1B"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_under_a_true_limit_of_the_address_space(tmp_path: Path) -> None:
    """87 MB of bf16 weights: with 450 MB to use they fit in fp32 only if they stay on the disk."""
    sizes = {"hidden_size": 768, "intermediate_size": 3072, "head_dim": 64, "num_hidden_layers": 5}
    heads = {"num_attention_heads": 12, "num_key_value_heads": 4}
    layer = tiny_checkpoint(tmp_path / "whole", LLAMA, dtype=torch.bfloat16, **sizes, **heads)
    with quiet_transformers():
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
        shutil.copytree(tmp_path / "whole", tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors"))
        model.save_pretrained(tmp_path / "base", max_shard_size="20MB")
    patch(tmp_path / "base", tmp_path / "out", layer, share=0.2)

    def run(mode: str) -> dict[str, Any]:
        program = Path(__file__).parents[1] / "support" / "unverified.py"
        command = [sys.executable, str(program), str(tmp_path / "base"), str(tmp_path / "out"), "450000000", mode]
        finished = subprocess.run(command, capture_output=True, text=True, check=False)
        assert finished.returncode == 0, finished.stderr
        result: dict[str, Any] = json.loads(finished.stdout)
        return result

    spread = run("spread")
    assert all(job is not None for job in spread["spread"]) and len(spread["spread"]) == 2, spread
    assert spread["entry"]["passed"], spread["entry"]["checks"]
    # The limit is a true one: what is not spread does not fit.
    assert run("whole")["error"] == "memory"
