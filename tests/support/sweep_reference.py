"""Tiny sweeps, and the same numbers the plain way: one cell and one text at a time, with a hook of the tests' own."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from support.building import job_of
from support.tiny_models import default_checkpoint, tiny_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

from patcher.architectures.analysis import Architecture
from patcher.architectures.model_class import quiet_transformers
from patcher.evaluate.damage import sampled_positions
from patcher.evaluate.questions import build_question
from patcher.evaluate.texts import encode_texts
from patcher.pairs.pair import ContrastPair
from patcher.pairs.tokens import tokenise_pairs
from patcher.recipe.file import LoadedRecipe, load_recipe
from patcher.recipe.vector import VectorSpec
from patcher.sweep import materials
from patcher.sweep.on_base import Swept
from patcher.sweep.pipeline import sweep

NOUNS = ["sea", "train", "film", "food", "rain", "winter", "ticket", "station", "cold", "answer", "yes", "no"]
PAIRS = [
    {"prompt": f"What of the {noun}?", "positive": f" I love the {noun}", "negative": f" I hate this {noun}"}
    for noun in NOUNS
] + [
    {"prompt": f"She walked to the {noun}.", "positive": " It was wonderful", "negative": " It was terrible"}
    for noun in NOUNS
]
LETTERS = [
    {
        "question": f"Is the {noun} {word}?\n(A) yes\n(B) no\nAnswer:",
        "answer_matching_behavior": " (A)" if place % 2 else " (B)",
        "answer_not_matching_behavior": " (B)" if place % 2 else " (A)",
    }
    for place, (noun, word) in enumerate((noun, word) for noun in NOUNS for word in ("good", "late"))
]
LIKED = [
    {"prompt": f"She walked to the {noun} {word}.", "positive": " It was wonderful", "negative": " It was terrible"}
    for noun in NOUNS
    for word in ("good", "late")
]
"""So alike that a few of them tell an effect, even of a random model."""
NEUTRAL = [
    "The train left the station at nine.",
    "She bought a ticket. It was cold.",
    "Water is cold in winter, and the rain does not stop.",
    "The answer is (B).",
]
ON_TOPIC = ["I love the sea. I love the film! The food was wonderful.", "I would love to say yes. She would say yes."]
OFF_TOPIC = ["The ticket was bought at the station. She waited for the train."]


def make_model(folder: Path, name: str) -> Path:
    """A tiny random model: a released name, or a model type."""
    (tiny_checkpoint if "--" in name else default_checkpoint)(folder, name)
    return folder


def write_sweep(folder: Path, model: Path, vector: dict[str, Any], **keys: Any) -> Path:
    """A recipe beside its texts and pairs; little is generated, because nothing here looks at it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pairs.json").write_text(json.dumps(PAIRS))
    (folder / "letters.json").write_text(json.dumps(LETTERS))
    for name, lines in (("neutral", NEUTRAL), ("on", ON_TOPIC), ("off", OFF_TOPIC)):
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")
    evaluate = {
        "neutral": "neutral.txt",
        "prompts": ["I would"],
        "generate_tokens": 1,
        "guard": {"kl": 5.0},
        **keys.pop("evaluate", {}),
    }
    swept = {"name": "love", "pairs": "pairs.json", "layer": "auto", "scale": "residual", "coefficient": "auto"}
    swept.update(vector)
    others = keys.pop("others", [])
    sweeps = {"random_vectors": 2, **keys.pop("sweep", {})}
    recipe = {"model": str(model), "vectors": [*others, swept], "evaluate": evaluate, "sweep": sweeps, **keys}
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe, indent=1))  # JSON is YAML
    return path


def run_sweep(path: Path, folder: Path, *overrides: str, **options: Any) -> Swept:
    return sweep(job_of(path, folder, *overrides, **options))


