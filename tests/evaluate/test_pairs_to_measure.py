"""A build measures on pairs that say nothing that any of its vectors was made of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from support.building import build_recipe, job_of
from support.sweep_reference import PAIRS
from support.tiny_models import default_checkpoint, tiny_tokenizer

from patcher.build.planning import plan_build
from patcher.evaluate import inputs
from patcher.evaluate.inputs import IN_SAMPLE, pairs_to_measure
from patcher.recipe.file import load_recipe
from patcher.vectors.finding import prepare_vectors

FIRST, LAST = PAIRS[:20], PAIRS[20:]
OTHERS = [{**row, "positive": " yes", "negative": " no"} for row in FIRST]


def recipe(folder: Path, *pairs: list[dict[str, str]], **evaluate: Any) -> Path:
    """A vector for each list of pairs."""
    vectors = [{"name": f"v{n}", "pairs": rows, "layer": n} for n, rows in enumerate(pairs)]
    path = folder / "recipe.yaml"
    path.write_text(json.dumps({"model": "model", "vectors": vectors, "evaluate": {"pictures": False, **evaluate}}))
    return path


def measured(path: Path, index: int = 0) -> tuple[list[Any], bool, list[str]]:
    loaded = load_recipe(path)
    prepared = prepare_vectors(loaded, tiny_tokenizer(), 4)
    pairs, unseen, notes = pairs_to_measure(loaded, prepared, prepared[index])
    return [pair.prompt for pair in pairs], unseen, notes


def prompts(rows: list[dict[str, str]]) -> list[str]:
    return [row["prompt"] for row in rows]


def test_pairs_of_their_own_that_the_vector_was_made_of_are_left_out(tmp_path: Path) -> None:
    assert measured(recipe(tmp_path, FIRST, pairs=LAST)) == (prompts(LAST), True, [])
    # Equal ones, and ones that only share the prompt.
    for seen in (FIRST[:3], OTHERS[:3]):
        found, unseen, (note,) = measured(recipe(tmp_path, FIRST, pairs=[*seen, *LAST]))
        assert (found, unseen) == (prompts(LAST), True)
        assert note == (
            "3 of 7 of `evaluate.pairs` say the same as pairs that a vector is made of: they are not measured on"
        )
    found, unseen, (note,) = measured(recipe(tmp_path, FIRST, pairs=OTHERS))
    assert (found, unseen) == (prompts(OTHERS), False)
    assert note == "all 20 of `evaluate.pairs` say the same as pairs that a vector is made of"


def test_vectors_that_are_measured_together_are_measured_on_what_none_of_them_has_seen(tmp_path: Path) -> None:
    alone, _, _ = measured(recipe(tmp_path, FIRST))
    assert measured(recipe(tmp_path, FIRST, LAST)) == (alone, True, [])
    seen = [row for row in OTHERS if row["prompt"] == alone[1]]
    found, unseen, (note,) = measured(recipe(tmp_path, FIRST, [*LAST, *seen]))
    assert (found, unseen) == ([alone[0], *alone[2:]], True) and len(alone) == 4
    assert note.startswith("1 of 4 of the held-out pairs of vector `v0` say the same")
    found, unseen, (note,) = measured(recipe(tmp_path, FIRST, FIRST[:9], FIRST[9:18], FIRST[18:]))
    assert (found, unseen) == (alone, False) and note.startswith("all 4 of the held-out pairs of vector `v0`")
    # The same pairs in two vectors are split alike.
    assert measured(recipe(tmp_path, FIRST, FIRST), 1) == (alone, True, [])


def test_a_persona_s_questions_count_too(tmp_path: Path) -> None:
    path = recipe(tmp_path, FIRST)
    data = json.loads(path.read_text())
    held_out, _, _ = measured(path)
    data["vectors"].append(
        {
            "name": "asked",
            "method": "persona",
            "layer": 1,
            "questions": [held_out[0].upper(), "Who else?"],
            "personas": {"positive": "Be kind.", "negative": "Be rude."},
            "chat_template": False,
        }
    )
    path.write_text(json.dumps(data))
    found, unseen, _ = measured(path)
    assert (found, unseen) == (held_out[1:], True)


def test_questions_that_are_the_same_stay_together(tmp_path: Path) -> None:
    personas = {"positive": "Be kind.", "negative": "Be rude."}
    questions = [text for row in FIRST for text in (row["prompt"], f" {row['prompt'].upper()} ")]
    vector = {"method": "persona", "layer": 1, "questions": questions, "personas": personas, "chat_template": False}
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps({"model": "model", "vectors": [vector]}))
    for seed in range(10):
        (entry,) = prepare_vectors(load_recipe(path, [f"seed={seed}"]), tiny_tokenizer(), 4)
        used, held = ({str(pair.prompt).upper() for pair in part} for part in (entry.made_of, entry.kept_out))
        assert not used & held and len(entry.kept_out) == 8
        assert any("40 of 40 pairs have the prompt" in note for note in entry.notes)


def test_a_build_says_it_and_its_plan_before(tmp_path: Path) -> None:
    default_checkpoint(tmp_path / "model", "llama")
    note = "all 4 of `evaluate.pairs` say the same as pairs that a vector is made of"
    path = recipe(tmp_path, FIRST, pairs=FIRST[:4])
    assert note in plan_build(job_of(path, tmp_path / "out")).notes
    manifest = build_recipe(path, tmp_path / "out").manifest
    assert note in manifest["notes"]
    (result,) = manifest["evaluation"]["per_vector"]
    assert (result["held_out"], result["pairs"]) == (False, 4) and IN_SAMPLE in result["notes"]


def test_the_remedy_for_groups_that_are_too_large(tmp_path: Path) -> None:
    halves = [{**row, "prompt": f"What {n % 2}?"} for n, row in enumerate(FIRST)]
    path = recipe(tmp_path, halves)
    (entry,) = prepare_vectors(load_recipe(path), tiny_tokenizer(), 4)
    assert any(
        note.endswith("0 pairs are held out, not 4; give `evaluate.pairs` to measure on others") for note in entry.notes
    )
    assert measured(path)[1] is False
    assert measured(recipe(tmp_path, halves, pairs=LAST)) == (prompts(LAST), True, [])


def test_a_side_that_all_share_is_not_seen_in_it(tmp_path: Path) -> None:
    single = [{"positive": "Love", "negative": " "}]
    own = [{"positive": f"{row['prompt']} love", "negative": " "} for row in LAST]
    assert len(measured(recipe(tmp_path, single, pairs=own))[0]) == len(LAST)


def test_the_pairs_of_the_evaluation_are_read_once(tmp_path: Path, monkeypatch: Any) -> None:
    default_checkpoint(tmp_path / "model", "llama")
    read, load = [], inputs.load_pairs
    monkeypatch.setattr(inputs, "load_pairs", lambda *given, **options: read.append(given) or load(*given, **options))
    build_recipe(recipe(tmp_path, FIRST, OTHERS, pairs=LAST), tmp_path / "out")
    assert len(read) == 1
