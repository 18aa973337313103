"""The families that people use: the documented results, and the runner's judgement of copies that lack their vector."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import COMMAND, PAGE, RESULTS, is_false
from families_page import by_name, exact_in_all, family_table
from family_runs import build, built, key_of, outcome, processes, run_stacks
from safetensors.torch import load_file, save_file
from support.families import Copied, Family, families
from support.stack_runs import environment

from patcher.architectures.registry import rows_inside
from patcher.stacks.names import LLAMA_CPP, STACKS, TRANSFORMERS, VLLM
from patcher.verify.stack_comparison import Expected, compare_in_stack
from patcher.verify.stack_jobs import StackRun


def documented() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8"))
    return found


def named(name: str) -> Family:
    return next(family for family in families() if family.name == name)


def test_the_documented_families_are_those_of_the_table() -> None:
    listed = [(record["name"], record["form"], record["model_type"]) for record in documented()["families"]]
    assert listed == [(family.name, family.form, family.model_type) for family in families()], f"run `{COMMAND}`"
    assert len(by_name(documented()["families"])) == 57


def test_the_page_starts_with_the_families() -> None:
    table = family_table(documented())
    assert table in PAGE.read_text(encoding="utf-8").partition("\n## Every class")[0]
    assert table.count("\n| ") > len(families())


def test_every_documented_copy_is_the_hook_in_transformers() -> None:
    for record in documented()["families"]:
        for run in record["runs"]:
            assert run["seen"][TRANSFORMERS]["outcome"] == "exact", (record["name"], run)


def test_no_claim_of_a_stack_is_other_than_what_was_seen() -> None:
    for record in documented()["families"]:
        assert not record.get("failed"), record
        for run in record["runs"]:
            assert set(run["seen"]) == set(STACKS), record["name"]
            for stack in STACKS:
                assert not is_false(run, stack), (record["name"], run["route"], stack, run["seen"][stack])


def run_of(rows: list[torch.Tensor]) -> StackRun:
    """What a stack would report that computes ``rows``."""
    tensors = {}
    for number, row in enumerate(rows):
        tensors[f"tokens/{number}"] = torch.arange(row.shape[-1], dtype=torch.int32).expand(row.shape).contiguous()
        tensors[f"logprobs/{number}"] = row
    return StackRun(None, tensors, {"class": "Any", "greedy": []}, "1")


def seen_of(run: StackRun, base: StackRun, expected: Expected) -> str:
    found = outcome(run, base, compare_in_stack(run, base, expected))
    return str(found["outcome"])


def test_what_a_stack_computes_is_told_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    plain = [torch.randn(6, 20, generator=generator).log_softmax(-1)]
    hooked = [(plain[0] + torch.randn(6, 20, generator=generator)).log_softmax(-1)]
    half = [(plain[0] + 0.5 * (hooked[0] - plain[0])).log_softmax(-1)]
    expected, base, broken = Expected(plain, hooked), run_of(plain), StackRun("ValueError: no such class")
    assert seen_of(run_of(hooked), base, expected) == "exact"
    assert seen_of(run_of(plain), base, expected) == "wrong"
    assert seen_of(run_of(half), base, expected) == "wrong"
    assert seen_of(broken, base, expected) == "refused"
    assert seen_of(broken, broken, expected) == "no base"


def test_a_claim_is_false_in_both_directions() -> None:
    run = {"claimed": {"vllm": "native", "llama.cpp": "no"}, "seen": {}}
    assert not is_false(run, VLLM)
    for seen, in_vllm, in_llama_cpp in (("exact", False, True), ("wrong", True, False), ("no base", False, False)):
        run["seen"] = {VLLM: {"outcome": seen}, LLAMA_CPP: {"outcome": seen}}
        assert (is_false(run, VLLM), is_false(run, LLAMA_CPP)) == (in_vllm, in_llama_cpp)


def test_a_family_counts_when_every_form_of_it_does() -> None:
    good = {"cost": "none", "seen": {stack: {"outcome": "exact"} for stack in STACKS}}
    paid = {**good, "cost": "one more layer"}
    poor = {**good, "seen": {**good["seen"], VLLM: {"outcome": "no base"}}}
    records = [
        {"name": "a", "form": "", "runs": [paid, good]},
        {"name": "b", "form": "dense", "runs": [good]},
        {"name": "b", "form": "hybrid", "runs": [paid]},
        {"name": "c", "form": "", "runs": [poor]},
        {"name": "d", "form": "", "runs": []},
    ]
    assert exact_in_all(records, free=True) == ["a"] and exact_in_all(records, free=False) == ["a", "b"]


@pytest.mark.slow
def test_a_family_that_fails_does_not_stop_the_others(tmp_path: Path) -> None:
    record, copies = built(Family("None such", "llama", "nobody/none", config={"hidden_size": "wide"}), tmp_path)
    assert record["failed"] and record["name"] == "None such" and not copies
    run_stacks([(record, copies)], tmp_path)


def test_what_was_run_of_the_same_files_is_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("family_runs.processes", lambda _place: {VLLM: ("1", None)})
    monkeypatch.setattr("patcher.verify.stack_jobs.run_jobs", lambda *_: pytest.fail("run again"))
    base = {"runs": True, "own_error": 1e-6, "line": "", "version": "1", "build": "1"}
    before = {"name": "A b", "form": "c", "files": "x", "base": {VLLM: base}}
    before["runs"] = [{"files": "y", "seen": {VLLM: {"outcome": "exact"}}}]
    record = {**before, "base": {}, "runs": [{"files": "y", "seen": {}}]}
    run_stacks([(record, [None])], tmp_path, {"a-b-c": before})
    assert key_of(record) == "a-b-c" and record["base"] == before["base"] and record["runs"] == before["runs"]
    other = {**record, "base": {}, "runs": [{"files": "z", "seen": {}}]}
    with pytest.raises(AttributeError):
        run_stacks([(other, [None])], tmp_path, {"a-b-c": before})


@pytest.mark.slow
def test_a_wrapper_is_patched_whole(tmp_path: Path) -> None:
    record, copies = build(named("Gemma 3"), tmp_path / "gemma")
    assert record["wrapper"] and "refused" not in record
    assert {run["reads"] for run in record["runs"]} == {"Gemma3ForConditionalGeneration"} and len(copies) == 2


def mutated(copied: Copied, base: Path, label: str, factor: float) -> Copied:
    """The copy whose vector is multiplied by ``factor``."""
    folder = copied.folder.with_name(label)
    shutil.copytree(copied.folder, folder)
    stored = load_file(base / "model.safetensors")
    for path in folder.glob("model*.safetensors"):
        tensors = load_file(path)
        for write in (write for write in copied.plan.carriers if write.name in tensors):
            neutral = stored[write.name] if write.kind == "added" else torch.full((), float(write.offset))
            tensors[write.name] = neutral + factor * (tensors[write.name] - neutral)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})
    return replace(copied, asked=label, folder=folder)


@pytest.mark.slow
@pytest.mark.stacks
def test_a_family_is_run_by_every_stack_and_a_weaker_vector_is_found(tmp_path: Path) -> None:
    for stack in (VLLM, LLAMA_CPP):
        environment(stack)
    family = named("StableLM")
    place = tmp_path / family.key
    record, (copied, *_more) = build(family, place)
    weaker = [mutated(copied, place / "base", label, factor) for label, factor in (("dropped", 0.0), ("halved", 0.5))]
    record["runs"] = [record["runs"][0], *({**record["runs"][0], "seen": {}} for _ in weaker)]
    run_stacks([(record, [copied, *weaker])], tmp_path)
    assert set(processes(tmp_path)) == {VLLM, LLAMA_CPP}
    for stack in (VLLM, LLAMA_CPP):
        found = [run["seen"][stack]["outcome"] for run in record["runs"]]
        assert found == ["exact", "wrong", "wrong"], (stack, record["runs"])
        assert record["base"][stack]["runs"]


def test_every_stack_that_a_wrapper_is_said_to_be_read_by_was_run_on_it() -> None:
    seen = {
        (record["model_type"], stack)
        for record in documented()["families"]
        for run in record["runs"]
        for stack, found in run["seen"].items()
        if record.get("wrapper") and found["outcome"] == "exact"
    }
    for wrapper, decoders in rows_inside().items():
        for row in decoders.values():
            assert {(wrapper, stack) for stack, support in row.loads.items() if support != "no"} <= seen, wrapper