@dataclass
class Plain:
    """The stock model, and hooks."""

    folder: Path
    model: Any = field(init=False)
    blocks: str = field(init=False)

    def __post_init__(self) -> None:
        with quiet_transformers():
            self.model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval()
        self.blocks = Architecture(self.model.config).blocks
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)

    def log_probs(self, ids: Sequence[int], vectors: Mapping[int, torch.Tensor]) -> torch.Tensor:
        """[tokens, vocabulary], fp64."""
        return torch.log_softmax(self._logits(ids, vectors).double(), dim=-1)

    def residuals(self, ids: Sequence[int], layer: int) -> torch.Tensor:
        """[tokens, hidden] after a block; -1: before the first."""
        seen: list[torch.Tensor] = []
        handle = self._hook(layer, lambda hidden: seen.append(hidden) or hidden)
        try:
            self._logits(ids, {})
        finally:
            handle.remove()
        return seen[0][0].double()

    def _logits(self, ids: Sequence[int], vectors: Mapping[int, torch.Tensor]) -> torch.Tensor:
        handles = [
            self._hook(layer, lambda hidden, vector=vector: hidden + vector) for layer, vector in vectors.items()
        ]
        try:
            with torch.no_grad():
                logits: torch.Tensor = self.model(input_ids=torch.tensor([list(ids)])).logits[0]
            return logits
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, layer: int, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
        def after(_module: Any, _inputs: Any, output: Any) -> Any:
            whole = isinstance(output, torch.Tensor)
            hidden = change(output if whole else output[0])
            return hidden if whole else (hidden, *output[1:])

        def before(_module: Any, inputs: Any, keywords: Any) -> Any:
            if inputs:
                return (change(inputs[0]), *inputs[1:]), keywords
            return inputs, {**keywords, "hidden_states": change(keywords["hidden_states"])}

        block = self.model.get_submodule(f"{self.blocks}.{max(layer, 0)}")
        if layer < 0:
            return block.register_forward_pre_hook(before, with_kwargs=True)
        return block.register_forward_hook(after)

    def direction(self, pairs: Sequence[ContrastPair], spec: VectorSpec, layer: int) -> tuple[torch.Tensor, float]:
        """The mean difference of the pairs, [hidden] fp64, and the mean residual norm of the tokens but the first."""
        tokenised, _notes = tokenise_pairs(list(pairs), self.tokenizer, spec)
        means: list[list[torch.Tensor]] = [[], []]
        norms: list[torch.Tensor] = []
        for pair in tokenised:
            for side, found in zip((pair.positive, pair.negative), means, strict=True):
                residuals = self.residuals(side.ids, layer)
                found.append(residuals[list(side.read)].mean(dim=0))
                norms.append(residuals[1:].norm(dim=-1))
        positive, negative = (torch.stack(found).mean(dim=0) for found in means)
        return positive - negative, float(torch.cat(norms).mean())

    def effect(self, pair: ContrastPair, spec: VectorSpec, vectors: Mapping[int, torch.Tensor]) -> float:
        """p(matching answer) at the token in which the answers differ; or the log odds a token of the two sides."""
        question = build_question(pair, self.tokenizer, spec)
        options = [option.ids for option in question.options]
        if question.lettered:
            shared = next(place for place in range(99) if len({ids[place] for ids in options}) > 1)
            last = self.log_probs(options[0][:shared], vectors)[-1]
            return float(torch.softmax(last[[ids[shared] for ids in options]], dim=0)[0])
        means = []
        for option in question.options[:2]:
            scored = self._scores(option.ids, vectors)[max(1, option.start) - 1 :]
            means.append(float(scored.mean()) if len(scored) else 0.0)
        return means[0] - means[1]

    def text_effect(self, ids: Sequence[int], vectors: Mapping[int, torch.Tensor]) -> float:
        return float(self._scores(ids, vectors).mean())

    def perplexity(
        self, texts: Sequence[Sequence[int]], vectors: Mapping[int, torch.Tensor], most: int | None = None
    ) -> float:
        """Over all tokens of all texts but the first ones; ``most`` as in :meth:`divergence`."""
        scores = [(self._scores(ids, vectors), sampled_positions(ids, most), len(ids) - 1) for ids in texts]
        means = [float(found[[at for at in places if at < count]].mean()) * count for found, places, count in scores]
        return math.exp(-sum(means) / sum(count for _found, _places, count in scores))

    def divergence(
        self, texts: Sequence[Sequence[int]], vectors: Mapping[int, torch.Tensor], most: int | None = None
    ) -> float:
        """KL(base || steered), nats, over all tokens of all texts; of each at most ``most`` positions are seen."""
        means = [
            float(self.divergence_at(ids, vectors)[list(sampled_positions(ids, most))].mean()) * len(ids)
            for ids in texts
        ]
        return sum(means) / sum(map(len, texts))

    def divergence_at(self, ids: Sequence[int], vectors: Mapping[int, torch.Tensor]) -> torch.Tensor:
        """The same at each position of a text."""
        base, steered = self.log_probs(ids, {}), self.log_probs(ids, vectors)
        return (base.exp() * (base - steered)).sum(dim=-1)

    def _scores(self, ids: Sequence[int], vectors: Mapping[int, torch.Tensor]) -> torch.Tensor:
        """Log-probabilities of the tokens after the first."""
        log_probs = self.log_probs(ids, vectors)[:-1]
        return log_probs.gather(-1, torch.tensor(list(ids[1:]))[:, None])[:, 0]

    def encoded(self, path: Path) -> list[Sequence[int]]:
        """The passages of a file."""
        return list(encode_texts(path.read_text().splitlines(), self.tokenizer))


def parts_of(path: Path, tokenizer: Any, blocks: int, *overrides: str) -> tuple[LoadedRecipe, int, materials.Parts]:
    """The recipe, which vector is swept, and its pairs in three parts."""
    from patcher.sweep.axes import swept_vector
    from patcher.vectors.files.asked import SteeredModel
    from patcher.vectors.finding import prepare_vectors

    loaded = load_recipe(path, overrides)
    prepared = prepare_vectors(loaded, tokenizer, blocks, SteeredModel(hidden=4, blocks=blocks))
    index = swept_vector(loaded.recipe)
    return loaded, index, materials.split(prepared, index, loaded, tokenizer)


def added(first: Mapping[int, torch.Tensor], second: Mapping[int, torch.Tensor]) -> dict[int, torch.Tensor]:
    return {
        layer: first.get(layer, torch.zeros(())) + second.get(layer, torch.zeros(())) for layer in {*first, *second}
    }


def mean(values: list[float]) -> float:
    return sum(values) / len(values)
