"""Pairs in three parts that share nothing; what a fingerprint notices."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.sweep_reference import LETTERS, PAIRS, parts_of, write_sweep
from support.tiny_models import tiny_tokenizer

from patcher.evaluate.inputs import IN_SAMPLE
from patcher.pairs.pair import ContrastPair
from patcher.recipe.rewriting import chosen_recipe
from patcher.sweep.materials import Parts, _every_other
from patcher.sweep.record import fingerprint
from patcher.vectors.finding import prepare_vectors

BLOCKS = 4


def parts(path: Path, *overrides: str) -> Parts:
    return parts_of(path, tiny_tokenizer(), BLOCKS, *overrides)[2]


def texts(pairs: Sequence[ContrastPair]) -> set[tuple[Any, ...]]:
    return {(pair.prompt, pair.positive, pair.negative) for pair in pairs}


@pytest.fixture
def letters(tmp_path: Path) -> Path:
    return write_sweep(tmp_path / "sweep", tmp_path / "model", {"pairs": "letters.json"})


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_three_parts_share_nothing_and_the_third_is_what_a_build_holds_out(letters: Path, seed: int) -> None:
    loaded, index, found = parts_of(letters, tiny_tokenizer(), BLOCKS, f"seed={seed}")
    made = found.prepared[index].used
    three = [texts(part) for part in (made, found.choose, found.report)]
    assert [len(part) for part in three] == [14, 5, 5] and len(set.union(*three)) == len(LETTERS)
    (built,) = prepare_vectors(loaded, tiny_tokenizer(), BLOCKS)
    assert three[2] == texts(built.held_out) and three[0] | three[1] == texts(built.used)
    assert len(found.prepared[index].pairs) == len(made)
    for part in (made, found.choose, found.report):
        matching = [pair.positive.strip() for pair in part]
        assert abs(matching.count("(A)") - matching.count("(B)")) <= 1


def test_seeds_and_shares(letters: Path) -> None:
    assert parts(letters).choose == parts(letters).choose
    assert texts(parts(letters).choose) != texts(parts(letters, "seed=5").choose)
    wide = parts(letters, "sweep.choose=0.5", "evaluate.held_out=0.25", "sweep.limit=7", "evaluate.limit=4")
    assert [len(wide.prepared[0].used), len(wide.choose), len(wide.report)] == [6, 7, 4]
    # Halving begins with the first few, which are not those of the file.
    assert list(wide.choose) != sorted(wide.choose, key=lambda pair: int(pair.origin.rstrip("]").rpartition("[")[2]))


def test_pairs_that_stand_twice_make_no_vector(tmp_path: Path) -> None:
    path = write_sweep(tmp_path / "sweep", tmp_path / "model", {"pairs": [*PAIRS, *PAIRS[:9]]})
    found = parts(path)
    made, choose, report = (texts(part) for part in (found.prepared[0].used, found.choose, found.report))
    assert not made & choose and not made & report and not choose & report
    assert any("stand in two parts" in note for note in found.notes)
    assert any("18 of 33 pairs have the prompt" in note and "9 groups" in note for note in found.notes)
    assert len(made) + len(choose) + len(report) == len(PAIRS)


@pytest.mark.parametrize("seed", range(8))
def test_a_prompt_stands_in_one_part_and_so_does_a_question_with_its_options_swapped(tmp_path: Path, seed: int) -> None:
    swapped = [
        {
            **row,
            "question": row["question"].replace("(A) yes\n(B) no", "(A) no\n(B) yes"),
            "answer_matching_behavior": row["answer_not_matching_behavior"],
            "answer_not_matching_behavior": row["answer_matching_behavior"],
        }
        for row in LETTERS
    ]
    path = write_sweep(tmp_path / "sweep", tmp_path / "model", {"pairs": "both.json"}, seed=seed)
    (path.parent / "both.json").write_text(json.dumps([*LETTERS, *swapped]))
    found = parts(path)
    three = [found.prepared[0].used, found.choose, found.report]
    assert [len(part) for part in three] == [28, 10, 10]
    stems = [{str(pair.prompt).split("\n")[0] for pair in part} for part in three]
    assert sum(map(len, stems)) == len(set.union(*stems)) == len(LETTERS)
    for part in three:
        assert sum(pair.positive == " (A)" for pair in part) * 2 == len(part)


def test_a_sweep_chooses_and_reports_on_what_no_vector_is_made_of(tmp_path: Path) -> None:
    other = {"name": "other", "pairs": "others.json", "layer": 0}
    path = write_sweep(tmp_path / "sweep", tmp_path / "model", {}, others=[other])
    # Fewer than ten: the other vector is made of them all.
    (path.parent / "others.json").write_text(json.dumps(PAIRS[:9]))
    found = parts(path)
    taken = {row["prompt"] for row in PAIRS[:9]}
    assert not taken & {pair.prompt for pair in (*found.choose, *found.report)} and found.choose and found.report
    assert any("held-out pairs of vector `love` say the same" in note for note in found.notes)
    assert any("pairs to choose on say the same as another vector's pairs: they are left out" in n for n in found.notes)
    many = [{"prompt": row["prompt"], "positive": " yes", "negative": " no"} for row in PAIRS]
    vectors = [{**other, "name": f"v{n}", "pairs": many[n : n + 8]} for n in range(0, 24, 8)]
    crowded = write_sweep(tmp_path / "crowded", tmp_path / "model", {}, others=vectors)
    notes = parts(crowded).notes
    assert any("pairs to choose on say the same as another vector's pairs: there are no others" in n for n in notes)
    assert any(IN_SAMPLE in note for note in notes)
    own = parts(path, f"evaluate.pairs={json.dumps(PAIRS[6:12])}", "vectors.1.pairs=letters.json")
    assert {pair.prompt for pair in own.report} == {row["prompt"] for row in PAIRS[9:12]}


def test_a_sweep_is_of_no_refitted_vector(letters: Path) -> None:
    """It would have seen the pairs that the sweep reports on."""
    loaded, index, found = parts_of(letters, tiny_tokenizer(), BLOCKS, "vectors.0.refit=true")
    assert prepare_vectors(loaded, tiny_tokenizer(), BLOCKS)[0].rest
    assert all(entry.rest == () for entry in found.prepared)
    assert found.prepared[index].pairs == parts(letters).prepared[index].pairs
    chosen = chosen_recipe(loaded.recipe, index, 2, 1.5).vectors[index]
    assert chosen.refit and (chosen.layer, chosen.coefficient) == (2, 1.5)


def test_pairs_of_their_own_are_reported(tmp_path: Path) -> None:
    path = write_sweep(tmp_path / "sweep", tmp_path / "model", {}, evaluate={"pairs": "letters.json"})
    found = parts(path)
    assert texts(found.report) == {
        (row["question"], row["answer_matching_behavior"], row["answer_not_matching_behavior"]) for row in LETTERS
    }
    assert len(found.prepared[0].used) + len(found.choose) == len(PAIRS)
    assert not any(IN_SAMPLE in note for note in found.notes)
    # The same pairs given for both: said, because nothing was kept back.
    same = parts(path, "evaluate.pairs=pairs.json")
    assert any(IN_SAMPLE in note for note in same.notes)


@pytest.mark.parametrize("changes", [("evaluate.held_out=0",), ("evaluate.enabled=false",), ("vectors.0.limit=6",)])
def test_where_nothing_is_kept_back_it_is_said(letters: Path, changes: tuple[str, ...]) -> None:
    found = parts(letters, *changes)
    assert found.choose and found.report and any(IN_SAMPLE in note for note in found.notes)
    assert not found.kept_back and parts(letters).kept_back


def test_a_vector_from_a_file(tmp_path: Path) -> None:
    vector = {"method": "file", "file": "v.safetensors", "pairs": None}
    path = write_sweep(tmp_path / "sweep", tmp_path / "model", vector, evaluate={"pairs": [*PAIRS, *PAIRS[:5]]})
    save_file({"v": torch.ones(4)}, path.parent / "v.safetensors")
    found = parts(path)
    assert not texts(found.choose) & texts(found.report) and len(texts(found.choose) | texts(found.report)) == len(
        PAIRS
    )
    few = parts(path, f"evaluate.pairs={json.dumps(PAIRS[:3])}")
    assert texts(few.choose) == texts(few.report) and "too few pairs" in few.notes[-1]
    assert found.kept_back and not few.kept_back and found.whole is few.whole is None
    assert parts(path, "evaluate.pairs=null").choose == ()


def test_cells_are_measured_on_every_other_neutral_text() -> None:
    assert _every_other([(1,), (2,), (3,)], 40) == [(1,), (3,)]
    assert _every_other([(1,), (2,), (3,)], 1) == _every_other([(1,)], 40) == [(1,)]


def test_a_build_has_what_the_vector_is_made_of_and_chosen_on(letters: Path) -> None:
    loaded, index, found = parts_of(letters, tiny_tokenizer(), BLOCKS)
    (built,) = prepare_vectors(loaded, tiny_tokenizer(), BLOCKS)
    assert found.whole is not None and found.whole.pairs == found.prepared[index].pairs
    assert {*found.whole.pairs, *found.whole.rest} == set(built.pairs)
    assert len(found.whole.pairs) + len(found.whole.rest) == len(built.pairs)
    # Whatever is sampled to choose on.
    assert len(parts(letters, "sweep.limit=2").whole.rest) == len(found.whole.rest) == 5  # type: ignore[union-attr]


def test_what_a_fingerprint_notices(tmp_path: Path) -> None:
    other = {"name": "other", "method": "file", "file": "v.safetensors", "layer": 0}
    path = write_sweep(tmp_path / "sweep", tmp_path / "model", {}, others=[other], evaluate={"on_topic": "on.txt"})
    vector = path.parent / "v.safetensors"
    save_file({"v": torch.ones(4)}, vector)

    def seen(*overrides: str, identity: Any = None) -> str:
        loaded, index, found = parts_of(path, tiny_tokenizer(), BLOCKS, *overrides)
        return json.dumps(fingerprint(loaded, identity, found, index))

    before = seen()
    assert seen() == before and seen("output=elsewhere", "verify.tolerance=1e-5", "exact=false") == before
    for change in ("guard.kl=9", "prompts=[x]", "system_prompt=Be kind.", "generate_tokens=3", "topic_words=[x]"):
        assert seen(f"evaluate.{change}") == before, change
    for change in ("layers=[1]", "coefficients=[0.5]", "search=halving", "random_vectors=2"):
        assert seen(f"sweep.{change}") == before, change
    for change in ("seed=1", "vectors.1.limit=20", "sweep.choose=0.3", "evaluate.neutral_limit=1", "dtype=bfloat16"):
        assert seen(change) != before, change
    assert seen(identity={"files": [1]}) != before and seen(identity="a revision") != before
    for name, content in (("on.txt", "Else."), ("neutral.txt", "Else."), ("pairs.json", json.dumps(PAIRS[1:]))):
        text = (path.parent / name).read_text()
        (path.parent / name).write_text(content)
        assert seen() != before, name
        (path.parent / name).write_text(text)
        assert seen() == before
    save_file({"v": 2 * torch.ones(4)}, vector)
    assert seen() != before
