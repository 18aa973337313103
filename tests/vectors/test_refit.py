"""`refit: true`: the effect is that of the vector without the held-out pairs; what is shipped is made of all pairs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.building import build_recipe, job_of
from support.sweep_reference import NEUTRAL, NOUNS, PAIRS, Plain
from support.tiny_models import default_checkpoint, tiny_tokenizer

from patcher.build.planning import plan_build
from patcher.build.reproduce import reproduce
from patcher.cli import main
from patcher.errors import InputError
from patcher.evaluate.damage import POSITIONS
from patcher.pairs.formats import load_pairs
from patcher.patched.reading import read_manifest
from patcher.recipe.file import load_recipe
from patcher.recipe.vector import VectorSpec
from patcher.vectors.finding import prepare_vectors

LAYER = 1
REFIT = "vectors.0.refit=true"
CHANGES_NOTHING = "`refit: true` changes nothing: no pairs are held out"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, neutral text, pairs of which some are repeated, a recipe; and ``plain`` and ``refit``, built of it."""
    folder = tmp_path_factory.mktemp("refit")
    default_checkpoint(folder / "base", "llama")
    (folder / "pairs.json").write_text(json.dumps([*PAIRS, *PAIRS[3:6]]))
    (folder / "neutral.txt").write_text("\n".join(NEUTRAL) + "\n")
    vector = {"name": "love", "pairs": "pairs.json", "layer": LAYER, "coefficient": 2.0}
    evaluate = {"neutral": "neutral.txt", "prompts": ["I would"], "generate_tokens": 1, "pictures": False}
    (folder / "recipe.yaml").write_text(json.dumps({"model": "base", "vectors": [vector], "evaluate": evaluate}))
    build_recipe(folder / "recipe.yaml", folder / "plain", cache=False)
    build_recipe(folder / "recipe.yaml", folder / "refit", REFIT, cache=False)
    return folder


def built(place: Path, tmp_path: Path, *overrides: str, **options: Any) -> Path:
    build_recipe(place / "recipe.yaml", tmp_path / "out", *overrides, **{"cache": False, **options})
    return tmp_path / "out"


def shipped(folder: Path) -> torch.Tensor:
    (edit,) = read_manifest(folder).edits
    return load_file(folder / "steering.safetensors")[edit.tensor].double()


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return float((one - other).norm() / other.norm()) < 1e-5


def test_the_final_vector_is_the_mean_over_all_pairs_and_the_measure_is_of_the_other_one(place: Path) -> None:
    plain, spec = Plain(place / "base"), load_recipe(place / "recipe.yaml").recipe.vectors[0]
    pairs = load_pairs("pairs.json", base_folder=place, where="test")
    (entry,) = prepare_vectors(load_recipe(place / "recipe.yaml"), tiny_tokenizer(), 2)
    assert len(pairs) == 27 and 4 <= len(entry.held_out) <= 6
    of_all, of_used = (2 * plain.direction(part, spec, LAYER)[0] for part in (pairs, list(entry.used)))
    assert close(shipped(place / "refit"), of_all) and close(shipped(place / "plain"), of_used)
    assert not close(of_all, of_used)

    first, second = read_manifest(place / "plain"), read_manifest(place / "refit")
    assert first.evaluation is not None and second.evaluation is not None
    assert second.evaluation.per_vector == first.evaluation.per_vector
    assert second.evaluation.curve == first.evaluation.curve
    (one,), (two,) = first.edits, second.edits
    assert one.made_of is not None and one.made_of.as_json() == {"count": len(entry.used), "of": 27}
    assert two.made_of is not None
    assert (two.made_of.count, two.made_of.of, two.made_of.measured) == (27, 27, len(entry.used))
    cosine = float(of_all @ of_used / of_all.norm() / of_used.norm())
    assert two.made_of.cosine == pytest.approx(cosine, abs=1e-6) and cosine < 0.9999

    # The damage is that of what is shipped.
    texts = plain.encoded(place / "neutral.txt")
    for folder, vector in (("plain", of_used), ("refit", of_all)):
        guard = read_manifest(place / folder).evaluation.guard
        assert guard.kl == pytest.approx(plain.divergence(texts, {LAYER: vector.float()}, POSITIONS), rel=1e-3)


