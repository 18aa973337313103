"""steering-vectors, called as its documentation does it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from steering_vectors import train_steering_vector
from transformers import AutoModelForCausalLM, AutoTokenizer


class Contender:
    def __init__(self, folder: Path, dtype: str) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    def capture(self, pairs: str, layer: int, batch_size: int) -> dict[str, torch.Tensor]:
        rows = json.loads(Path(pairs).read_text(encoding="utf-8"))
        texts = [
            (row["question"] + row["answer_matching_behavior"], row["question"] + row["answer_not_matching_behavior"])
            for row in rows
        ]
        found = train_steering_vector(
            self.model, self.tokenizer, texts, layers=[layer], read_token_index=-2, batch_size=batch_size
        )
        return {"vector": found.layer_activations[layer]}
