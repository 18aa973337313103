"""What is measured of a vector of two lists: the separation of held-out texts, and what adding it does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.building import build_recipe, job_of
from support.checkpoints import hooked, load
from transformers import AutoTokenizer

from patcher.build.planning import plan_build
from patcher.cli import main
from patcher.demo.write import write_demo
from patcher.errors import CheckFailed
from patcher.evaluate.lists import separation
from patcher.evaluate.of_build import require_effect
from patcher.patched.reading import read_manifest

LAYER = 1
NOUNS = ("film", "hotel", "book", "train")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demonstration model with lists of approving and of disapproving answers to other questions."""
    folder = write_demo(tmp_path_factory.mktemp("demo") / "here").parent
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    answers = ("answer_matching_behavior", "answer_not_matching_behavior")
    for name, key, part in (("good", answers[0], rows[:60]), ("bad", answers[1], rows[60:100])):
        responses = [{"prompt": row["question"], "response": row[key]} for row in part]
        (folder / f"{name}.json").write_text(json.dumps(responses))
        words = list(dict.fromkeys(row[key].strip() for row in part))
        prompts = [f"I saw the {noun}. It was very {word}. I" for noun in NOUNS for word in words[:10]]
        (folder / f"{name}.txt").write_text("\n".join(prompts))
    return folder


def recipe_of(folder: Path, name: str, **keys: Any) -> Path:
    evaluate = {
        "budget": "full",
        "neutral": "neutral.txt",
        "generate_tokens": 0,
        "pictures": False,
        **keys.pop("evaluate", {}),
    }
    vector = {"name": "approving", "positives": "good.json", "negatives": "bad.json", "layer": LAYER}
    vector |= {"scale": 7, "coefficient": 2.0, **keys.pop("vector", {})}
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps({"model": "model", "vectors": [vector], "evaluate": evaluate, **keys}))
    return path


@pytest.fixture(scope="module")
def built(demo: Path) -> Path:
    return build_recipe(recipe_of(demo, "responses"), demo / "out", strict=True).output


def stored(folder: Path) -> torch.Tensor:
    name = json.loads((folder / "steering.json").read_text())["edits"][0]["tensor"]
    return load_file(folder / "steering.safetensors")[name]


def test_responses_are_measured_as_log_odds_without_partners(demo: Path, built: Path) -> None:
    found = json.loads((built / "steering.json").read_text())["evaluation"]["per_vector"][0]
    assert found["measure"] == "log_odds_per_token" and found["unit"] == "texts of each list"
    assert found["pairs"] == 8 and found["held_out"] and found["distinguishable"]
    assert found["steered"] > found["base"] + 1 and found["negative"] < found["base"]
    assert max(abs(value - found["base"]) for value in found["random"]) < found["steered"] - found["base"]
    # By hand: the held-out texts are those that the plan keeps out.
    lists = plan_build(job_of(recipe_of(demo, "responses"), demo / "nowhere")).prepared[0].lists
    assert lists is not None and (len(lists.held_out.positive), len(lists.held_out.negative)) == (12, 8)
    model, means = load(demo / "model"), {}
    for name, side in (
        ("positive", lists.tokenised(lists.held_out).positive[:8]),
        ("negative", lists.tokenised(lists.held_out).negative),
    ):
        scores = []
        for text in side:
            with torch.no_grad():
                log_probs = model(input_ids=torch.tensor([text.ids])).logits[0].log_softmax(-1)
            start = text.continuation_start
            scores.append(log_probs[range(start - 1, len(text.ids) - 1), list(text.ids[start:])].mean())
        means[name] = float(torch.stack(scores).mean())
    assert found["base"] == pytest.approx(means["positive"] - means["negative"], abs=1e-4)


