"""Patched copies, converted by llama.cpp's own converter and run by it, against the hook in transformers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.llama_cpp_converter import with_tiny_tokenizers
from support.stack_models import CASES, patched_pair
from support.stack_runs import MUTATIONS, Ran, assert_caught, assert_steered, environment, run_all

from patcher.verify.llama_cpp_stack import llama_cpp_process
from patcher.verify.stack_jobs import run_jobs

UNREAD = ("opt",)
NAMES = [name for name in CASES if name not in UNREAD]
MUTATED = ("llama", "qwen3")
# GELU by a table of half precision: the stack's own error.
TABLE = {"gpt2": 2e-3, "gpt_neox": 2e-3, "starcoder2": 2e-3, "phi": 2e-3, "gemma": 2e-3, "gemma2": 4e-3}

pytestmark = [pytest.mark.slow, pytest.mark.stacks]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    found = environment("llama.cpp")
    place = tmp_path_factory.mktemp("llama_cpp")
    return run_all(place, NAMES, MUTATED, llama_cpp_process(with_tiny_tokenizers(found, place)), UNREAD)


@pytest.mark.parametrize("name", NAMES)
def test_the_copy_equals_the_hook(ran: Ran, name: str) -> None:
    case, pair = CASES[name], ran.pairs[name]
    assert (pair.plan.route, pair.plan.architecture) == (case.route, case.reader)
    assert pair.plan.stacks["llama.cpp"] == "native"
    result = assert_steered(ran, name)
    assert result.max_abs_logprob_diff <= max(TABLE.get(name, 1e-4), 2e-4 * result.steering_effect)


def test_a_block_too_many_makes_later_ones_of_another_type(ran: Ran, tmp_path: Path) -> None:
    """llama.cpp takes every second block of Gemma 2 for one without a window, whatever the config lists."""
    two = ran.pairs["gemma2"]
    assert two.plan.inserted == {1: (2, 3)}
    one = patched_pair("gemma2", two.base, tmp_path / "copy", 1)
    assert one.plan.inserted == {1: (2,)} and one.plan.stacks["llama.cpp"] == "no"
    assert any("from their places" in warning for warning in one.plan.warnings)
    process = llama_cpp_process(with_tiny_tokenizers(environment("llama.cpp"), tmp_path))
    runs = run_jobs(process, [one.job(one.copy, "copy")], tmp_path / "runs")
    result = Ran({"gemma2": one}, {"gemma2-base": ran.runs["gemma2-base"], **runs}).compared("gemma2")
    assert not result.passed and result.max_abs_logprob_diff > 20 * result.own_error


@pytest.mark.parametrize("name", UNREAD)
def test_what_is_said_not_to_be_read_is_refused(ran: Ran, name: str) -> None:
    assert ran.pairs[name].plan.stacks["llama.cpp"] == "no"
    assert ran.runs[f"{name}-copy"].error is not None


@pytest.mark.parametrize("name", MUTATED)
@pytest.mark.parametrize("label", MUTATIONS)
def test_a_copy_without_its_vector_fails(ran: Ran, name: str, label: str) -> None:
    assert_caught(ran, name, label)


SERVER = """#!{python}
import sys, time
if "--version" in sys.argv:
    print("version: 11549 (0c1e570)", file=sys.stderr)
    sys.exit()
import xllamacpp
given = dict(zip(sys.argv[1:], sys.argv[2:]))
assert given["--flash-attn"] == "off" and given["--cache-type-k"] == given["--cache-type-v"] == "f32"
assert given["-ngl"] == "0" and given["-np"] == "1"
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.port = given["-m"], int(given["-c"]), 1, int(given["--port"])
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(given["-t"])
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
server = xllamacpp.Server(params)
while True:
    time.sleep(1)
"""


def test_a_llama_server_is_asked_over_http(ran: Ran, tmp_path: Path) -> None:
    """With the server of the binding behind the options of `llama-server`."""
    found = environment("llama.cpp")
    if not found.version.startswith("xllamacpp"):
        pytest.skip("only xllamacpp holds the server that this test starts")
    server = tmp_path / "llama-server"
    server.write_text(SERVER.format(python=found.python), encoding="utf-8")
    server.chmod(0o755)
    pair = ran.pairs["llama"]
    process = llama_cpp_process(replace(found, server=server))
    runs = run_jobs(process, [pair.job(pair.copy, "copy")], tmp_path / "runs")
    run = runs["llama-copy"]
    assert run.error is None and (run.version, run.detail) == ("b11549 (0c1e570)", "llama-server")
    assert torch.allclose(run.tensors["logprobs/0"], ran.runs["llama-copy"].tensors["logprobs/0"], atol=1e-5)
