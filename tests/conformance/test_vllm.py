"""Patched copies in real vLLM against the hook in transformers: all of them in one process."""

from __future__ import annotations

import pytest
from support.stack_models import CASES
from support.stack_runs import MUTATIONS, Ran, assert_caught, assert_steered, process_of, run_all

NAMES = [name for name in CASES if name not in ("phi", "nemotron")]
MUTATED = ("llama", "qwen3")

pytestmark = [pytest.mark.slow, pytest.mark.stacks]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    process = process_of("vllm")
    return run_all(tmp_path_factory.mktemp("vllm"), NAMES, MUTATED, process)


@pytest.mark.parametrize("name", NAMES)
def test_the_copy_equals_the_hook(ran: Ran, name: str) -> None:
    case, pair = CASES[name], ran.pairs[name]
    assert (pair.plan.route, pair.plan.architecture) == (case.route, case.reader)
    result = assert_steered(ran, name)
    assert result.max_abs_logprob_diff <= 2e-5
    reader = ran.runs[f"{name}-copy"].facts["class"]
    if pair.plan.stacks["vllm"] == "native":
        assert reader == case.reader
    else:
        assert reader == "TransformersForCausalLM"


@pytest.mark.parametrize("name", MUTATED)
@pytest.mark.parametrize("label", MUTATIONS)
def test_a_copy_without_its_vector_fails(ran: Ran, name: str, label: str) -> None:
    assert_caught(ran, name, label)


def test_nothing_of_this_package_was_there(ran: Ran) -> None:
    assert all(run.version and run.error is None for run in ran.runs.values())
