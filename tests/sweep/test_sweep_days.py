"""A sweep of a template that writes the date goes on, on the day that it began, and its recipe keeps that day."""

from __future__ import annotations

from datetime import date
from pathlib import Path

import pytest
from support.building import job_of
from support.chat_templates import LLAMA_3
from support.sweep_reference import make_model, run_sweep, write_sweep
from support.tiny_models import tiny_tokenizer

from patcher.recipe.file import load_recipe
from patcher.sweep.files import write_results

PAIRS = [
    {"prompt": f"How is the {thing}?", "positive": f"I love the {thing}", "negative": f"I hate the {thing}"}
    for thing in (
        "film",
        "food",
        "sea",
        "rain",
        "train",
        "ticket",
        "station",
        "winter",
        "answer",
        "cold",
        "walk",
        "wait",
    )
]


@pytest.mark.slow
def test_an_interrupted_sweep_goes_on_on_its_own_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Day(date):
        now = date(2026, 11, 28)

        @classmethod
        def today(cls) -> date:
            return cls.now

    monkeypatch.setattr("patcher.vectors.finding.date", Day)
    model = make_model(tmp_path / "base", "meta-llama--Llama-3.2-1B")
    tiny_tokenizer(LLAMA_3).save_pretrained(model)
    sweep = {"layers": [1], "coefficients": [0.5, 1.0]}
    path = write_sweep(tmp_path, model, {"pairs": PAIRS}, sweep=sweep, evaluate={"guard": {"kl": None}})
    first = run_sweep(path, tmp_path / "sweep")
    assert first.recipe.vectors[0].template_date == date(2026, 11, 28)
    Day.now = date(2026, 11, 29)
    said: list[str] = []
    again = run_sweep(path, tmp_path / "sweep", say=said.append)
    assert any("finished cells are taken" in line for line in said)
    assert again.recipe.vectors == first.recipe.vectors and again.data["grid"] == first.data["grid"]
    anew = run_sweep(path, tmp_path / "sweep", force=True)
    assert anew.recipe.vectors[0].template_date == date(2026, 11, 29)

    again.data["recommended"] = {"layer": 1, "coefficient": 0.5}
    write_results(again, job_of(path, tmp_path / "sweep"), pictures=False)
    (chosen,) = load_recipe(tmp_path / "sweep" / "recipe.yaml").recipe.vectors
    assert (chosen.layer, chosen.coefficient, chosen.template_date) == (1, 0.5, date(2026, 11, 28))
