"""Exports in the software they are for: stock PEFT and llama.cpp steer the base as the hook does."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from support.exported import patched
from support.llama_gguf import write_llama
from support.old_transformers import skip_if_too_old
from support.stack_runs import xllamacpp_python
from support.stock_loading import log_probs, stock_model
from support.tiny_models import VOCABULARY, default_checkpoint, tiny_checkpoint
from support.tiny_patch import hooks, largest, planned, probe_ids, residual_norms

from patcher.architectures.model_class import quiet_transformers
from patcher.errors import InputError
from patcher.export import export_folder
from patcher.export.control_vector import write as write_control_vector
from patcher.export.edits import Edits
from patcher.export.peft import write

PYTHON = xllamacpp_python()
LLAMA = "meta-llama--Llama-3.2-1B"


def edits_of(base: Path, vectors: dict[int, torch.Tensor]) -> Edits:
    """What a patched folder of this base would give."""
    config = json.loads((base / "config.json").read_text())
    return Edits(vectors, {layer: ["v"] for layer in vectors}, "base", None, str(base), False, config, False, ())


# (released config, changes): with and without a bias, Conv1D, scaled residuals, parallel blocks, one shared expert
ADAPTERS = [
    (LLAMA, {}),
    ("openai-community--gpt2", {}),
    ("EleutherAI--pythia-70m", {}),
    ("EleutherAI--gpt-j-6b", {}),
    ("microsoft--phi-2", {}),
    ("facebook--opt-125m", {}),
    ("bigcode--starcoder2-3b", {}),
    ("tiiuae--falcon-7b", {}),
    ("ibm-granite--granite-3.3-2b-instruct", {}),
    ("tiiuae--Falcon-H1-0.5B-Instruct", {"lm_head_multiplier": 1.0}),
    ("openbmb--MiniCPM3-4B", {}),
    ("Qwen--Qwen2.5-0.5B", {}),
    ("Qwen--Qwen3-8B", {}),
    ("mistralai--Mistral-7B-Instruct-v0.3", {}),
    ("nvidia--Nemotron-Mini-4B-Instruct", {}),
]


@pytest.mark.slow_but("facebook--opt-125m", "Qwen--Qwen2.5-0.5B", "tiiuae--falcon-7b")
@pytest.mark.parametrize(("name", "changes"), ADAPTERS, ids=[name for name, _ in ADAPTERS])
def test_an_adapter_equals_the_hook_in_stock_peft(tmp_path: Path, name: str, changes: dict[str, Any]) -> None:
    from peft import PeftModel

    skip_if_too_old(name)
    layer = tiny_checkpoint(tmp_path / "base", name, **changes)
    before = {item.name: item.read_bytes() for item in (tmp_path / "base").iterdir()}
    model, _ = stock_model(tmp_path / "base")
    ids = probe_ids(VOCABULARY)
    blocks = planned(tmp_path / "base", [layer]).blocks
    layers = [layer, layer + 1]
    norms = residual_norms(model, blocks, layers, ids)
    generator = torch.Generator().manual_seed(1)
    hidden = int(model.config.hidden_size)
    vectors = {k: torch.randn(hidden, generator=generator) * 0.5 * norms[k] / hidden**0.5 for k in layers}

    write(edits_of(tmp_path / "base", vectors), tmp_path / "adapter")

    plain = log_probs(model, ids)
    with hooks(model, blocks, vectors):
        hooked = log_probs(model, ids)
    with quiet_transformers():
        tuned = PeftModel.from_pretrained(model, str(tmp_path / "adapter")).eval()
    assert largest(hooked, plain) > 0.05
    assert largest(log_probs(tuned, ids), hooked) <= 2e-5
    with tuned.disable_adapter():
        assert torch.equal(log_probs(tuned, ids), plain)
    assert {item.name: item.read_bytes() for item in (tmp_path / "base").iterdir()} == before


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("google--gemma-3-1b-it", "a norm follows the MLP"),
        ("allenai--OLMo-2-0425-1B", "a norm follows the MLP"),
        ("openai--gpt-oss-20b", "mixture of experts"),
        ("mixtral", "mixture of experts"),
        ("qwen2_moe", "a gate of each token's own"),
    ],
)
def test_where_peft_has_no_place_the_reason_is_given(tmp_path: Path, name: str, why: str) -> None:
    if "--" in name:
        layer = tiny_checkpoint(tmp_path / "base", name, **({"quantization_config": None} if "gpt-oss" in name else {}))
    else:
        layer = default_checkpoint(tmp_path / "base", name)
    with pytest.raises(InputError, match="PEFT has no place") as caught:
        write(edits_of(tmp_path / "base", {layer: torch.ones(64)}), tmp_path / "adapter")
    assert why in str(caught.value)
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(("name", "route"), [("qwen2", "relabel"), ("qwen3", "carrier"), ("llama", "flag")])
def test_an_adapter_is_for_the_base_whatever_route_made_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, route: str
) -> None:
    from peft import PeftModel

    layer = default_checkpoint(tmp_path / "base", name, trained_scale=True)
    model, _ = stock_model(tmp_path / "base")
    vector = torch.randn(64, generator=torch.Generator().manual_seed(1)) * model.config.hidden_size**-0.5 * 8
    patched(tmp_path / "base", {layer: vector}, tmp_path / "out", monkeypatch, route=route)
    export_folder(tmp_path / "out", "peft", tmp_path / "adapter")
    ids = probe_ids(VOCABULARY)
    steered = log_probs(stock_model(tmp_path / "out")[0], ids)
    plain = log_probs(model, ids)
    with quiet_transformers():
        tuned = PeftModel.from_pretrained(model, str(tmp_path / "adapter")).eval()
    assert largest(steered, plain) > 0.05
    assert largest(log_probs(tuned, ids), steered) <= 5e-5


# llama.cpp: --control-vector, by the library that its commands are made of


@pytest.mark.stacks
@pytest.mark.skipif(not PYTHON, reason="there is no xllamacpp: patch-model stacks install llama.cpp")
def test_llama_cpp_loads_the_control_vector_and_steers_as_the_hook_does(tmp_path: Path) -> None:
    layer = tiny_checkpoint(tmp_path / "base", LLAMA, rope_scaling=None)
    model, _ = stock_model(tmp_path / "base")
    write_llama(model, tmp_path / "base.gguf")
    norms = residual_norms(model, "model.layers", [layer, layer + 1], probe_ids(VOCABULARY))
    generator = torch.Generator().manual_seed(1)
    vectors = {k: torch.randn(64, generator=generator) * norms[k] / 16 for k in (layer, layer + 1)}
    write_control_vector(edits_of(tmp_path / "base", vectors), tmp_path / "vector.gguf")
    ids = probe_ids(VOCABULARY)[:1]
    plain = log_probs(model, ids)
    with hooks(model, "model.layers", vectors):
        hooked = log_probs(model, ids)
    job = {"model": str(tmp_path / "base.gguf"), "ids": ids[0].tolist(), "out": str(tmp_path / "logits.json")}
    found = {}
    for name, vector in (("plain", None), ("steered", str(tmp_path / "vector.gguf"))):
        runner = Path(__file__).with_name("llama_cpp_vector.py")
        command = [PYTHON, str(runner), json.dumps({**job, "vector": vector})]
        subprocess.run(command, check=True, capture_output=True, text=True)
        logits = torch.tensor(json.loads((tmp_path / "logits.json").read_text()))
        found[name] = torch.log_softmax(logits, dim=-1)
    assert largest(hooked, plain) > 0.5
    assert largest(found["plain"], plain[0]) <= 1e-2
    assert largest(found["steered"], hooked[0]) <= 1e-2