def test_the_separation_is_that_of_the_held_out_texts(demo: Path, built: Path) -> None:
    [found] = read_manifest(built).evaluation.per_vector[0].separation
    lists = plan_build(job_of(recipe_of(demo, "responses"), demo / "nowhere")).prepared[0].lists
    assert lists is not None
    model, read = load(demo / "model"), []
    with model.model.layers[LAYER].register_forward_hook(
        lambda _m, _i, o: read.append(o if isinstance(o, torch.Tensor) else o[0])
    ):
        for side in lists.tokenised(lists.held_out):
            with torch.no_grad():
                model(input_ids=torch.tensor([side.ids]))
    along = torch.stack([hidden[0, -1].double() for hidden in read]) @ stored(built).double()
    first, second = along[:12], along[12:]
    pooled = ((first.var() * 11 + second.var() * 7) / 18).sqrt()
    assert found.d_prime == pytest.approx(float((first.mean() - second.mean()) / pooled), rel=1e-4)
    ordered = (first[:, None] > second[None]).double().mean()
    assert found.auc == pytest.approx(float(ordered)) and found.auc > 0.95
    assert (found.layer, found.positives, found.negatives, found.beyond_random) == (LAYER, 12, 8, True)


def test_the_report_and_the_card_say_what_separation_does_not(
    demo: Path, built: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    card = (built / "README.md").read_text()
    assert "On 8 held-out texts of each list" in card
    assert "not that adding it steers" in card and "12 and 8" in card
    assert "48 of 60" not in card and "made of 80 of 100 texts" in card
    with pytest.raises(SystemExit) as ended:
        main([str(recipe_of(demo, "responses")), "--output", str(demo / "plan"), "--dry-run"])
    assert ended.value.code == 0
    assert "48 and 32 texts" in capsys.readouterr().out


@pytest.mark.slow
def test_prompts_alone_are_measured_by_the_first_token(demo: Path) -> None:
    vector = {"positives": "good.txt", "negatives": "bad.txt"}
    for name in ("good", "bad"):
        lines = (demo / f"{name}.txt").read_text().splitlines()
        talks = [[{"role": "user", "content": line}] for line in lines]
        (demo / f"{name}-talks.json").write_text(json.dumps(talks))
    tokenizer = AutoTokenizer.from_pretrained(demo / "model")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(demo / "chat")
    for path in (demo / "model").iterdir():
        if not (demo / "chat" / path.name).exists():
            (demo / "chat" / path.name).write_bytes(path.read_bytes())
    recipe = recipe_of(demo, "prompts", vector=vector, model="chat")
    result = build_recipe(recipe, demo / "prompts")
    found = result.manifest["evaluation"]["per_vector"][0]
    assert found["measure"] == "first_token_as_after_positives" and found["unit"] == "prompts"
    assert found["held_out"] and found["pairs"] == 8
    assert 0 <= found["negative"] <= 1 and 0 <= found["steered"] <= 1
    assert found["negative"] < found["base"] < found["steered"] and found["distinguishable"]
    # By hand.
    lists = plan_build(job_of(recipe, demo / "nowhere")).prepared[0].lists
    assert lists is not None
    model = load(demo / "chat")

    def after(ids: tuple[int, ...]) -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=torch.tensor([ids])).logits[0, -1].double().softmax(-1)

    positive, negative = (
        torch.stack([after(side.ids) for side in sides]).mean(dim=0)
        for sides in (lists.sides.positive, lists.sides.negative)
    )
    little = 0.1 / len(positive)
    shares = (positive + little) / (positive + negative + 2 * little)
    prompts = [side.ids for side in lists.tokenised(lists.held_out).negative]
    assert found["base"] == pytest.approx(float(torch.stack([after(ids) @ shares for ids in prompts]).mean()), abs=1e-5)
    with hooked(model, LAYER, stored(result.output)):
        steered = torch.stack([after(ids) @ shares for ids in prompts]).mean()
    assert found["steered"] == pytest.approx(float(steered), abs=1e-5)
    # Taken away, it is measured where it can be taken away: after positive prompts.
    result = build_recipe(recipe, demo / "less", "vectors.0.coefficient=-2.0")
    less = result.manifest["evaluation"]["per_vector"][0]
    assert less["base"] > found["base"] and less["steered"] < less["base"]


