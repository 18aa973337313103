"""Responses that the model writes itself, by the stock ``generate``."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from patcher.architectures.config_keys import stated
from patcher.architectures.model_class import embedding_rows, quiet_transformers
from patcher.capture.batches import padded
from patcher.capture.forward import input_device, position_limit
from patcher.errors import InputError, PatchModelError, no_memory
from patcher.errors.causes import cause_of
from patcher.pairs.templates import Reading, TemplateFailed, apply_template, has_template
from patcher.pairs.vocabulary import has_embeddings
from patcher.recipe.vector import GenerateSpec

_ANSWER = "patch model"  # an assistant's turn, to see what the chat template ends it with


def generate_responses(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    spec: GenerateSpec,
    *,
    seed: int,
    where: str,
    length_key: str | None = None,
    progress: Callable[[int], None] | None = None,
    processors: Sequence[Any] = (),
) -> list[tuple[int, ...]]:
    """Let the model continue each prompt.

    Drawn from the model's own distribution at the recipe's temperature (0: greedy): of the checkpoint's generation
    config only the tokens that end a text are used. Prompts of like length share a batch, padded on the left. The
    same recipe gives the same responses on the same machine; sampled ones depend on the batch size.

    Args:
        model: a causal LM in eval mode.
        tokenizer: its tokenizer.
        prompts: token ids, special tokens included.
        spec: the recipe's ``generate``.
        seed: of the sampling; the random state of the process is left as it was.
        where: the recipe's entry, for errors.
        length_key: the recipe's key of the longest response, where it is not ``generate.max_new_tokens`` of ``where``.
        progress: called with the number of responses after each batch.
        processors: logits processors of transformers, which change what is drawn from.

    Returns:
        For each prompt the ids of its response, up to the token that ends it and without that; may be empty.

    Raises:
        InputError: prompt and response do not fit the model's positions, or the model cannot generate.
        OutsideError: not enough memory.
    """
    if not prompts:
        return []
    require_generate(model, where)
    _check_length(model, max(len(prompt) for prompt in prompts), spec, where, length_key)
    ends = ending_tokens(model, tokenizer)
    pad = padding_token(model, tokenizer, ends)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    responses: list[tuple[int, ...]] = [()] * len(prompts)
    with _seeded(seed), _plain_generation(model, spec, sorted(ends), pad):
        for start in range(0, len(order), spec.batch_size):
            chosen = order[start : start + spec.batch_size]
            inputs, _ = padded([prompts[index] for index in chosen], "left", pad)
            written = _generate(model, inputs["input_ids"], inputs["attention_mask"], where, length_key, processors)
            for row, index in enumerate(chosen):
                responses[index] = up_to_end(written[row].tolist(), ends)
            if progress is not None:
                progress(start + len(chosen))
    return responses


def require_generate(model: Any, where: str) -> None:
    """Refuse a class that cannot write.

    Raises:
        InputError: see there.
    """
    if not hasattr(model, "generate"):
        raise InputError("this model class cannot generate text", where=where, found=type(model).__name__)


def padding_token(model: nn.Module, tokenizer: Any, ends: set[int]) -> int:
    """What fills up a batch: the tokenizer's own token for that, else one that ends a response, else any.

    Padding is masked, so any token that the model has an embedding for will do; many tokenizers name one without.
    """
    embeddings, own = embedding_rows(model), tokenizer.pad_token_id
    known = [token for token in (own, *sorted(ends)) if token is not None and has_embeddings((token,), embeddings)]
    return int(known[0]) if known else 0


def ending_tokens(model: nn.Module, tokenizer: Any) -> set[int]:
    """Ids that end a response: end of text and padding, and the token with which the chat template ends a turn.

    Those without an embedding are left out, because the model never writes them.
    """
    config = getattr(model, "generation_config", None)
    ends: set[int] = set()
    for found in (
        stated(config, "eos_token_id"),
        stated(model.config, "eos_token_id"),
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
        _end_of_turn(tokenizer),
    ):
        ends.update(found if isinstance(found, (list, tuple)) else [] if found is None else [found])
    embeddings = embedding_rows(model)
    return {token for token in ends if has_embeddings((token,), embeddings)}


def _end_of_turn(tokenizer: Any) -> int | None:
    """The special token that the chat template puts after an assistant's turn.

    Some checkpoints name another token as the end of text, and would go on to write the user's next turn.
    """
    if not has_template(tokenizer):
        return None
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": _ANSWER}]
    try:
        text = apply_template(turns, tokenizer, Reading())
    except TemplateFailed:
        return None
    _, _, after = text.rpartition(_ANSWER)
    ids = tokenizer(after.lstrip(), add_special_tokens=False, verbose=False)["input_ids"]
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = set(tokenizer.all_special_ids) | {index for index, token in added.items() if token.special}
    return int(ids[0]) if ids and ids[0] in special else None


def _check_length(model: nn.Module, longest: int, spec: GenerateSpec, where: str, length_key: str | None) -> None:
    limit = position_limit(model)
    if limit is not None and longest + spec.max_new_tokens > limit:
        raise InputError(
            f"a prompt of {longest} tokens and a response do not fit the {limit} positions of the model",
            where=length_key or f"{where}.generate.max_new_tokens",
            found=spec.max_new_tokens,
            remedy=f"at most {limit - longest}" if limit > longest else "shorten what the model is given to continue",
        )


def _generate(
    model: Any, ids: torch.Tensor, mask: torch.Tensor, where: str, length_key: str | None, processors: Sequence[Any]
) -> torch.Tensor:
    """[batch, new tokens], on the CPU."""
    device = input_device(model)
    many, setting = "that many responses at a time", f"{where}.generate.batch_size"
    smaller, remedy = "set a smaller `generate.batch_size`", "give contrast pairs in the place of `personas`"
    if length_key is not None:
        setting, smaller, remedy = length_key, "dtype: bfloat16", f"{length_key}: 0 leaves them out"
    with generating("a response", where, remedy, many=many, setting=setting, smaller=smaller):
        written: torch.Tensor = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            generation_config=model.generation_config,
            **({"logits_processor": list(processors)} if processors else {}),
        )
    return written[:, ids.shape[1] :].cpu()


@contextlib.contextmanager
def generating(what: str, where: str, remedy: str | None, *, many: str, setting: str, smaller: str) -> Iterator[None]:
    """Errors of the stock ``generate`` as errors for people.

    Args:
        what: is written, for a model that cannot; ``where`` and ``remedy`` are of that error.
        many: what memory was too small for; ``setting`` and ``smaller`` are where and remedy of that error.
    """
    try:
        with torch.no_grad(), quiet_transformers():
            yield
    except PatchModelError:
        raise
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise no_memory(f"there is not enough memory to write {many}", setting, error, smaller) from None
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        message, found = f"the model cannot write {what}", cause_of(error)
        if "inf" in found and "nan" in found:
            remedy = "its probabilities are not finite: a smaller coefficient, or dtype: float32"
        raise InputError(message, where=where, found=found, remedy=remedy) from None


@contextlib.contextmanager
def _plain_generation(model: Any, spec: GenerateSpec, ends: list[int], pad: int) -> Iterator[None]:
    """While open, ``generate`` does what the recipe says and nothing that the checkpoint's generation config adds."""
    from transformers import GenerationConfig

    # `generate` fills in from the model's own config whatever a config that is passed to it leaves open.
    before = model.generation_config
    sampling = {"do_sample": True, "temperature": spec.temperature, "top_k": 0, "top_p": 1.0}
    model.generation_config = GenerationConfig(
        max_new_tokens=spec.max_new_tokens,
        eos_token_id=ends or None,
        pad_token_id=pad,
        **(sampling if spec.temperature > 0 else {"do_sample": False}),
    )
    try:
        yield
    finally:
        model.generation_config = before


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


def up_to_end(ids: Sequence[int], ends: set[int]) -> tuple[int, ...]:
    """The ids before the first one that ends a response."""
    stop = next((place for place, token in enumerate(ids) if token in ends), len(ids))
    return tuple(ids[:stop])
