"""What steering did, to be looked at: tokens that moved, texts in green and red, completions side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from patcher.capture.opened import OpenedBase
from patcher.evaluate.budget import Budget
from patcher.evaluate.contributions import Contributions
from patcher.evaluate.generation import Generation, generate_under, word_counts
from patcher.evaluate.moved_tokens import contributions_to, most_shifted_tokens, token_changes
from patcher.evaluate.questions import encode_prompts
from patcher.evaluate.scorers import load_scorer
from patcher.evaluate.scoring import Vectors, ending, tokens_run
from patcher.evaluate.texts import token_texts
from patcher.pairs.vocabulary import has_embeddings
from patcher.recipe.schema import Recipe
from patcher.recipe.vector import GenerateSpec, VectorSpec

PROMPTS = ("I think that", "Yesterday my neighbour told me that", "The most important thing is")
"""Continued where a recipe gives no prompts of its own."""
TEMPERATURE = 0.7
NOTHING_SEEN: Mapping[str, Any] = {
    "kl_tokens": [],
    "shifted": [],
    "text_changes": [],
    "generations": [],
    "generation_temperature": None,
    "scores": None,
}
"""What :func:`look` would return if nothing was looked at."""
_TEXT_TOKENS = 160
_TOKENS = 10
_FEWEST_TOKENS = 16
"""Of a completion: less says nothing."""
_NAMED = {"prompts", "generate_tokens", "topic_words", "scorer", "system_prompt"}
"""Keys of `evaluate` with which a recipe asks for completions."""


@dataclass(frozen=True)
class Looks:
    """How much there is to look at.

    Attributes:
        shifted: whether the next tokens after the prompts are compared.
        tokens: the length of completions; None: as the recipe says; 0: none.
        negative: whether the negated vectors write as well.
    """

    shifted: bool = True
    tokens: int | None = None
    negative: bool = True


def completions_within(opened: OpenedBase, recipe: Recipe, spec: VectorSpec, steered: Vectors, budget: Budget) -> Looks:
    """As much as fits; what a recipe asks for by name fits always, and what is cut is said to the budget."""
    prompts, rows, evaluate = _prompts(opened, recipe, spec), batch_rows(recipe), recipe.evaluate
    encoded = encode_prompts(prompts, opened.tokenizer, spec, spec.system_prompt)
    if not encoded or asks_for_completions(recipe):
        return Looks()
    tokens = tokens_run(opened.logits, [ending(ids) for ids in encoded], rows)
    left = budget.left - opened.logits.cost(tokens, [{}, steered])
    if left < 0:
        budget.cuts.append("no shifted tokens")
    wanted, widest = evaluate.generate_tokens, max(map(len, encoded))
    if not wanted:
        return Looks(left >= 0, 0)

    def length(variants: int) -> int:
        return min(wanted, int(left / (variants * len(encoded))) - widest)

    if length(3) >= wanted:
        return Looks()
    found = length(2)
    if found < min(_FEWEST_TOKENS, wanted):
        budget.cuts.append("no completions")
        return Looks(left >= 0, 0)
    budget.cuts.append(f"completions of {found} of {wanted} tokens, without the negative")
    return Looks(left >= 0, found, negative=False)


def asks_for_completions(recipe: Recipe) -> bool:
    """Whether the recipe names what completions are for."""
    return bool(_NAMED & recipe.evaluate.model_fields_set)


def look(
    opened: OpenedBase,
    recipe: Recipe,
    spec: VectorSpec,
    steered: Vectors,
    say: Callable[[str], None],
    *,
    texts: Mapping[str, Sequence[Sequence[int]]] = MappingProxyType({}),
    neutral: Sequence[Sequence[int]] = (),
    contributions: Contributions | None = None,
    looks: Looks = Looks(),
) -> dict[str, Any]:
    """Everything of `sweep.json` that is for the eye, the base beside the vectors.

    Args:
        spec: how prompts are rendered.
        steered: the vectors.
        texts: title -> token ids of passages, shown in green and red.
        neutral: token ids of neutral passages.
        contributions: what was found on these, in their place.
        looks: how much.

    Returns:
        ``kl_tokens``, ``shifted``, ``text_changes``, ``generations``, the ``generation_temperature`` that they were
        sampled at, and ``scores``; None where nothing was written, or the recipe names no scorer.
    """
    say("looking at tokens and texts")
    prompts, rows = _prompts(opened, recipe, spec), batch_rows(recipe)
    encoded = encode_prompts(prompts, opened.tokenizer, spec, spec.system_prompt)
    generations = _generations(opened, recipe, spec, prompts, steered, say, looks)
    if contributions is None:
        contributions = contributions_to(opened.logits, neutral, {}, steered, rows)
    return {
        "kl_tokens": _kl_tokens(opened, contributions),
        "shifted": _shifted(opened, prompts, encoded, steered, rows) if looks.shifted else [],
        "text_changes": _text_changes(opened, texts, steered, rows),
        "generations": generations,
        "generation_temperature": TEMPERATURE if generations else None,
        "scores": _scores(recipe, generations),
    }


def _prompts(opened: OpenedBase, recipe: Recipe, spec: VectorSpec) -> list[str]:
    """The recipe's prompts; of the bundled ones, those that the model has embeddings for as they are rendered."""
    given, under = recipe.evaluate.prompts, dict.fromkeys([spec.system_prompt, recipe.evaluate.system_prompt])
    return list(given) or [
        prompt
        for prompt in PROMPTS
        if all(
            has_embeddings(ids, opened.embeddings)
            for system_prompt in under
            for ids in encode_prompts([prompt], opened.tokenizer, spec, system_prompt)
        )
    ]


