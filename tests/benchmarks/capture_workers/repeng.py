"""repeng, with its default batch of 32. It reads the last token, so its texts end at the answer's letter."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from repeng import ControlVector, DatasetEntry
from transformers import AutoModelForCausalLM, AutoTokenizer


class Contender:
    def __init__(self, folder: Path, dtype: str) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    def capture(self, pairs: str, layer: int) -> dict[str, torch.Tensor]:
        rows = json.loads(Path(pairs).read_text(encoding="utf-8"))
        texts = [
            DatasetEntry(
                (row["question"] + row["answer_matching_behavior"]).removesuffix(")"),
                (row["question"] + row["answer_not_matching_behavior"]).removesuffix(")"),
            )
            for row in rows
        ]
        found = ControlVector.train(self.model, self.tokenizer, texts, hidden_layers=[layer])
        return {"vector": torch.tensor(found.directions[layer])}