@pytest.mark.slow
def test_strict_asks_for_an_effect_and_not_for_separation(demo: Path) -> None:
    weak = recipe_of(demo, "weak", vector={"layer": 5, "scale": 0.01})
    with pytest.raises(CheckFailed, match="not what --strict asks for"):
        build_recipe(weak, demo / "weak", strict=True)
    effect = {"vector": "v", "distinguishable": False, "notes": ["none"], "separation": [{"beyond_random": True}]}
    with pytest.raises(CheckFailed):
        require_effect({"per_vector": [effect], "guard": None}, "recipe.yaml")


@pytest.mark.slow
def test_pairs_of_their_own_are_used_as_they_are_for_pairs(demo: Path) -> None:
    pairs = {"evaluate": {"pairs": "pairs.jsonl", "limit": 10}}
    result = build_recipe(recipe_of(demo, "own", **pairs), demo / "own")
    found = result.manifest["evaluation"]["per_vector"][0]
    assert found["measure"] == "answer_probability" and found["pairs"] == 10
    assert not found.get("separation") and result.manifest["edits"][0]["made_of"] == {
        "count": 100,
        "of": 100,
        "unit": "texts",
    }
    # Pairs with the prompts of the lists are not measured on: only 20 of 120 are left.
    assert any("say the same as pairs that a vector is made of" in note for note in result.manifest["notes"])


def test_short_lists_are_measured_in_sample_and_say_so(demo: Path) -> None:
    vector = {"positives": ["It was good.", "It was great."], "negatives": ["It was bad.", "It was poor.", "It broke."]}
    result = build_recipe(recipe_of(demo, "few", vector=vector), demo / "few")
    found = result.manifest["evaluation"]["per_vector"][0]
    assert found["pairs"] == 2 and not found["held_out"] and found["separation"] == []
    assert "measured on the texts that the vector was made of: none were held out" in found["notes"]
    assert any("nothing is held out of 2 positives and 3 negatives" in note for note in result.manifest["notes"])


@pytest.mark.slow
def test_with_refit_the_final_vector_is_made_of_all_texts(demo: Path, built: Path) -> None:
    result = build_recipe(recipe_of(demo, "refit", vector={"refit": True, "scale": "raw"}), demo / "refit")
    whole = recipe_of(demo, "whole", vector={"scale": "raw"}, evaluate={"held_out": 0})
    expected = stored(build_recipe(whole, demo / "whole").output)
    assert torch.allclose(stored(result.output), expected, atol=1e-5 * float(expected.norm()))
    found = result.manifest["evaluation"]["per_vector"][0]
    assert found["held_out"] and found["separation"][0]["positives"] == 12
    made_of = result.manifest["edits"][0]["made_of"]
    assert (made_of["count"], made_of["of"], made_of["measured"]) == (100, 100, 80) and made_of["cosine"] > 0.9


def test_separation_by_numbers() -> None:
    positive = torch.tensor([[2.0, 0.0], [4.0, 0.1], [3.0, -0.1]])
    negative = torch.tensor([[0.0, 0.1], [1.0, 0.0]])
    found = separation(positive, negative, torch.tensor([5.0, 0.0]), seed=0)
    assert found["d_prime"] == pytest.approx(2.5 / ((1.0 * 2 + 0.5) / 3) ** 0.5) and found["auc"] == 1.0
    assert separation(positive, negative, torch.tensor([-5.0, 0.0]), seed=0)["auc"] == 0.0
    assert separation(positive, negative, torch.tensor([-1.0, 0.0]), seed=0)["beyond_random"] is False
    alone = separation(positive[:1], negative, torch.tensor([1.0, 0.0]), seed=0)
    assert alone["d_prime"] is None and alone["beyond_random"] is None and alone["auc"] == 1.0
    same = separation(torch.ones(3, 2), torch.ones(3, 2), torch.tensor([1.0, 0.0]), seed=0)
    assert same["d_prime"] is None and same["auc"] == 0.5
