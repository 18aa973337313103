"""A tiny local task of lm-eval on a base and a patched folder; without lm-eval, what is said of that."""

from __future__ import annotations

import importlib.util
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from support.measured_models import Measured, measured
from transformers import AutoModelForCausalLM

from patcher.capture.forward import steering_hooks
from patcher.errors import InputError, MissingExtraError, OutsideError
from patcher.evaluate.lm_eval_tasks import Tasks, check_tasks, compare_tasks, task_results

WHERE = "recipe.yaml: evaluate.lm_eval"
ANSWERS = [0, 0, 0, 1, 1, 2]
QUESTIONS = [
    {
        "question": f"Is {number} {word} than {number + 3}? Answer: (",
        "choices": ["A", "B", "C"],
        "answer": ANSWERS[number],
    }
    for number in range(len(ANSWERS))
    for word in ("more", "less", "colder")
]
TASK = """task: tiny_more
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}, cache_dir: {cache}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
doc_to_choice: choices
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""
needs_lm_eval = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> tuple[Measured, Path]:
    folder = tmp_path_factory.mktemp("gpt2")
    return measured(folder, "openai-community--gpt2"), folder / "base"


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    rows = folder / "rows.json"
    rows.write_text("\n".join(json.dumps(row) for row in QUESTIONS), encoding="utf-8")
    (folder / "tiny.yaml").write_text(TASK.format(rows=rows, cache=folder / "cache"), encoding="utf-8")
    return folder


def naive(tiny: Measured, vectors: dict[int, torch.Tensor], rows: list[dict[str, Any]]) -> float:
    """The share of questions whose right answer is the likeliest text."""
    right = 0
    for row in rows:
        question = tiny.tokenizer(row["question"])["input_ids"]
        scores = []
        for choice in row["choices"]:
            ids = [*question, *tiny.tokenizer(choice, add_special_tokens=False)["input_ids"]]
            log_probs = tiny.log_probs(ids, vectors)
            scores.append(sum(float(log_probs[at - 1, ids[at]]) for at in range(len(question), len(ids))))
        right += scores.index(max(scores)) == row["answer"]
    return right / len(rows)


def says(tiny: Measured, letter: str) -> dict[int, torch.Tensor]:
    """A vector that makes this the answer, whatever is asked."""
    head = tiny.model.lm_head.weight.detach()
    ids = {name: tiny.tokenizer(name, add_special_tokens=False)["input_ids"][0] for name in "ABC"}
    others = [head[ids[name]] for name in ids if name != letter]
    return {tiny.model.config.n_layer - 1: 1000 * (head[ids[letter]] - sum(others) / 2)}


@needs_lm_eval
def test_base_against_patched(gpt2: tuple[Measured, Path], tasks: Path, tmp_path: Path) -> None:
    tiny, folder = gpt2
    towards = (says(tiny, letter) for letter in "ABC")
    vectors = next(v for v in towards if abs(naive(tiny, v, QUESTIONS) - naive(tiny, {}, QUESTIONS)) > 0.1)
    patched = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for layer, vector in vectors.items():
        patched.transformer.h[layer].mlp.c_proj.bias.data += vector
    patched.save_pretrained(tmp_path / "patched")
    tiny.tokenizer.save_pretrained(tmp_path / "patched")
    told: list[str] = []
    state = random.getstate()
    (found,) = compare_tasks(folder, tmp_path / "patched", Tasks(["tiny_more"], tasks), told.append)
    assert random.getstate() == state
    assert told == ["lm-eval: tiny_more on the base model", "lm-eval: tiny_more on the patched model"]
    assert (found["task"], found["metric"]) == ("tiny_more", "acc")
    assert found["base"] == pytest.approx(naive(tiny, {}, QUESTIONS))
    assert found["patched"] == pytest.approx(naive(tiny, vectors, QUESTIONS)) != found["base"]
    assert 0 < found["base_stderr"] < 0.2 or found["base"] in (0, 1)
    with steering_hooks(tiny.model, tiny.blocks, vectors):
        hooked = task_results(tiny.model, tiny.tokenizer, Tasks(["tiny_more"], tasks, limit=7))
    assert hooked["tiny_more"]["acc"] == pytest.approx(naive(tiny, vectors, QUESTIONS[:7]))


@needs_lm_eval
def test_tasks_that_cannot_run(gpt2: tuple[Measured, Path], tasks: Path, tmp_path: Path) -> None:
    tiny, _ = gpt2
    (tmp_path / "lost.yaml").write_text(TASK.format(rows=tmp_path / "gone.json", cache=tmp_path), encoding="utf-8")
    with pytest.raises(OutsideError, match="cannot be had"):
        task_results(tiny.model, tiny.tokenizer, Tasks(["tiny_more"], tmp_path))
    with pytest.raises(InputError, match="no such task") as caught:
        check_tasks(Tasks(["tiny_mroe"], tasks))
    assert "did you mean `tiny_more`" in str(caught.value)
    with pytest.raises(InputError, match="needs the model's tokenizer"):
        task_results(tiny.model, None, Tasks(["tiny_more"], tasks))


def test_without_lm_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(MissingExtraError) as caught:
        check_tasks(Tasks(["mmlu"]))
    assert 'pip install "patch-model[lm-eval]"' in str(caught.value)
