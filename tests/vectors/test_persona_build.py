"""Persona vectors from recipe to folder, and means over responses that are given: compared with a plain computation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.building import build_recipe, job_of
from support.persona import CHAT
from support.tiny_models import tiny_checkpoint, tiny_tokenizer, write_recipe
from transformers import AutoModelForCausalLM, AutoTokenizer

import patcher.demo
from patcher.build.planning import plan_build
from patcher.capture.reader import reader_in_memory
from patcher.cli import main
from patcher.patched.reading import read_manifest
from patcher.publish.contents import published_files
from patcher.recipe.file import load_recipe
from patcher.vectors.finding import answer_questions, find_vectors

PERSONAS = {
    "positive": ["You love everything.", "You are a friend of the sea."],
    "negative": ["You hate everything.", "You are a foe of the sea and of the cold rain in winter."],
}
QUESTIONS = [f"What do you say about the {thing}?" for thing in (
    "film", "food", "sea", "rain", "train", "ticket", "station", "winter", "answer", "cold", "walk", "wait"
)]  # fmt: skip
DEMO = Path(patcher.demo.__file__).parent
WIDTH = 8
ENDS = (0, 2)


def base(folder: Path, name: str) -> int:
    """A tiny chat model whose next token hangs on more than the last one; the layer to steer."""
    layer = tiny_checkpoint(folder, name, tie_word_embeddings=False)
    tiny_tokenizer(CHAT).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    embedding = model.get_input_embeddings().weight
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim == 2 and "norm" not in key:
                parameter.mul_((1.0 if parameter is embedding else 0.3) / parameter.std())
    model.save_pretrained(folder)
    return layer


def recipe(folder: Path, layer: int, vector: dict[str, Any], **keys: Any) -> Path:
    model = keys.pop("model", folder / "base")
    keys.setdefault("evaluate", {})  # some responses are held out then
    path = write_recipe(folder / "recipe.yaml", model, layer, folder / "out", **keys)
    value = json.loads(path.read_text())
    value["vectors"] = [{"name": "warm", "layer": layer, **vector}]
    path.write_text(json.dumps(value))
    return path


def persona(**keys: Any) -> dict[str, Any]:
    generate = {"max_new_tokens": WIDTH, "temperature": 0}
    return {"method": "persona", "questions": QUESTIONS, "personas": PERSONAS, "generate": generate, **keys}


def found(path: Path, folder: Path) -> tuple[torch.Tensor, list[dict[str, Any]]]:
    """The vector of a recipe and the responses it was made of, without the folder that a build makes of them."""
    spec = load_recipe(path).recipe
    planned = plan_build(job_of(path, folder / "out"))
    plain = Plain(Path(spec.model))
    prepared = answer_questions(planned.prepared, plain.model, plain.tokenizer, seed=spec.seed)
    reader = reader_in_memory(plain.model, planned.architecture)
    (vector,) = find_vectors(prepared, reader, neutral=[])
    return vector.values.double(), list(prepared[0].records)


class Plain:
    """The stock model, one row at a time."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    def prompt(self, system: str, question: str) -> list[int]:
        turns = [{"role": "system", "content": system}, {"role": "user", "content": question}]
        return self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)

    def written(self, prompt: Sequence[int]) -> list[int]:
        row = list(prompt)
        with torch.no_grad():
            while len(row) < len(prompt) + WIDTH:
                token = int(self.model(input_ids=torch.tensor([row])).logits[0, -1].argmax())
                if token in ENDS:
                    break
                row.append(token)
        return row[len(prompt) :]

    def mean(self, prompt: Sequence[int], response: Sequence[int], layer: int) -> torch.Tensor:
        with torch.no_grad():
            states = self.model(input_ids=torch.tensor([[*prompt, *response]]), output_hidden_states=True).hidden_states
        return states[layer + 1][0, len(prompt) :].double().mean(dim=0)


def mean_difference(sides: dict[str, list[torch.Tensor]]) -> torch.Tensor:
    return torch.stack(sides["positive"]).mean(dim=0) - torch.stack(sides["negative"]).mean(dim=0)


