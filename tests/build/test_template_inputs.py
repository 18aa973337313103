"""What a chat template takes from outside of the recipe: fixed for a build, recorded, and used again."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from support.building import build_recipe
from support.chat_templates import LLAMA_3, QWEN3
from support.tiny_models import tiny_checkpoint, tiny_tokenizer, write_recipe

from patcher.build.reproduce import reproduce
from patcher.checkpoint.steering_files import MANIFEST, VECTORS

PAIRS = [{"prompt": "Is it raining?", "positive": "I love the sea", "negative": "I hate the cold rain"}]


class Calendar:
    """Today, as it is when somebody asks: a day later each time, until ``today`` is set."""

    def __init__(self, today: date) -> None:
        self.today = today


@pytest.fixture
def calendar(monkeypatch: pytest.MonkeyPatch) -> Calendar:
    from transformers.utils import chat_template_utils

    calendar = Calendar(date(2026, 11, 28))

    class Clock(chat_template_utils.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return cls(calendar.today.year, calendar.today.month, calendar.today.day)

    class Day(date):
        @classmethod
        def today(cls) -> Any:
            return calendar.today

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)
    monkeypatch.setattr("patcher.vectors.finding.date", Day)
    # Proofs take their word for it: what is compared here is what builds write.
    monkeypatch.setattr("patcher.build.local.verify_build", lambda *_args, **_options: [])
    return calendar


@pytest.fixture
def place(tmp_path: Path) -> Path:
    layer = tiny_checkpoint(tmp_path / "base", "meta-llama--Llama-3.2-1B")
    tiny_tokenizer(LLAMA_3).save_pretrained(tmp_path / "base")
    write_recipe(tmp_path / "recipe.yaml", tmp_path / "base", layer, tmp_path / "out", vector={"pairs": PAIRS})
    return tmp_path


def vector(folder: Path) -> Any:
    (found,) = [tensor for name, tensor in load_file(folder / VECTORS).items() if not name.startswith("original")]
    return found


@pytest.mark.slow
def test_the_day_of_a_build_is_recorded_and_used_again(place: Path, calendar: Calendar) -> None:
    recipe, out = place / "recipe.yaml", place / "out"
    manifest = build_recipe(recipe, out, cache=False).manifest
    resolved = manifest["recipe"]["resolved"]["vectors"][0]
    assert resolved["template_date"] == "2026-11-28" and "template_date" not in manifest["recipe"]["text"]
    assert any("2026-11-28" in note for note in manifest["notes"])
    assert "2026-11-28" in (out / "README.md").read_text(encoding="utf-8")

    calendar.today = date(2026, 11, 29)
    assert reproduce(out, base=str(place / "base"), say=lambda _line: None).same
    tomorrow = build_recipe(recipe, place / "tomorrow", cache=False).manifest
    assert tomorrow["recipe"]["resolved"]["vectors"][0]["template_date"] == "2026-11-29"
    assert not vector(place / "tomorrow").equal(vector(out))
    build_recipe(recipe, place / "fixed", "vectors.0.template_date=2026-11-28", cache=False)
    assert vector(place / "fixed").equal(vector(out))


def test_a_build_across_midnight_has_one_day(place: Path, calendar: Calendar, monkeypatch: pytest.MonkeyPatch) -> None:
    from patcher.build import local

    def midnight(*arguments: Any) -> Any:
        calendar.today = date(2026, 11, 29)
        return with_weights(*arguments)

    with_weights = local.with_weights
    monkeypatch.setattr(local, "with_weights", midnight)
    rendered: list[str] = []
    from patcher.pairs import prompts

    applied = prompts.apply_template
    monkeypatch.setattr(prompts, "apply_template", lambda *a, **o: rendered.append(text := applied(*a, **o)) or text)
    evaluate = {"held_out": 0.0}
    recipe = json.loads((place / "recipe.yaml").read_text()) | {"evaluate": {"generate_tokens": 4, **evaluate}}
    (place / "recipe.yaml").write_text(json.dumps(recipe))
    manifest = build_recipe(place / "recipe.yaml", place / "out", cache=False).manifest
    assert calendar.today.day == 29 and manifest["evaluation"]["generations"]
    assert len(rendered) > 4 and all("Today Date: 28 Nov 2026" in text for text in rendered)


def test_a_folder_without_the_day_is_told_why_it_is_another(place: Path, calendar: Calendar) -> None:
    out = place / "out"
    build_recipe(place / "recipe.yaml", out, cache=False)
    manifest = json.loads((out / MANIFEST).read_text())
    del manifest["recipe"]["resolved"]["vectors"][0]["template_date"], manifest["inputs"], manifest["environment"]
    (out / MANIFEST).write_text(json.dumps(manifest))
    calendar.today = date(2026, 11, 29)
    result = reproduce(out, base=str(place / "base"), say=lambda _line: None)
    assert not result.same
    assert any("does not say on which day" in note and "2026-11-29" in note for note in result.notes)


@pytest.mark.slow_but("*became other tokens*")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m["inputs"][0].update(pairs="0" * 64), "its pairs are not those"),
        (lambda m: m["inputs"][0].update(tokens="0" * 64), "became other tokens"),
        (lambda m: m["environment"].update(torch="1.0"), "torch: 1.0 when the folder was made"),
        (lambda m: m["environment"].update(dtype="bfloat16"), "dtype: bfloat16 when"),
        (lambda m: None, "pairs, tokens and versions are the same"),
    ],
)
def test_reasons(place: Path, calendar: Calendar, change: Any, words: str) -> None:
    out = place / "out"
    manifest = build_recipe(place / "recipe.yaml", out).manifest
    assert manifest["environment"]["dtype"] == "float32" and manifest["inputs"][0]["vector"] == "love"
    (out / "config.json").write_text("{}")
    content = json.loads((out / MANIFEST).read_text())
    change(content)
    (out / MANIFEST).write_text(json.dumps(content))
    result = reproduce(out, base=str(place / "base"), say=lambda _line: None)
    assert "config.json" in result.different and any(words in note for note in result.notes)


@pytest.mark.slow
def test_the_switches_of_a_recipe_are_recorded_and_make_another_vector(place: Path, calendar: Calendar) -> None:
    template = QWEN3.replace("enable_thinking is false", "not enable_thinking").replace(
        "{% if loop.last %}<think>\n{{ r }}\n</think>\n\n{% endif %}", ""
    )
    tiny_tokenizer(template).save_pretrained(place / "base")
    switch = "vectors.0.chat_template_kwargs.enable_thinking"
    said, found = [], {}
    for value in ("true", "false"):
        out = place / value
        # The generation prompt is read, so the switch reaches the vector: a whole text is the user's turn.
        sides = '[{"positive": "I love the sea", "negative": "I hate the rain"}]'
        pairs = [f"vectors.0.pairs={sides}", "vectors.0.chat_template=true"]
        manifest = build_recipe(place / "recipe.yaml", out, f"{switch}={value}", *pairs).manifest
        said.append(manifest["recipe"]["resolved"]["vectors"][0]["chat_template_kwargs"])
        found[value] = vector(out)
        assert "enable_thinking" in (out / "README.md").read_text(encoding="utf-8")
    assert said == [{"enable_thinking": True}, {"enable_thinking": False}]
    assert not found["true"].equal(found["false"])
