"""The parts of two lists that a sweep makes, chooses and reports on share no text."""

from __future__ import annotations

import json
from pathlib import Path

from support.building import job_of
from support.tiny_models import tiny_checkpoint
from transformers import AutoTokenizer

from patcher.build.planning import plan_build
from patcher.evaluate.lists import IN_SAMPLE
from patcher.sweep import materials


def parts_of(folder: Path, positives: int, negatives: int) -> materials.Parts:
    if not (folder / "base").is_dir():
        tiny_checkpoint(folder / "base", "meta-llama--Llama-3.2-1B")
    vector = {
        "positives": [f"Help {number}" for number in range(positives)],
        "negatives": [f"Name {number}" for number in range(negatives)],
        "layer": 1,
        "refit": True,
    }
    recipe = folder / "recipe.yaml"
    recipe.write_text(json.dumps({"model": "base", "vectors": [vector]}))
    job = job_of(recipe, folder / "out")
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    return materials.split(plan_build(job).prepared, 0, job.loaded, tokenizer)


def test_each_list_is_split_in_three(tmp_path: Path) -> None:
    parts = parts_of(tmp_path, 40, 25)
    lists = parts.prepared[0].lists
    assert lists is not None
    three = [lists.used, parts.choose_texts, parts.report_texts]
    assert [(len(both.positive), len(both.negative)) for both in three] == [(24, 15), (8, 5), (8, 5)]
    assert len({item.text for both in three for item in both}) == 65
    assert not parts.choose and not parts.report and not any(IN_SAMPLE in note for note in parts.notes)
    # A sweep measures nothing on a refitted vector.
    assert not parts.prepared[0].rest_sides
    # A build makes it of the first two parts.
    assert parts.kept_back and parts.whole is not None and parts.whole.lists is not None
    assert parts.whole.lists.used == lists.used and set(parts.whole.lists.rest) == set(parts.choose_texts)


def test_lists_that_are_too_short_are_told(tmp_path: Path) -> None:
    parts = parts_of(tmp_path, 6, 30)
    assert parts.choose_texts and parts.report_texts
    assert any(IN_SAMPLE in note for note in parts.notes) and not parts.kept_back
