"""The evaluation that is part of every build: held-out pairs, neutral text, controls and completions, in a budget."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from patcher.capture.opened import OpenedBase
from patcher.capture.resuming import ResumingModel
from patcher.errors import CheckFailed
from patcher.evaluate.asked import Asked, asked_of
from patcher.evaluate.budget import Budget, capture_tokens, most_within
from patcher.evaluate.contributions import Contributions
from patcher.evaluate.damage import POSITIONS, NeutralText
from patcher.evaluate.details import Looks, asks_for_completions, batch_rows, completions_within, look
from patcher.evaluate.guard import beyond_guard, guard_of
from patcher.evaluate.inputs import own_pairs
from patcher.evaluate.neutral import in_measured_order
from patcher.evaluate.scoring import perplexities, tokens_run
from patcher.evaluate.side_effects import Curve, neutral_ids
from patcher.evaluate.texts import read_passages
from patcher.patched.evaluation import Guard
from patcher.progress.clock import Clock
from patcher.progress.stage import doing
from patcher.recipe.file import LoadedRecipe
from patcher.vectors.prepared import PreparedVector
from patcher.vectors.steering_vector import SteeringVector

_FOR_GUARD, _FOR_CONTROLS = 0.25, 0.2
"""Of the budget, what the effect on held-out pairs leaves for neutral text, and for what stands beside it."""
_FEWEST_COMPARED = 3
"""Pairs: on fewer nothing is said of a random vector."""


def evaluate_build(
    loaded: LoadedRecipe,
    prepared: Sequence[PreparedVector],
    opened: OpenedBase,
    found: Sequence[SteeringVector],
    vectors: Mapping[int, torch.Tensor],
    measured: Mapping[int, torch.Tensor],
    say: Callable[[str], None],
    clock: Clock,
) -> tuple[dict[str, Any] | None, list[str]]:
    """Measure all edits together: on each vector's held-out pairs, on texts that they should leave alone, and by eye.

    It spends what `evaluate.budget` allows, on these in this order; what does not fit is measured on less.

    Args:
        found: the recipe's vectors, each by itself, as their effect is measured.
        vectors: what the copy gains, layer -> [hidden]: what is measured on texts and seen by eye is its own.
        measured: the same without the held-out pairs, where the recipe says `refit`: what the effect on them, and the
            curve of effect and damage, are measured of.
        clock: takes the time of the parts.

    Returns:
        The ``evaluation`` of ``steering.json`` (that of the first vector with pairs on top, all of them in
        ``per_vector``), or None where there is nothing to measure on; and notes that say why, and what was cut.
    """
    spec = loaded.recipe.evaluate
    if not spec.enabled or opened.tokenizer is None:
        return None, ["the effect was not evaluated" + ("" if spec.enabled else ": `evaluate.enabled` is false")]
    budget = Budget(spec.budget, capture_tokens(prepared, opened.logits.meter.blocks), opened.logits.meter)
    run = _Evaluation(loaded, prepared, opened, found, vectors, measured, say, clock, budget)
    planned = None if budget.full else budget.allowed
    with doing(say, "evaluating", planned, "tokens", lambda: budget.spent):
        return run.all(), run.notes


@dataclass
class _Evaluation:
    loaded: LoadedRecipe
    prepared: Sequence[PreparedVector]
    opened: OpenedBase
    found: Sequence[SteeringVector]
    vectors: Mapping[int, torch.Tensor]
    measured: Mapping[int, torch.Tensor]
    say: Callable[[str], None]
    clock: Clock
    budget: Budget
    notes: list[str] = field(default_factory=list)

    def all(self) -> dict[str, Any]:
        """`evaluation` of the manifest."""
        spec, budget, time = self.loaded.recipe.evaluate, self.budget, self.clock.time
        with time("evaluate.effect"):
            asked = self._effects()
        with time("evaluate.texts"), budget.outside():
            texts = self._perplexities()
        contributions = Contributions()
        with time("evaluate.guard"):
            guard = self._guard(contributions)
        with time("evaluate.controls"):
            self._controls(asked)
        results = [one.result(self.loaded.recipe.seed) for one in asked]
        head = {key: value for key, value in results[0].items() if key != "vector"} if results else {}
        evaluation = {**head, "per_vector": results, "perplexity": texts, "guard": guard}
        if self.opened.model is None:
            # Each of these would read the whole model from the disk once more.
            self.notes.append("the base was streamed: no curve, tokens or completions were measured")
        else:
            with time("evaluate.curve"):
                evaluation |= self._curve(asked)
            with time("evaluate.completions"):
                evaluation |= self._seen(contributions)
        self.notes += filter(None, [budget.note()])
        dtype = str(self.opened.logits.dtype).removeprefix("torch.")
        return {**evaluation, "budget": {"asked": spec.budget, **budget.as_json()}, "dtype": dtype}

    @cached_property
    def neutral(self) -> tuple[NeutralText, str]:
        """What the vectors should leave alone, in the order in which a sweep chooses on it, and what it is called."""
        texts, name = neutral_ids(self.loaded, self.opened)
        chosen = in_measured_order(texts)[: self.loaded.recipe.evaluate.neutral_limit]
        return NeutralText(chosen, positions=POSITIONS), name

    def _guard_cost(self, texts: int) -> float:
        source = self.opened.logits
        return source.cost(self.neutral[0].tokens_run(source, texts), [{}, self.vectors])

    @cached_property
    def _for_guard(self) -> float:
        """What is left for neutral text."""
        return min(self._guard_cost(len(self.neutral[0].texts)), self.budget.reserved(_FOR_GUARD))

    def _effects(self) -> list[Asked]:
        """Base and steered on the held-out items of every vector."""
        recipe, source = self.loaded.recipe, self.opened.logits
        own = own_pairs(self.loaded, self.notes)
        asked: list[Asked] = []
        for number, entry in enumerate(self.prepared):
            budget, shares = self.budget, len(self.prepared) - number
            # Found out first, because it says what everything costs.
            self._prove(entry)
            allowed = (budget.left - self._for_guard - budget.reserved(_FOR_CONTROLS)) / shares
            one, notes = asked_of(
                self.loaded, self.prepared, entry, own, self.opened, self.found, self.measured, allowed
            )
            self.notes += [note for note in notes if note not in self.notes]
            if one is None:
                continue
            asked.append(one)
            if one.count < one.of:
                budget.cuts.append(f"{one.count} of {one.of} {one.unit}")
            self.say("evaluating: base and steered")
            controls = (0, False)
            if self.opened.model is None:
                # Once more through the whole model would be once more through the disk.
                controls = self._fitting(one, math.inf if budget.full else budget.reserved(_FOR_CONTROLS) / shares)
                one.compared = True
                self._said_of_controls(*controls, None)
            one.measured.measure(source, random_vectors=controls[0], negative=controls[1], seed=recipe.seed)
            with budget.outside():
                one.prompt(source)
        return asked

    def _prove(self, entry: PreparedVector) -> None:
        source = self.opened.logits
        first = next(iter(self.neutral[0].texts), None)
        if isinstance(source, ResumingModel) and first is not None:
            source.prove(first, self.vectors)

    def _fitting(self, one: Asked, allowed: float) -> tuple[int, bool]:
        """How many random vectors fit, on all items, and whether the negative does."""
        source, wanted = self.opened.logits, self.loaded.recipe.evaluate.random_vectors
        tokens = tokens_run(source, one.measured.effect.texts(one.count), one.rows)
        each = source.cost(tokens, [self.measured], again=True)
        # Of the last block nothing is computed again.
        fit = wanted + 1 if math.isinf(allowed) or each <= 0 else int(allowed / each)
        return min(wanted, fit), fit > wanted

    def _controls(self, asked: Sequence[Asked]) -> None:
        """Random vectors of equal norm, then the negative, beside the effect of every vector."""
        source, seed = self.opened.logits, self.loaded.recipe.seed
        waiting = [one for one in asked if not one.compared]
        for number, one in enumerate(waiting):
            self.say("evaluating: random vectors of equal norm, the negative coefficient")
            allowed, items = self.budget.left / (len(waiting) - number), None
            randoms, negative = self._fitting(one, allowed)
            if not randoms:

                def cost(count: int, one: Asked = one) -> float:
                    tokens = tokens_run(source, one.measured.effect.texts(count), one.rows)
                    return source.cost(tokens, [self.measured], again=False)

                items = most_within(one.count, cost, allowed, least=0)
                randoms = int(items >= min(_FEWEST_COMPARED, one.count))
            one.measured.compare(source, random_vectors=randoms, negative=negative, items=items, seed=seed)
            self._said_of_controls(randoms, negative, items)

    def _said_of_controls(self, randoms: int, negative: bool, items: int | None) -> None:
        wanted, cuts = self.loaded.recipe.evaluate.random_vectors, self.budget.cuts
        fewer = "" if items is None else f" on {items} pairs"
        if randoms < wanted:
            cuts.append(f"{randoms} of {wanted} random vectors{fewer}" if randoms else "no random vector")
        if not negative:
            cuts.append("no negative")

    def _guard(self, contributions: Contributions) -> dict[str, Any] | None:
        """The damage on as much neutral text as fits."""
        (neutral, name), budget, recipe = self.neutral, self.budget, self.loaded.recipe
        count = len(neutral.texts)
        if not count:
            self.notes.append("the neutral text has no passage of two tokens or more: damage was not measured")
            return None
        self.say("evaluating: what changes in neutral text")
        texts = most_within(count, self._guard_cost, budget.left - budget.reserved(_FOR_CONTROLS))
        if texts < count:
            budget.cuts.append(f"{texts} of {count} neutral passages")
        return guard_of(recipe, self.opened.logits, neutral, texts, name, self.vectors, contributions)

    def _curve(self, asked: Sequence[Asked]) -> dict[str, Any]:
        """Effect and damage by coefficient, of the first vector that has an effect to measure."""
        if not asked:
            return {}
        if not self.budget.full:
            self.budget.cuts.append("no curve over coefficients")
            return {}
        self.say("evaluating: effect and damage by coefficient")
        factor, effect = asked[0].entry.spec.factor, asked[0].measured.effect
        layer = next(iter(self.vectors)) if len(self.vectors) == 1 else None
        curve = Curve(layer, factor if len(self.prepared) == 1 else 1.0, math.copysign(1.0, factor))
        texts, seed = self.neutral[0].texts, self.loaded.recipe.seed
        return curve.measure(self.opened.logits, self.measured, effect, texts, seed=seed)

    def _seen(self, contributions: Contributions) -> dict[str, Any]:
        """Tokens that moved, and completions, as far as they fit or were asked for."""
        recipe, spec, budget = self.loaded.recipe, self.prepared[0].spec, self.budget
        looks = Looks() if budget.full else completions_within(self.opened, recipe, spec, self.vectors, budget)
        with budget.outside() if asks_for_completions(recipe) else contextlib.nullcontext():
            shown = look(self.opened, recipe, spec, self.vectors, self.say, looks=looks, contributions=contributions)
        del shown["text_changes"]
        return shown

    def _perplexities(self) -> dict[str, dict[str, float]] | None:
        result, opened, spec = {}, self.opened, self.loaded.recipe.evaluate
        for name, file in (("on_topic", spec.on_topic), ("off_topic", spec.off_topic)):
            if file is None:
                continue
            self.say(f"evaluating: perplexity on the {name.replace('_', '-')} text")
            passages = read_passages(self.loaded.file(file), f"evaluate.{name}")
            rows = [opened.tokenizer(line)["input_ids"][: opened.positions] for line in passages]
            texts = [ids for ids in rows if len(ids) > 1]
            base, steered = perplexities(opened.logits, texts, [{}, self.vectors], batch_rows(self.loaded.recipe))
            result[name] = {"base": base, "steered": steered}
        return result or None


def require_effect(evaluation: Mapping[str, Any] | None, where: str) -> None:
    """What ``--strict`` asks for: an effect beyond that of random vectors, and damage within the guard.

    Raises:
        CheckFailed: with all that is wrong.
    """
    wrong, remedy = [], "find a layer and a coefficient with patch-model sweep"
    if evaluation is None or not evaluation["per_vector"]:
        wrong.append("no effect was measured: there are no held-out pairs")
    else:
        for result in evaluation["per_vector"]:
            if not result["distinguishable"]:
                wrong.append(f"vector `{result['vector']}`: " + "; ".join(result["notes"]))
            if result["distinguishable"] is None:
                remedy = "give it more with --set evaluate.budget=full"
    guard = (evaluation or {}).get("guard")
    if guard is not None and not guard["within"]:
        wrong.append(beyond_guard(Guard.model_validate(guard)))
    if wrong:
        raise CheckFailed(
            "the effect is not what --strict asks for",
            where=where,
            found="; ".join(wrong),
            remedy=f"nothing was written; {remedy}, or leave --strict out",
            code="strict",
        )