def test_report_card_and_dry_run_say_it(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    used = read_manifest(place / "refit").edits[0].made_of.measured
    cosine = f"(cosine of the two: {read_manifest(place / 'refit').edits[0].made_of.cosine:.4f})"
    split = f"`love` is made of {used} of 27 pairs; the other {27 - used} were held out to measure its effect"
    again = f"Its effect is that of the vector that {used} of them make, measured on the others {cosine}"
    assert f"{split} (`refit: true` makes the final vector of all)." in " ".join(card(place / "plain"))
    assert f"`love` is made of all 27 pairs. {again}" in " ".join(card(place / "refit"))
    for overrides, words in (((), f"is made of {used} of 27 pairs\n"), (("--set", REFIT), "after the measure of all")):
        with pytest.raises(SystemExit):
            main([str(place / "recipe.yaml"), "--dry-run", *overrides])
        assert words in capsys.readouterr().out


def card(folder: Path) -> list[str]:
    return (folder / "README.md").read_text(encoding="utf-8").split()


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        ("vectors.0.scale=residual", "vectors.0.coefficient=0.1"),
        ("vectors.0.method=pca", "vectors.0.scale=2"),
        ("vectors.0.method=pca", "vectors.0.center=true"),
        ("capture.mode=stream",),
    ],
)
def test_it_is_the_vector_of_a_build_that_holds_nothing_out(
    place: Path, tmp_path: Path, changes: tuple[str, ...]
) -> None:
    few = ("evaluate.limit=2", "evaluate.generate_tokens=0")
    again = built(place, tmp_path / "a", REFIT, *changes, *few)
    whole = built(place, tmp_path / "b", "evaluate.held_out=0", *changes, *few)
    assert close(shipped(again), shipped(whole))
    norms = [read_manifest(folder).edits[0].residual_norm for folder in (again, whole)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)
    assert read_manifest(again).edits[0].made_of.cosine < 0.99999


def test_the_norm_of_the_stream_is_that_of_all_pairs(place: Path, tmp_path: Path) -> None:
    folder = built(place, tmp_path, REFIT, "vectors.0.scale=residual", "vectors.0.coefficient=0.5")
    pairs, spec = load_pairs("pairs.json", base_folder=place, where="test"), VectorSpec(pairs="pairs.json", layer=LAYER)
    _, norm = Plain(place / "base").direction(pairs, spec, LAYER)
    assert read_manifest(folder).edits[0].residual_norm == pytest.approx(norm, rel=1e-5)
    assert float(shipped(folder).norm()) == pytest.approx(0.5 * norm, rel=1e-5)