def batch_rows(recipe: Recipe) -> int:
    """Rows per forward pass of the evaluation, which keeps logits."""
    return recipe.capture.rows or 16


def _place(recipe: Recipe) -> str:
    """What errors call the prompts: a key that the recipe has, or what stands in its place."""
    return "evaluate.prompts" if recipe.evaluate.prompts else "the bundled prompts (the recipe has no evaluate.prompts)"


def _kl_tokens(opened: OpenedBase, contributions: Contributions) -> list[dict[str, Any]]:
    found = contributions.top(_TOKENS).tokens
    names = token_texts([entry.token for entry in found], opened.tokenizer)
    return [
        {"token": name, "contribution": entry.contribution, "base": entry.base, "steered": entry.steered}
        for name, entry in zip(names, found, strict=True)
    ]


def _shifted(
    opened: OpenedBase,
    prompts: Sequence[str],
    encoded: Sequence[Sequence[int]],
    steered: Vectors,
    batch_size: int,
) -> list[dict[str, Any]]:
    found = most_shifted_tokens(opened.logits, encoded, [{}, steered], batch_size, count=_TOKENS)[-1]
    result = []
    for prompt, shifts in zip(prompts, found, strict=True):
        names = token_texts([entry.token for entry in shifts.by_log_ratio], opened.tokenizer)
        tokens = [
            {"token": name, "base": entry.base, "steered": entry.steered, "log_ratio": entry.log_ratio}
            for name, entry in zip(names, shifts.by_log_ratio, strict=True)
        ]
        result.append({"prompt": prompt, "tokens": tokens})
    return result


def _text_changes(
    opened: OpenedBase,
    texts: Mapping[str, Sequence[Sequence[int]]],
    steered: Vectors,
    batch_size: int,
) -> list[dict[str, Any]]:
    result = []
    for title, passages in texts.items():
        chosen: list[Sequence[int]] = []
        for ids in passages:
            if sum(map(len, chosen)) + len(ids) <= _TEXT_TOKENS or not chosen:
                chosen.append(ids[:_TEXT_TOKENS])
        changes = token_changes(opened.logits, chosen, [{}, steered], batch_size)[0] if chosen else []
        tokens = []
        for ids, change in zip(chosen, changes, strict=True):
            names = token_texts(ids, opened.tokenizer)
            # The first token begins the text, and is not predicted.
            tokens += [
                {"token": name, "change": value} for name, value in list(zip(names, change.tolist(), strict=True))[1:]
            ]
        if tokens:
            result.append({"title": title, "tokens": tokens})
    return result


def _generations(
    opened: OpenedBase,
    recipe: Recipe,
    spec: VectorSpec,
    prompts: Sequence[str],
    steered: Vectors,
    say: Callable[[str], None],
    looks: Looks,
) -> list[dict[str, Any]]:
    evaluate = recipe.evaluate
    length = evaluate.generate_tokens if looks.tokens is None else looks.tokens
    if opened.model is None or length == 0 or not prompts:
        return []
    generate = GenerateSpec(max_new_tokens=length, temperature=TEMPERATURE)
    where = _place(recipe)
    variants: dict[str, Vectors] = {"base": {}, "steered": steered}
    if looks.negative:
        variants["negative"] = {layer: -vector for layer, vector in steered.items()}
    runs: list[tuple[list[str], str | None, list[Vectors]]] = [
        (list(variants), spec.system_prompt, list(variants.values()))
    ]
    if evaluate.system_prompt is not None:
        runs.append((["prompting", "prompting and steering"], evaluate.system_prompt, [{}, steered]))
    say("writing completions")
    written: dict[str, list[Generation]] = {}
    for names, system_prompt, under in runs:
        encoded = encode_prompts(prompts, opened.tokenizer, spec, system_prompt)
        with opened.logits.meter.watching(opened.model, opened.blocks):
            found = generate_under(
                opened.model,
                opened.blocks,
                opened.tokenizer,
                encoded,
                under,
                generate,
                seed=recipe.seed,
                where=where,
                length_key="evaluate.generate_tokens",
            )
        written.update(zip(names, found, strict=True))
    return [
        {
            "prompt": prompt,
            "variants": [
                {
                    "name": name,
                    "text": found[index].text,
                    "distinct_1": found[index].distinct_1,
                    "distinct_2": found[index].distinct_2,
                    "repetition": found[index].repetition,
                    "words": word_counts(found[index].text, evaluate.topic_words),
                }
                for name, found in written.items()
            ],
        }
        for index, prompt in enumerate(prompts)
    ]


def _scores(recipe: Recipe, generations: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The mean of the user's scorer over the completions of each variant; each completion gets its own as well."""
    if recipe.evaluate.scorer is None or not generations:
        return None
    scorer = load_scorer(recipe.evaluate.scorer, where="evaluate.scorer")
    variants = [variant for entry in generations for variant in entry["variants"]]
    prompts = [entry["prompt"] for entry in generations for _variant in entry["variants"]]
    means: dict[str, list[float]] = {}
    for variant, score in zip(variants, scorer.score([v["text"] for v in variants], prompts), strict=True):
        variant["score"] = score
        means.setdefault(variant["name"], []).append(score)
    return {"scorer": scorer.name, "means": {name: sum(values) / len(values) for name, values in means.items()}}