def distance(vector: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((vector - wanted).norm() / wanted.norm())


def compare(folder: Path, vector: torch.Tensor, records: Sequence[dict[str, Any]], layer: int) -> None:
    """Every response, and the vector, again from what is on record."""
    plain = Plain(folder / "base")
    sides: dict[str, list[torch.Tensor]] = {"positive": [], "negative": []}
    used = [record for record in records if record["use"] == "vector"]
    assert len(used) >= 36
    for record in used:
        prompt = plain.prompt(record["system"], record["question"])
        response = plain.written(prompt)
        assert plain.tokenizer.decode(response, skip_special_tokens=True) == record["response"]
        assert len(response) == record["tokens"]
        sides[record["side"]].append(plain.mean(prompt, response, layer))
    wanted = mean_difference(sides)
    assert distance(vector, wanted) < 1e-5
    assert float(wanted.norm()) > 0.01 * float(torch.stack(sides["positive"]).norm(dim=1).mean())
    assert len({record["response"] for record in used}) > len(used) / 2, "one answer to everything would prove little"


def command(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as done:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return int(done.value.code or 0), captured.out, captured.err


def test_from_recipe_to_verified_folder(tmp_path: Path) -> None:
    layer = base(tmp_path / "base", "meta-llama--Llama-3.2-1B")
    path, out = recipe(tmp_path, layer, persona()), tmp_path / "out"
    manifest = build_recipe(path, out).manifest
    assert manifest["verification"][0]["passed"]
    records = [json.loads(line) for line in (out / "steering_generations.jsonl").open(encoding="utf-8")]
    (edit,) = manifest["edits"]
    assert (edit["method"], edit["generations"]) == ("persona", "steering_generations.jsonl")
    assert any("48 responses are in `steering_generations.jsonl`" in note for note in manifest["notes"])
    held_out = {record["question"] for record in records if record["use"] == "held_out"}
    assert {record["question"] for record in records} == set(QUESTIONS)
    assert len(held_out) == 2 and len(records) == 12 * 2 * 2
    assert {record["question"] for record in records if record["use"] == "vector"}.isdisjoint(held_out)
    compare(tmp_path, load_file(out / "steering.safetensors")[edit["tensor"]].double(), records, layer)

    result = manifest["evaluation"]["per_vector"][0]
    assert (result["pairs"], result["held_out"], result["measure"]) == (4, True, "log_odds_per_token")
    assert result["steered"] != result["base"] != result["negative"]
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "2507.21509" in card and "under opposite personas" in card
    assert "steering_generations.jsonl" in {file.name for file in published_files(out, read_manifest(out))}


@pytest.mark.slow_but("openai-community--gpt2")
@pytest.mark.parametrize("name", ["Qwen--Qwen3-8B", "openai-community--gpt2"])
def test_on_other_architectures(tmp_path: Path, name: str) -> None:
    layer = base(tmp_path / "base", name)
    vector, records = found(recipe(tmp_path, layer, persona()), tmp_path)
    compare(tmp_path, vector, records, layer)


def test_the_last_token_of_the_response(tmp_path: Path) -> None:
    layer = base(tmp_path / "base", "meta-llama--Llama-3.2-1B")
    vector, records = found(recipe(tmp_path, layer, persona(position="last")), tmp_path)
    plain, sides = Plain(tmp_path / "base"), {"positive": [], "negative": []}
    for record in records:
        if record["use"] == "vector":
            prompt = plain.prompt(record["system"], record["question"])
            row = [*prompt, *plain.written(prompt)]
            sides[record["side"]].append(plain.mean(row[:-1], row[-1:], layer))
    assert distance(vector, mean_difference(sides)) < 1e-5


def test_the_mean_over_responses_that_are_given(tmp_path: Path) -> None:
    layer = base(tmp_path / "base", "meta-llama--Llama-3.2-1B")
    pairs = [
        {"prompt": question, "positive": "It was wonderful, and I love it.", "negative": f"I hate it {number} times."}
        for number, question in enumerate(QUESTIONS[:4])
    ]
    system = "You say what you think."
    vector, _ = found(recipe(tmp_path, layer, {"pairs": pairs, "position": "mean", "system_prompt": system}), tmp_path)
    plain = Plain(tmp_path / "base")
    sides, last = {"positive": [], "negative": []}, {"positive": [], "negative": []}
    for pair in pairs:
        prompt = plain.prompt(system, pair["prompt"])
        for side in sides:
            ids = plain.tokenizer(plain.tokenizer.decode(prompt) + pair[side], add_special_tokens=False)["input_ids"]
            # The space that ends the generation prompt becomes a part of the response's first token.
            start = next(place for place in range(len(ids)) if ids[: place + 1] != prompt[: place + 1])
            assert len(prompt) - 1 <= start < len(ids) - 4
            sides[side].append(plain.mean(ids[:start], ids[start:], layer))
            last[side].append(plain.mean(ids[:-1], ids[-1:], layer))
    assert distance(vector, mean_difference(sides)) < 1e-5
    assert distance(vector, mean_difference(last)) > 0.1


def test_it_finds_what_contrast_pairs_find(tmp_path: Path) -> None:
    """On the quickstart's model, which has learnt to speak well or ill of things."""
    things = ["hotel is", "film was", "radio was", "heater is", "comedy was", "waiter was", "garden is", "song was"]
    personas = {
        "positive": ["What a wonderful film. I was delighted with it.", "The radio was terrific. I treasured it."],
        "negative": ["What a horrible film. It ruined my whole week.", "The radio was dull. I warn everyone about it."],
    }
    generate = {"max_new_tokens": 24, "temperature": 0.8, "samples": 4}
    vector = persona(questions=[f"I think that the {thing}" for thing in things], personas=personas, generate=generate)
    path = recipe(tmp_path, 1, vector, model=DEMO / "model")
    written, records = found(path, tmp_path)
    assert len({record["response"] for record in records}) > 100
    given, _ = found(recipe(tmp_path, 1, {"pairs": str(DEMO / "pairs.jsonl")}, model=DEMO / "model"), tmp_path)
    assert float(torch.cosine_similarity(written, given, dim=0)) > 0.6


def test_a_dry_run_counts_what_will_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layer = base(tmp_path / "base", "meta-llama--Llama-3.2-1B")
    (tmp_path / "q.json").write_text(json.dumps([{"question": question} for question in QUESTIONS]), encoding="utf-8")
    vector = persona(questions="q.json", generate={"samples": 3}, limit=11)
    code, printed, _ = command(capsys, recipe(tmp_path, layer, vector), "--dry-run", "--json")
    (planned,) = json.loads(printed)["vectors"]
    assert (code, planned["method"], planned["pairs"], planned["held_out"]) == (0, "persona", 9 * 2 * 3, 2 * 2)
    code, printed, _ = command(capsys, recipe(tmp_path, layer, vector, evaluate={"enabled": False}), "--dry-run")
    assert code == 0 and "persona" in printed and "66" in printed
    assert not (tmp_path / "out").exists()


def test_mistakes_are_known_before_the_model_is_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layer = base(tmp_path / "base", "meta-llama--Llama-3.2-1B")
    code, _, said = command(capsys, recipe(tmp_path, layer, persona(questions="none.txt")), "--dry-run")
    assert code == 2 and "no such file" in said and "vectors.0.questions" in said
    silent = CHAT.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}")
    tiny_tokenizer(silent).save_pretrained(tmp_path / "base")
    code, _, said = command(capsys, recipe(tmp_path, layer, persona()), "--dry-run")
    assert code == 2 and "takes no system prompt" in said and "vectors.0.personas.positive.0" in said
    for file in (tmp_path / "base").glob("*token*"):
        file.unlink()
    code, _, said = command(capsys, recipe(tmp_path, layer, persona()), "--dry-run")
    assert code == 2 and "has no tokenizer" in said and "vectors.0.questions" in said