@pytest.mark.slow
def test_activations_from_the_cache_make_the_same_vector(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATCH_MODEL_CACHE", str(tmp_path / "cache"))
    said: list[str] = []
    for name in ("a", "b"):
        folder = built(place, tmp_path / name, REFIT, "evaluate.limit=2", cache=True, note=said.append)
        assert torch.equal(shipped(folder), shipped(place / "refit"))
    assert sum("are taken from the cache" in line for line in said) == 2


def test_what_it_was_made_of_is_recorded_with_the_held_out_pairs(place: Path) -> None:
    first, second = (read_manifest(place / name).inputs[0] for name in ("plain", "refit"))
    assert first.pairs != second.pairs and first.tokens != second.tokens


@pytest.mark.slow
def test_it_is_reproduced_bit_for_bit(place: Path) -> None:
    result = reproduce(place / "refit", say=lambda _line: None)
    assert result.same and "steering.safetensors" in result.identical
    path = place / "refit" / "steering.json"
    kept = path.read_text()
    manifest = json.loads(kept)
    del manifest["edits"][0]["made_of"]
    try:
        # A folder of a version that did not record it.
        path.write_text(json.dumps(manifest))
        assert reproduce(place / "refit", say=lambda _line: None).same
        manifest["edits"][0]["made_of"] = {"count": 26, "of": 27}
        path.write_text(json.dumps(manifest))
        assert reproduce(place / "refit", say=lambda _line: None).manifest == ["edits"]
    finally:
        path.write_text(kept)


@pytest.mark.parametrize(
    "changes",
    [
        ("evaluate.held_out=0",),
        ("evaluate.enabled=false",),
        ('evaluate.pairs=[{"prompt": "And so?", "positive": " yes", "negative": " no"}]',),
        ("vectors.0.limit=9",),
    ],
)
def test_where_nothing_is_held_out_it_changes_nothing_and_says_so(place: Path, changes: tuple[str, ...]) -> None:
    loaded = load_recipe(place / "recipe.yaml", [REFIT, *changes])
    (entry,) = prepare_vectors(loaded, tiny_tokenizer(), 2)
    assert entry.rest == () and any(CHANGES_NOTHING in note for note in entry.notes)


def test_a_vector_from_a_file_has_none(place: Path) -> None:
    with pytest.raises(InputError) as failed:
        load_recipe(place / "recipe.yaml", ["vectors.0={method: file, file: v.safetensors, layer: 1, refit: true}"])
    assert "takes no `refit`: it is not made of pairs" in failed.value.problems[0].message


def test_lists_without_partners(place: Path, tmp_path: Path) -> None:
    lists = {"positives": [f"I love the {noun}" for noun in NOUNS], "negatives": [f"the {noun}" for noun in NOUNS[1:]]}
    vector = {"name": "love", "layer": LAYER, "chat_template": False, "refit": True, **lists}
    path = place / "lists.yaml"
    few = {"pictures": False, "generate_tokens": 0, "neutral_limit": 2}
    path.write_text(json.dumps({"model": "base", "vectors": [vector], "evaluate": few}))
    build_recipe(path, tmp_path / "out", cache=False)
    plain = Plain(place / "base")
    means = [
        torch.stack([plain.residuals(plain.tokenizer(text)["input_ids"], LAYER)[-1] for text in texts]).mean(dim=0)
        for texts in lists.values()
    ]
    assert close(shipped(tmp_path / "out"), means[0] - means[1])
    made_of = read_manifest(tmp_path / "out").edits[0].made_of
    assert (made_of.count, made_of.of, made_of.measured, made_of.unit) == (23, 23, 19, "texts")
    assert made_of.cosine < 0.99999
    text = " ".join(card(tmp_path / "out"))
    assert "`love` is made of all 23 texts. Its effect is that of the vector that 19 of them make" in text


@pytest.mark.slow
def test_a_persona_s_held_out_answers_are_in_the_final_vector(place: Path, tmp_path: Path) -> None:
    vector = {
        "method": "persona",
        "layer": LAYER,
        "questions": [f"What of the {noun}?" for noun in NOUNS[:10]],
        "personas": {"positive": "Say yes.", "negative": "Say no."},
        "generate": {"max_new_tokens": 4, "temperature": 0},
        "chat_template": False,
    }
    path = place / "persona.yaml"
    path.write_text(json.dumps({"model": "base", "vectors": [vector], "evaluate": {"pictures": False}}))
    found = {}
    for name, change in (("plain", "seed=0"), ("refit", REFIT), ("whole", "evaluate.held_out=0")):
        build_recipe(path, tmp_path / name, change, "evaluate.generate_tokens=0", cache=False)
        found[name] = shipped(tmp_path / name)
    # Greedy answers are the same in whatever order.
    assert close(found["refit"], found["whole"]) and not close(found["plain"], found["whole"])
    made_of = read_manifest(tmp_path / "refit").edits[0].made_of
    assert (made_of.count, made_of.of, made_of.measured) == (10, 10, 8)
    cosine = float(torch.cosine_similarity(found["plain"], found["refit"], dim=0))
    assert made_of.cosine == pytest.approx(cosine, abs=1e-6)


def test_the_plan_counts_pairs(place: Path, tmp_path: Path) -> None:
    planned = plan_build(job_of(place / "recipe.yaml", tmp_path / "out", REFIT))
    (entry,) = planned.as_json()["vectors"]
    assert entry["pairs"] + entry["held_out"] == 27 and entry["refit"] is True
