"""The chosen cell beside its controls."""

from __future__ import annotations

import json
import math

import pytest
import torch
from support.sweep_cells import NoisyEffect, cell

from patcher.disk.json_files import finite_or_null
from patcher.sweep.cells import CellBench
from patcher.sweep.reporting import cell_json, measure_rows, random_control, rows_for


def vector_at(layer: int, coefficient: float) -> torch.Tensor:
    return coefficient * torch.tensor([3.0, 4.0])


def test_rows_are_the_controls_of_the_choice() -> None:
    defaults = {(1, 1.0): "40% depth, +1", (2, 1.0): "60% depth, +1"}
    rows = rows_for((5, -2.0), vector_at, defaults, random_vectors=3, seed=1)
    assert [row.kind for row in rows] == ["base", "recommended", "negative", *["random"] * 3, "default", "default"]
    assert torch.equal(rows[2].vectors[5], -rows[1].vectors[5]) and rows[2].coefficient == 2.0
    for row in rows[3:6]:
        assert float(row.vectors[5].norm()) == pytest.approx(10.0)
    assert not torch.equal(rows[3].vectors[5], rows[4].vectors[5])
    assert [row.kind for row in rows_for(None, vector_at, defaults, random_vectors=3, seed=1)] == [
        "base", "default", "default",
    ]  # fmt: skip


class Silent:
    texts = ((1, 2),)

    def damage(self, _source: object, variants: list[object], texts: int | None = None) -> list[object]:
        from patcher.evaluate.damage import Damage

        one = torch.tensor([0.25], dtype=torch.float64)
        return [Damage(one * bool(variant), -one, torch.tensor([2])) for variant in variants]


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_values_effects_and_intervals(sign: float) -> None:
    effect = NoisyEffect({3.0: 0.5, -3.0: -0.5}, 20, noise=0.05)
    bench = CellBench(object(), effect, Silent(), None, None, sign, {}, 4)  # type: ignore[arg-type]
    rows = rows_for((5, 1.0), vector_at, {}, random_vectors=1, seed=0)[:3]
    prompted = NoisyEffect({3.0: 0.7}, 20, noise=0.0)
    found = measure_rows(bench, rows, prompted, lambda kl, _perplexity: kl < 0.2, seed=0)  # type: ignore[arg-type]
    assert [row["kind"] for row in found] == [
        "base", "recommended", "negative", "prompting", "prompting_and_steering",
    ]  # fmt: skip
    base, chosen, negative, prompting, both = found
    assert base["effect"] == base["low"] == base["high"] == base["damage"] == 0.0
    assert chosen["effect"] == pytest.approx(sign * 0.5, abs=0.05) and chosen["value"] == pytest.approx(0.5, abs=0.05)
    assert chosen["low"] < chosen["effect"] < chosen["high"] < chosen["low"] + 0.1
    assert negative["effect"] == pytest.approx(-sign * 0.5, abs=0.05) and chosen["within_guard"] is False
    assert prompting["damage"] is None and prompting["effect"] == 0.0
    assert both["effect"] == pytest.approx(sign * 0.7) and both["damage"] == chosen["damage"]
    assert (both["layer"], both["coefficient"]) == (5, 1.0)


def row(kind: str, effect: float) -> dict[str, object]:
    return {"kind": kind, "effect": effect}


def test_it_must_do_more_than_every_random_vector() -> None:
    found = random_control([row("recommended", 0.3), row("random", 0.1), row("random", -0.35)])
    assert found == {"seeds": 2, "largest_effect": -0.35, "mean": pytest.approx(-0.125), "distinguishable": False}
    assert (random_control([row("recommended", 0.4), row("random", -0.35)]) or {})["distinguishable"] is True
    assert random_control([row("base", 0.0), row("random", 0.1)]) is None
    nan = random_control([row("recommended", 0.4), row("random", math.nan)])
    assert nan is not None and nan["distinguishable"] is False


def test_numbers_that_json_has_not_become_null() -> None:
    found = finite_or_null(cell_json(cell(effects=(math.nan, 1.0), perplexity=math.inf), False))
    json.dumps(found, allow_nan=False)
    assert found["effect"] is None and found["perplexity"] is None and found["damage"] == 0.1 and found["pairs"] == 2
    assert finite_or_null({"a": (1, True, None, "x", [math.inf])}) == {"a": [1, True, None, "x", [None]]}
