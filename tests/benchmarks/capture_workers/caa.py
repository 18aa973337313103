"""How nrimsky/CAA makes a vector: one prompt a forward pass, every block's whole output kept, logits of all tokens.

Written after generate_vectors.py and llama_wrapper.py of that repository (Rimsky et al. 2024); blocks are hooked here
where it wraps them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


class Contender:
    def __init__(self, folder: Path, dtype: str) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.kept: dict[int, torch.Tensor] = {}
        for layer, block in enumerate(self.model.model.layers):
            block.register_forward_hook(self.keep(layer))

    def keep(self, layer: int) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            self.kept[layer] = output if isinstance(output, torch.Tensor) else output[0]

        return hook

    def capture(self, pairs: str, layer: int) -> dict[str, torch.Tensor]:
        positive, negative = [], []
        for row in json.loads(Path(pairs).read_text(encoding="utf-8")):
            positive.append(self.read(row["question"] + row["answer_matching_behavior"], layer))
            negative.append(self.read(row["question"] + row["answer_not_matching_behavior"], layer))
        return {"vector": (torch.stack(positive) - torch.stack(negative)).mean(dim=0)}

    def read(self, text: str, layer: int) -> torch.Tensor:
        tokens = torch.tensor([self.tokenizer(text)["input_ids"]])
        self.kept.clear()
        with torch.no_grad():
            _logits = self.model(tokens).logits
        return self.kept[layer][0, -2, :].detach().cpu()
