"""What the tests of the measures share: tiny models, vectors, texts, and what the stock class says of a text alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from support.tiny_models import default_checkpoint, tiny_checkpoint, tiny_tokenizer
from transformers import AutoModelForCausalLM

from patcher.capture.logits import LoadedModel

MODELS = {
    "meta-llama--Llama-3.2-1B": "model.layers",
    "openai-community--gpt2": "transformer.h",
    "google--gemma-3-1b-it": "model.layers",  # sliding windows
    "bloom": "transformer.h",  # ALiBi
}
CHAT = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
WINDOW = 8
"""Shorter than most passages."""
PASSAGES = [
    "The sea is cold in winter, and the rain does not stop.",
    "Is this the train to the station? She walked.",
    "I love it.",
    "The film was wonderful, and the food was terrible. She bought a ticket and waited for the train in the rain.",
    "No",
]


@dataclass(frozen=True)
class Measured:
    """A tiny model, ready to be measured."""

    model: Any
    blocks: str
    tokenizer: Any
    layer: int

    @property
    def source(self) -> LoadedModel:
        return LoadedModel(self.model, self.blocks)

    def vectors(self, size: float = 40.0, seed: int = 0) -> dict[int, torch.Tensor]:
        """A vector at the layer of interest, and half of another one after it."""
        generator = torch.Generator().manual_seed(seed)
        draw = torch.randn(2, self.model.config.hidden_size, generator=generator)
        first, second = size * draw / draw.norm(dim=-1, keepdim=True)
        return {self.layer: first, self.layer + 1: second / 2}

    def log_probs(self, ids: Sequence[int], vectors: Mapping[int, torch.Tensor]) -> torch.Tensor:
        """[tokens, vocabulary], fp64: of one text alone, steered by hooks that this test puts on itself."""

        def adds(vector: torch.Tensor) -> Any:
            def hook(_module: Any, _inputs: Any, output: Any) -> Any:
                return output + vector if isinstance(output, torch.Tensor) else (output[0] + vector, *output[1:])

            return hook

        handles = [
            self.model.get_submodule(f"{self.blocks}.{layer}").register_forward_hook(adds(vector))
            for layer, vector in vectors.items()
        ]
        try:
            with torch.no_grad():
                logits = self.model(input_ids=torch.tensor([list(ids)])).logits[0]
        finally:
            for handle in handles:
                handle.remove()
        return torch.log_softmax(logits.double(), dim=-1)


def measured(folder: Path, name: str) -> Measured:
    """A tiny random model of that name in fp32."""
    make = default_checkpoint if name == "bloom" else tiny_checkpoint
    layer = make(folder / "base", name, **({"sliding_window": WINDOW} if "gemma" in name else {}))
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32).eval()
    return Measured(model, MODELS[name], tiny_tokenizer(), min(layer, model.config.num_hidden_layers - 2))
