"""Running many tiny models in one process of a real stack, and where that stack is."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.stack_models import Pair, make_pair, with_vector

from patcher.stacks.environments import Environment, Missing, find
from patcher.stacks.names import LLAMA_CPP
from patcher.verify.all_stacks import PROCESSES
from patcher.verify.stack_comparison import Expected, StackComparison, compare_in_stack
from patcher.verify.stack_jobs import Process, StackRun, run_jobs

REQUIRED = "PATCH_MODEL_REQUIRE_STACKS"
"""Set where the stacks must be there (CI): a missing one is then a failure, not a skip."""

MUTATIONS = {"dropped": 0.0, "halved": 0.5, "negated": -1.0}


@dataclass
class Ran:
    """Every pair and mutant of a stack's test, as the stack ran them."""

    pairs: dict[str, Pair]
    runs: dict[str, StackRun]

    def compared(self, name: str, label: str = "copy") -> StackComparison:
        pair = self.pairs[name]
        expected = Expected(pair.plain, pair.hooked, greedy=pair.greedy_tokens, greedy_logprobs=pair.greedy)
        return compare_in_stack(self.runs[f"{name}-{label}"], self.runs[f"{name}-base"], expected)


def environment(stack: str) -> Environment:
    """The installed stack; skips where there is none, fails where there must be one."""
    found = find(stack)
    if isinstance(found, Missing):
        if os.environ.get(REQUIRED):
            pytest.fail(f"{stack} is not installed, and {REQUIRED} is set: {found.why}")
        pytest.skip(f"{stack} is not installed: {found.why}")
    return found


def xllamacpp_python() -> str:
    """The Python that has llama.cpp's functions as a library, or nothing."""
    found = find(LLAMA_CPP)
    return str(found.python) if isinstance(found, Environment) and "xllamacpp" in found.packages else ""


def run_all(
    place: Path, names: Sequence[str], mutated: Sequence[str], process: Process, unread: Sequence[str] = ()
) -> Ran:
    """Patch every model, and run bases, copies and mutants in one process."""
    pairs = {name: make_pair(place, name) for name in (*names, *unread)}
    jobs = [pair.job(folder, label) for pair in pairs.values() for label, folder in pair.folders.items()]
    for name in mutated:
        for label, factor in MUTATIONS.items():
            folder = with_vector(pairs[name], place / name / label, factor)
            jobs.append(pairs[name].job(folder, label))
    return Ran(pairs, run_jobs(process, jobs, place / "runs"))


def process_of(stack: str) -> Process:
    found = environment(stack)
    return PROCESSES[stack](found)


def assert_steered(ran: Ran, name: str) -> StackComparison:
    """The copy in the stack equals the hook in transformers, and is far from the base."""
    result = ran.compared(name)
    assert result.passed and not result.blind, [check for check in result.checks if check.passed is False]
    assert all(check.passed for check in result.checks), result.checks
    assert result.steering_effect > 0.2
    assert result.steering_effect > 100 * result.max_abs_logprob_diff
    return result


def assert_caught(ran: Ran, name: str, label: str) -> None:
    """The stack runs the mutant, and the comparison sees what it lacks."""
    result = ran.compared(name, label)
    failed = {check.name for check in result.checks if check.passed is False}
    assert {"log-probabilities", "share of the effect", "gain"} <= failed, result.checks
    assert not {"loading", "finite"} & failed, result.checks
    assert abs(result.gain - MUTATIONS[label]) < 0.35, result.gain
