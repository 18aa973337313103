"""The README says of each family what was measured, and somebody who has one model finds it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from readme_models import FILES, HEADING, README, ROOT, section, table, with_section
from support.families import families

STACKS = ("transformers", "vllm", "llama.cpp")


def documented(name: str) -> Any:
    return json.loads((ROOT / "docs" / name).read_text(encoding="utf-8"))


def run(asked: str, cost: str, outcomes: tuple[str, ...]) -> dict[str, Any]:
    seen = {stack: {"outcome": outcome} for stack, outcome in zip(STACKS, outcomes, strict=True)}
    return {"asked": asked, "cost": cost, "seen": seen}


def record(name: str, *runs: dict[str, Any], **keys: Any) -> dict[str, Any]:
    return {"name": name, "form": "", "runs": list(runs), **keys}


def test_the_readme_is_what_was_measured() -> None:
    readme = README.read_text(encoding="utf-8")
    assert readme == with_section(readme), "run `python tests/conformance/families.py --render`"


def test_every_family_is_found_by_its_name() -> None:
    lines = README.read_text(encoding="utf-8").partition(HEADING)[2].partition("\n## ")[0].splitlines()
    names = [line.split(" | ")[0] for line in lines if line.startswith("| ")][2:]
    for family in families():
        assert sum(family.name in name.removeprefix("| ").replace("*", "") for name in names), family.name
    assert "patch-model inspect" in "\n".join(lines)


def test_a_change_of_what_was_measured_is_seen() -> None:
    found = [documented(name) for name in FILES]
    before = section(*found)
    found[0]["families"][0]["runs"][0]["seen"]["vllm"]["outcome"] = "wrong"
    assert section(*found) != before


@pytest.mark.parametrize(
    ("runs", "cells"),
    [
        ([run("stacks", "none", ("exact",) * 3)], ["yes", "none", "yes", "yes", "yes"]),
        (
            [
                run("stacks", "one more layer in 5 and its KV cache", ("exact", "no base", "refused")),
                run("free", "none", ("exact", "refused", "refused")),
                run("targets", "4 more layers in 8 and their KV cache", ("exact", "no base", "exact")),
            ],
            ["yes", "one more layer; none with `prefer: free`", "yes", "not known", "with `targets`"],
        ),
        ([run("stacks", "none", ("exact", "wrong", "refused"))], ["yes", "none", "yes", "no", "no"]),
        ([], ["no", "–", "–", "–", "–"]),
    ],
)
def test_cells(runs: list[dict[str, Any]], cells: list[str]) -> None:
    assert table([record("Some", *runs)]) == [["Some", *cells]]


def test_those_of_one_maker_that_fare_alike_share_a_row_in_the_order_of_the_alphabet() -> None:
    free = run("stacks", "none", ("exact",) * 3)
    rows = table(
        [
            record("b2", free), record("a1", free), record("b1", free, wrapper=True), record("b3"), record("C", free),
        ]
    )  # fmt: skip
    assert [row[0] for row in rows] == ["a1", "b2, b1 *multimodal*", "b3", "C"]


def test_a_family_without_runs_of_the_stacks_is_told_by_its_type() -> None:
    families, architectures = (documented(name) for name in FILES)
    families["families"] = [record("Some", model_type="some"), record("Other", model_type="other")]
    run = {"status": "exact", "cost": "one more layer in 6 and its KV cache"}
    architectures["wrappers"] = [{"model_type": "some", "runs": [run]}]
    found = section(families, architectures)
    assert "| Some | yes | one more layer | yes | not run | not run |" in found and "| Other | no | – |" in found


def test_a_readme_without_the_section_is_refused() -> None:
    with pytest.raises(ValueError, match="For which models"):
        with_section("# patch-model\n")
