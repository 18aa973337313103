"""The harness behind docs/architectures.md, over one type of every layout and route; all of them with
``pytest -m conformance_all``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import all_architectures
import pytest
import transformers
from all_architectures import COMMAND, PAGE, RESULTS, Record, check, model_types, other_than_recorded, run_all
from architectures_page import listed_types, render
from wrapper_runs import check_wrapper

# Each for something that the others do not have.
REPRESENTATIVE = {
    "bert": "a norm after the residual sum",
    "cohere2": "attention and MLP side by side",
    "deepseek_v3": "latent attention, dense blocks before those of experts",
    "falcon_h1": "attention and a state space side by side, multipliers",
    "gemma": "a scaled embedding, norms that multiply by 1 + weight",
    "gemma2": "norms before and after the MLP",
    "gemma3_text": "the same, two kinds of attention",
    "glm4": "the same, fused gate and up",
    "gpt2": "a bias that is always there, transposed weights",
    "gpt_oss": "experts with biases",
    "granite": "a residual multiplier",
    "jamba": "state-space blocks among attention, experts in some; which is computed from the index",
    "llama": "a bias by a flag",
    "mistral": "no bias, another class computes the same",
    "mixtral": "experts without a bias",
    "mpt": "norms without biases, an MLP of two matrices without any",
    "nemotron_h": "blocks of one mixer",
    "olmo": "norms without weights",
    "olmo2": "norms after attention and MLP only",
    "phi3": "fused weights",
    "qwen2": "a bias in attention that is not the block's",
    "qwen3": "norms of queries and keys",
    "qwen3_moe": "the same, with experts",
    "qwen3_next": "linear attention, a shared expert",
}
NOT_STEERABLE = {("nemotron_h", "full_attention"): "its blocks of attention alone have no MLP"}
FITTED = ("mpt",)
FITTED_ERROR = 0.5


def assert_steered(record: Record) -> None:
    """Every kind of block, and the embedding, is steered as a hook steers it."""
    for run in record.runs:
        place = f"{record.model_type}, layer {run.layer} {run.kind}"
        assert run.status in ("exact", "fitted"), f"{place}: {run.status}: {run.reason}"
        assert run.stacks["transformers"] != "no"
        assert not run.report, f"{place}: {run.report}"
        assert run.effect is not None and run.effect > 0.05, place
        if run.status == "fitted":
            assert run.fit is not None and run.fit["error_mean"] < FITTED_ERROR, place


@pytest.mark.slow_but("gemma", "gpt2", "llama", "mixtral", "olmo", "qwen3")
@pytest.mark.parametrize("model_type", REPRESENTATIVE)
def test_an_architecture_of_each_layout_is_steered_exactly(model_type: str) -> None:
    if model_type not in model_types():
        pytest.skip(f"transformers {transformers.__version__} has no `{model_type}`")
    record = check(model_type)
    kinds = [run for run in record.runs if (model_type, run.kind) not in NOT_STEERABLE]
    assert_steered(Record(record.model_type, record.class_name, tuple(kinds), record.seconds))
    assert record.runs[0].status == ("fitted" if model_type in FITTED else "exact")


def documented() -> dict[str, Any]:
    """The results that the page shows, if they are of the installed transformers."""
    results: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8"))
    if results["versions"]["transformers"] != transformers.__version__:
        pytest.skip(f"documented for transformers {results['versions']['transformers']}")
    return results


def test_the_page_lists_every_type_of_the_registry() -> None:
    documented()
    listed = listed_types(PAGE.read_text(encoding="utf-8"))
    missing, extra = sorted(set(model_types()) - set(listed)), sorted(set(listed) - set(model_types()))
    assert not missing and not extra and len(listed) == len(set(listed)), (
        f"docs/architectures.md lacks {missing} and has {extra} beside; run `{COMMAND}`"
    )


def test_what_another_release_adds_is_said() -> None:
    """The table is of one release; where another is installed, the test tells what it adds, and what it has no more."""
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    added, gone = other_than_recorded(results)
    recorded = results["versions"]["transformers"]
    if recorded != transformers.__version__:
        pytest.skip(
            f"docs/architectures.md is of transformers {recorded}; {transformers.__version__} adds "
            f"{', '.join(added) or 'nothing'}, and lacks {', '.join(gone) or 'nothing'}: run `{COMMAND} --new`"
        )
    assert not added and not gone, f"run `{COMMAND} --new`"


def test_a_newer_release_is_told_by_its_types(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(all_architectures, "model_types", lambda: ["llama", "newest"])
    monkeypatch.setattr(all_architectures, "wrapper_types", lambda: ["llava"])
    recorded = {"architectures": [{"model_type": "llama"}, {"model_type": "oldest"}], "wrappers": []}
    assert other_than_recorded(recorded) == (["llava", "newest"], ["oldest"])


def test_no_multimodal_type_is_wrong_or_ends_in_a_traceback() -> None:
    for record in json.loads(RESULTS.read_text(encoding="utf-8"))["wrappers"]:
        for run in record["runs"]:
            assert run["status"] in ("exact", "none"), (record["model_type"], run)
            assert run["status"] == "exact" or len(run["reason"].split()) > 3, record["model_type"]
            assert run["images"].get("status") != "wrong", record["model_type"]


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["llava", "gemma3"])
def test_a_multimodal_model_is_steered_exactly_with_text_and_image(model_type: str) -> None:
    record = check_wrapper(model_type)
    for run in record.runs:
        assert run.status == "exact" and run.images["status"] == "exact", run


@pytest.mark.slow
def test_a_class_that_does_not_run_by_itself_is_named(tmp_path: Path) -> None:
    (run,) = check_wrapper("blip-2", kinds=False).runs
    assert run.status == "none" and "needs an image" in run.reason and "pixel_values" in run.reason


def test_the_page_is_what_was_measured() -> None:
    assert PAGE.read_text(encoding="utf-8") == render(json.loads(RESULTS.read_text(encoding="utf-8"))), (
        f"docs/architectures.md is made from docs/architectures.json: run `{COMMAND} --render`"
    )


def test_no_documented_copy_is_wrong() -> None:
    for record in json.loads(RESULTS.read_text(encoding="utf-8"))["architectures"]:
        for run in record["runs"]:
            assert run["status"] != "wrong", (record["model_type"], run)


@pytest.mark.slow
def test_a_type_that_crashes_does_not_stop_the_others() -> None:
    records = {record.model_type: record for record in run_all(["no_such_type", "llama"], kinds=False)}
    assert records["no_such_type"].runs[0].status == "failed"
    assert records["llama"].runs[0].status == "exact"


@pytest.mark.slow
def test_a_type_that_hangs_is_given_up() -> None:
    (record,) = run_all(["llama"], kinds=False, timeout=0.0)
    assert record.runs[0].status == "failed" and "longer" in record.runs[0].reason


@pytest.mark.conformance_all
def test_all_architectures_are_what_the_page_says() -> None:
    """About ten minutes on two cores."""
    before = {record["model_type"]: record for record in documented()["architectures"]}
    changed = []
    for record in run_all(model_types()):
        assert isinstance(record, Record)
        old = before[record.model_type]
        now = [(run.layer, run.status, run.route) for run in record.runs]
        if now != [(run["layer"], run["status"], run["route"]) for run in old["runs"]]:
            changed.append(f"{record.model_type}: {now}")
    assert not changed, f"other than documented; run `{COMMAND}` and look at the difference: {changed}"
