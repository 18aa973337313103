"""Train the demonstration model from nothing: ``python -m tools.demo.train``.

The same seed gives the same text, tokenizer and initial weights; the trained weights agree to the last bit only
on the same kind of machine and the same release of torch.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from patcher.demo import demo_folder
from tools.demo.grammar import TRAINING_SEED, documents
from tools.demo.tokenizer import save_tokenizer, train_tokenizer

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

IGNORED_LABEL = -100


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train.

    `stages` are (documents, limit on words): with few words the sentiment is found sooner.
    """

    stages: tuple[tuple[int, int | None], ...] = ((10_000, 3), (60_000, None))
    batch_documents: int = 16
    peak_rate: float = 2e-3
    warmup: float = 0.04
    threads: int = 2


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Create the untrained model: six Llama blocks without any bias."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=320,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=512,
            rms_norm_eps=1e-5,
            initializer_range=0.04,
            attention_bias=False,
            mlp_bias=False,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_batches(
    encoded: Sequence[list[int]], size: int, rng: random.Random, padding: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Group documents of similar length, and shuffle the groups; returns token ids and labels."""
    import torch

    order = list(range(len(encoded)))
    rng.shuffle(order)
    # Sorted within large stretches only, so that every part of the training sees every length.
    stretch = size * 50
    groups = [
        by_length[start : start + size]
        for first in range(0, len(order), stretch)
        for by_length in [sorted(order[first : first + stretch], key=lambda index: len(encoded[index]))]
        for start in range(0, len(by_length), size)
    ]
    rng.shuffle(groups)
    batches = []
    for group in groups:
        width = max(len(encoded[index]) for index in group)
        ids = torch.full((len(group), width), padding)
        labels = torch.full((len(group), width), IGNORED_LABEL)
        for row, index in enumerate(group):
            tokens = torch.tensor(encoded[index])
            ids[row, : len(tokens)] = tokens
            labels[row, : len(tokens)] = tokens
        batches.append((ids, labels))
    return batches


def train(schedule: Schedule, seed: int) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast, float]:
    """Train tokenizer and model; returns them with the mean loss of the last steps, in nats a token."""
    import torch

    torch.set_num_threads(schedule.threads)
    torch.manual_seed(seed)
    stages = [list(documents(seed + number, *stage)) for number, stage in enumerate(schedule.stages)]
    tokenizer = train_tokenizer(stages[-1][:4000])
    batches = []
    tokens = 0
    for number, texts in enumerate(stages):
        encoded = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(texts)["input_ids"]]
        tokens += sum(map(len, encoded))
        batches += make_batches(encoded, schedule.batch_documents, random.Random(seed + number), tokenizer.pad_token_id)
    model = build_model(tokenizer)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{parameters:,} parameters, {tokens:,} tokens, {len(batches)} steps", flush=True)

    optimizer = torch.optim.AdamW(model.parameters(), lr=schedule.peak_rate, betas=(0.9, 0.98), weight_decay=0.05)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=schedule.peak_rate,
        total_steps=len(batches),
        pct_start=schedule.warmup,
        cycle_momentum=False,
    )
    started = time.monotonic()
    recent: list[float] = []
    for step, (ids, labels) in enumerate(batches, 1):
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        recent = [*recent[-49:], loss.item()]
        if step % 100 == 0 or step == len(batches):
            seconds = time.monotonic() - started
            print(f"step {step:5d}  loss {sum(recent) / len(recent):.4f}  {seconds:4.0f} s", flush=True)
    return model, tokenizer, sum(recent) / len(recent)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the folder that stock transformers loads, with the weights in bfloat16."""
    import torch
    from transformers import GenerationConfig

    folder.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    save_tokenizer(tokenizer, folder)


def main() -> None:
    """Train and write the demonstration model."""
    parser = argparse.ArgumentParser(description="Train the quickstart's demonstration model on a CPU.")
    parser.add_argument("--output", type=Path, default=demo_folder() / "model", help="folder to write")
    parser.add_argument("--seed", type=int, default=TRAINING_SEED)
    parser.add_argument("--threads", type=int, default=Schedule.threads)
    options = parser.parse_args()
    schedule = Schedule(threads=options.threads)
    model, tokenizer, loss = train(schedule, options.seed)
    save(model, tokenizer, options.output)
    print(f"final loss {loss:.4f} nats a token; written to {options.output}")


if __name__ == "__main__":
    main()
