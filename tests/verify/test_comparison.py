"""Each check of the comparison, alone, on made-up runs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from patcher.patched.stored import StoredLayer, StoredSlot
from patcher.verify.checks import Comparison
from patcher.verify.comparison import Run, compare, largest

VOCABULARY, HIDDEN = 11, 6


def runs(*, effect: float = 1.0, amplify: float = 1.0) -> tuple[Run, Run, dict[int, StoredLayer]]:
    """A reference and a candidate that agree."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    vector = random(HIDDEN)
    stored = {2: StoredLayer(vector, vector, 0.0, (StoredSlot("b.2.bias", vector),), 2)}
    base, residual = random(5, VOCABULARY), random(5, HIDDEN)
    hook = base + effect * random(5, VOCABULARY).sign()
    reference = {
        "base/0": base, "hook/0": hook, "hook_again/0": hook + 1e-6, "left_padding": hook, "greedy": hook,
        "long_prompt": hook, "own_dtype/0": hook + 0.01, "residual/base/layer.2/0": residual,
    }  # fmt: skip
    candidate = {
        "candidate/0": hook + 2e-6, "unsteered/0": base + 3e-6,
        "left_padding": hook, "greedy": hook, "long_prompt": hook,
        "own_dtype/0": hook - 0.01, "residual/candidate/layer.2/0": residual + vector,
    }  # fmt: skip
    if amplify > 1:
        loud = base + effect * amplify * random(5, VOCABULARY).sign()
        reference |= {"hook_amplified/0": loud, "residual/base_amplified/layer.2/0": residual}
        candidate |= {
            "candidate_amplified/0": loud,
            "residual/candidate_amplified/layer.2/0": residual + amplify * vector,
        }
    facts = {
        "ids": [[1, 2, 3, 4, 5]], "class": "C", "amplify": amplify, "skipped": {}, "greedy": [1, 2, 3, 4, 5],
        "own_dtype": "bfloat16", "loading": {"missing_keys": [], "unexpected_keys": ["rotary.inv_freq"]},
    }  # fmt: skip
    return Run(reference, facts), Run(candidate, copy.deepcopy(facts)), stored


def outcome(result: Comparison) -> set[str]:
    return {check.name for check in result.checks if check.passed is False}


def test_runs_that_agree_pass() -> None:
    reference, candidate, stored = runs()
    result = compare(reference, candidate, stored, architecture="C", tolerance=1e-4)
    assert result.passed
    assert result.max_abs_logprob_diff == pytest.approx(2e-6, rel=0.2)
    assert result.noise_floor == pytest.approx(1e-6, rel=0.2)
    assert result.steering_effect == pytest.approx(1.0, rel=1e-3)


def spoil(key: str, by: float) -> Callable[[Run], None]:
    def change(candidate: Run) -> None:
        candidate.tensors[key] = candidate.tensors[key] + by  # type: ignore[index]

    return change


BROKEN: dict[str, tuple[Callable[[Run], None], str]] = {
    "log-probabilities": (spoil("candidate/0", 2e-4), "log-probabilities"),
    "residual": (spoil("residual/candidate/layer.2/0", 0.01), "residual stream"),
    "padding": (spoil("left_padding", 1e-3), "left padding"),
    "long": (spoil("long_prompt", 1e-3), "long prompt"),
    "own dtype": (spoil("own_dtype/0", 0.5), "own dtype (bfloat16)"),
    "greedy": (spoil("greedy", 0.01), "greedy decoding with a cache"),
    "nan": (spoil("candidate/0", float("nan")), "finite"),
    "class": (lambda run: run.facts.update(**{"class": "D"}), "loading"),
    "missing": (lambda run: run.facts["loading"].update(missing_keys=["x"]), "loading"),
    "unexpected": (lambda run: run.facts["loading"].update(unexpected_keys=["y"]), "loading"),
    "ids": (lambda run: run.facts.update(ids=[[1]]), "tokenizer"),
    "padding not run": (lambda run: run.tensors.pop("left_padding"), "left padding"),
    "own dtype not run": (lambda run: run.tensors.pop("own_dtype/0"), "own dtype (bfloat16)"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_each_check_alone(name: str) -> None:
    reference, candidate, stored = runs()
    change, expected = BROKEN[name]
    change(candidate)
    result = compare(reference, candidate, stored, architecture="C", tolerance=1e-4)
    assert not result.passed
    assert expected in outcome(result)


def test_a_dropped_parameter_is_named_even_if_the_base_has_the_key_too() -> None:
    reference, candidate, stored = runs()
    result = compare(reference, candidate, stored, architecture="C", tolerance=1e-4, written=["rotary.inv_freq"])
    assert outcome(result) == {"loading"}


def test_the_tolerance_follows_the_noise_floor_but_never_beyond_the_hard_limit() -> None:
    reference, candidate, stored = runs()
    reference.tensors["hook_again/0"] = reference.tensors["hook/0"] + 1e-4  # type: ignore[index]
    assert compare(reference, candidate, stored, architecture="C", tolerance=1e-4).tolerance == pytest.approx(
        5e-4, rel=1e-2
    )
    reference.tensors["hook_again/0"] = reference.tensors["hook/0"] + 1e-2  # type: ignore[index]
    assert compare(reference, candidate, stored, architecture="C", tolerance=1e-4).tolerance == 1e-3


def test_a_difference_that_is_small_beside_the_tolerance_but_not_beside_the_effect_fails() -> None:
    reference, candidate, stored = runs(effect=1e-3)
    spoil("candidate/0", 5e-5)(candidate)
    assert outcome(compare(reference, candidate, stored, architecture="C", tolerance=1e-4)) == {"share of the effect"}


def test_a_tiny_effect_is_probed_at_an_amplified_vector() -> None:
    reference, candidate, stored = runs(effect=1e-5, amplify=1000.0)
    result = compare(reference, candidate, stored, architecture="C", tolerance=1e-4)
    assert result.passed
    spoil("candidate_amplified/0", 5e-3)(candidate)
    assert outcome(compare(reference, candidate, stored, architecture="C", tolerance=1e-4)) == {"share of the effect"}


def test_a_vector_that_the_file_does_not_hold_fails() -> None:
    reference, candidate, stored = runs()
    held = stored[2]
    stored[2] = replace(held, rel_error=0.03)
    assert outcome(compare(reference, candidate, stored, architecture="C", tolerance=1e-4)) == {"stored vector"}


def test_what_cannot_be_run_on_the_base_is_not_passed() -> None:
    reference, candidate, stored = runs()
    reference.tensors.pop("left_padding")  # type: ignore[attr-defined]
    reference.facts["skipped"]["left_padding"] = "no mask"
    result = compare(reference, candidate, stored, architecture="C", tolerance=1e-4)
    check = next(check for check in result.checks if check.name == "left padding")
    assert check.passed is None and check.note == "no mask"


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [([0.0, 1.0], [0.0, 1.5], 0.5), ([0.0], [0.0, 1.0], float("inf")), ([float("-inf")], [float("-inf")], 0.0)],
)
def test_largest(first: list[float], second: list[float], expected: float) -> None:
    assert largest(torch.tensor(first), torch.tensor(second)) == expected


def test_largest_of_not_a_number_is_infinite() -> None:
    assert largest(torch.tensor([float("nan")]), torch.tensor([1.0])) == float("inf")
