"""Calibration text: what a fitted route is fitted on."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from patcher.architectures.config_keys import stated
from patcher.architectures.model_class import embedding_rows, quiet_transformers
from patcher.capture.forward import position_limit
from patcher.errors import InputError
from patcher.pairs.vocabulary import with_embeddings
from patcher.progress.stage import Say, doing
from patcher.vectors.responses import padding_token

BUNDLED = Path(__file__).with_name("calibration.txt")
BUNDLED_PER_WIDTH, GIVEN_PER_WIDTH = 20, 5
"""Tokens for each unit of the MLP's width below which the model writes more of them itself. Its own text serves much
better than any that is not its own kind of text, and slightly worse than what the user knows the model is used for."""
CHUNK = 256
"""Longest piece of a text that is run at once, in tokens."""
HELD_OUT = 0.1
_SUFFIXES = (".txt", ".md", ".jsonl")
_SAMPLE_ROWS = 64
_SAMPLE_TOKENS = 128
_PREFIXES = (1, 2, 4, 8)
_CPU_BUDGET, _DEVICE_BUDGET = 3 * 10**13, 10**16


@dataclass(frozen=True)
class Calibration:
    """Token ids to fit on and to measure on.

    Attributes:
        train: sequences of ids.
        held_out: sequences of ids, of other texts.
        sampled: how many of the tokens the model wrote itself.
    """

    train: list[list[int]]
    held_out: list[list[int]]
    sampled: int

    @property
    def tokens(self) -> int:
        return sum(map(len, self.train)) + sum(map(len, self.held_out))


def load_calibration(source: str | None, recipe_folder: Path) -> list[str]:
    """The texts that a recipe names, or the bundled ones.

    Args:
        source: a .txt or .md file (one passage a paragraph) or a .jsonl file (one object a line, with `text`);
            relative to ``recipe_folder``. None: the bundled text.
        recipe_folder: the folder of the recipe.

    Raises:
        InputError: no such file, not such a file, or nothing in it.
    """
    path = BUNDLED if source is None else recipe_folder / Path(source).expanduser()
    where = f"calibration.texts: {source}"
    if path.suffix.lower() not in _SUFFIXES:
        raise InputError(
            "calibration texts are not read from this kind of file", where=where, remedy="use .txt, .jsonl"
        )
    try:
        content = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        remedy = "check the spelling; paths are relative to the recipe's folder"
        raise InputError("there is no such file", where=where, found=str(path.name), remedy=remedy) from None
    except UnicodeDecodeError:
        raise InputError("the file is not UTF-8 text", where=where, remedy="save it as UTF-8") from None
    except OSError as error:
        raise InputError("the file cannot be read", where=where, found=error.strerror) from None
    if path.suffix.lower() == ".jsonl":
        texts = [_text_of(line, f"{where}, line {number}") for number, line in enumerate(content.splitlines(), 1)]
    else:
        texts = content.split("\n\n")
    texts = [text.strip("\n") for text in texts if text.strip()]
    if not texts:
        raise InputError("the file holds no text", where=where, remedy="put some passages into it, or leave it out")
    return texts


def _text_of(line: str, where: str) -> str:
    if not line.strip():
        return ""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError("not a line of JSON", where=where, found=error) from None
    if isinstance(value, dict):
        value = value.get("text")
    if not isinstance(value, str):
        raise InputError("no `text` in it", where=where, found=line[:60], remedy='write {"text": "..."}')
    return value


def calibration_tokens(
    texts: Sequence[str],
    model: nn.Module,
    tokenizer: Any,
    *,
    limit: int,
    width: int,
    seed: int,
    progress: Say,
) -> Calibration:
    """Token ids of the texts in a seeded order, filled up with the model's own samples where they are few.

    Args:
        texts: passages.
        model: the loaded causal LM.
        tokenizer: its tokenizer.
        limit: use at most this many tokens.
        width: of the MLP that is fitted; where the texts are few for it, the model writes more (:func:`sample_rows`).
        seed: of the order, the split and the samples.
        progress: called with a line about what is going on.

    Raises:
        InputError: the model has no tokenizer, or the texts are too few to hold some out.
    """
    if tokenizer is None:
        raise InputError("a fitted route needs the model's tokenizer, and the checkpoint has none", where="model")
    rows: list[list[int]] = []
    count = 0
    for text in random.Random(seed).sample(list(texts), len(texts)):
        if count >= limit:
            break
        for piece in chunks(tokenizer, text, model):
            rows.append(piece[: limit - count] if count + len(piece) > limit else piece)
            count += len(rows[-1])
            if count >= limit:
                break
    sampled = 0
    bundled = list(texts) == load_calibration(None, Path())
    wanted = min(limit, width * (BUNDLED_PER_WIDTH if bundled else GIVEN_PER_WIDTH))
    if count < wanted:
        more = sample_rows(model, tokenizer, rows, wanted - count, seed=seed, progress=progress)
        sampled = sum(map(len, more))
        rows += more
        random.Random(seed + 1).shuffle(rows)
    rows = [row for row in with_embeddings(rows, embedding_rows(model)) if len(row) > 1]
    if len(rows) < 2:
        raise InputError(
            "there is too little calibration text: nothing could be held out",
            where="calibration",
            found=f"{count} tokens",
            remedy="give more passages; about 20 tokens for each unit of the MLP's width serve well",
        )
    held = max(1, round(HELD_OUT * len(rows)))
    return Calibration(rows[held:], rows[:held], sampled)


def chunks(tokenizer: Any, text: str, model: nn.Module) -> list[list[int]]:
    """The ids of ``text`` in pieces of at most ``CHUNK``, each with the BOS that the tokenizer puts in front."""
    with quiet_transformers():
        ids = list(tokenizer(text)["input_ids"])
    size = min(CHUNK, position_limit(model) or CHUNK)
    bos = tokenizer.bos_token_id
    head = [bos] if ids and bos is not None and ids[0] == bos else []
    body = ids[len(head) :]
    step = max(1, size - len(head))
    return [head + body[start : start + step] for start in range(0, len(body), step)]


def sample_rows(
    model: nn.Module,
    tokenizer: Any,
    beginnings: Sequence[Sequence[int]],
    count: int,
    *,
    seed: int,
    progress: Say,
) -> list[list[int]]:
    """About ``count`` tokens that the model writes itself at temperature 1, seeded; fewer where that would take long.

    What a model writes is spread as the texts that it was trained on, which no bundled text can be for every model.

    Args:
        beginnings: sequences of ids whose first few tokens the samples continue.
        count: tokens wanted.
    """
    from transformers import GenerationConfig

    device = next(model.parameters()).device
    size = sum(parameter.numel() for parameter in model.parameters())
    budget = (_CPU_BUDGET if device.type in ("cpu", "meta") else _DEVICE_BUDGET) // (2 * max(size, 1))
    count = min(count, budget)
    generator = random.Random(seed)
    rows: list[list[int]] = []
    done, turn = 0, 0
    ends = _ends(model, tokenizer)
    config = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=_SAMPLE_TOKENS, use_cache=True,
        pad_token_id=padding_token(model, tokenizer, set(ends)), eos_token_id=ends or None,
    )  # fmt: skip
    devices = [device] if device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices=devices),
        quiet_transformers(),
        torch.no_grad(),
        doing(progress, "the model writes calibration text", count, "tokens") as writing,
    ):
        torch.manual_seed(seed)
        while done < count and turn < 10_000:
            length = _PREFIXES[turn % len(_PREFIXES)]
            long_enough = [row for row in beginnings if len(row) >= length] or [[0]]
            starts = torch.tensor([list(generator.choice(long_enough)[:length]) for _row in range(_SAMPLE_ROWS)])
            starts = starts.to(device if device.type != "meta" else "cpu")
            produce: Any = model.generate
            out = produce(starts, attention_mask=torch.ones_like(starts), generation_config=config)
            for row in out.tolist():
                rows.append(_until_end(row, length, ends)[:CHUNK])
                done += len(rows[-1])
            turn += 1
            writing.at(min(done, count))
    return rows


def _ends(model: nn.Module, tokenizer: Any) -> list[int]:
    config: Any = getattr(model, "generation_config", None)
    found = stated(config, "eos_token_id")
    ids = found if isinstance(found, list) else [found]
    return [index for index in {*ids, tokenizer.eos_token_id} if isinstance(index, int)]


def _until_end(row: list[int], start: int, ends: Sequence[int]) -> list[int]:
    """``row`` up to and with the first end-of-text token after ``start``; what follows is filling."""
    for index in range(start, len(row)):
        if row[index] in ends:
            return row[: index + 1]
    return row
