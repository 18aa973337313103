"""The ``evaluation`` of ``steering.json`` as types: what was measured of the edits."""

from __future__ import annotations

from typing import Any

from patcher.patched.part import Number, Part


class Perplexity(Part):
    base: Number | None = None
    steered: Number | None = None


class Guard(Part):
    """Damage on neutral text (KL divergence from the base, nats a token) and the limit that it is held to."""

    kl: Number | None = None
    kl_low: Number | None = None
    kl_high: Number | None = None
    kl_limit: Number | None = None
    perplexity: Perplexity = Perplexity()
    perplexity_limit: Number | None = None
    within: bool | None = None
    text: str | None = None


class Prompting(Part):
    """A system prompt as a control: alone, and with the vector."""

    alone: Number | None = None
    steered: Number | None = None


class Separation(Part):
    """How far apart held-out texts of two lists lie along a vector, and along random directions."""

    layer: int | None = None
    read_layer: int | None = None
    positives: int | None = None
    negatives: int | None = None
    d_prime: Number | None = None
    auc: Number | None = None
    random_d_prime: Number | None = None
    random_auc: Number | None = None
    beyond_random: bool | None = None


class RecordedEffect(Part):
    """One vector on held-out pairs, or texts of lists, beside its controls, in the unit of ``measure``."""

    vector: str | None = None
    measure: str | None = None
    pairs: int | None = None
    unit: str | None = None
    base: Number | None = None
    steered: Number | None = None
    shift: Number | None = None
    shift_low: Number | None = None
    shift_high: Number | None = None
    negative: Number | None = None
    random: list[Number] | Number | None = None
    random_pairs: int | None = None
    distinguishable: bool | None = None
    held_out: bool | None = None
    prompting: Prompting | None = None
    separation: list[Separation] = []
    notes: list[str] = []

    @property
    def items(self) -> str:
        """What it was measured on, in words: "12 held-out pairs"."""
        unit = self.unit or "pairs"
        counted = unit.replace("pairs", "pair").replace("prompts", "prompt") if self.pairs == 1 else unit
        return f"{self.pairs} {'held-out' if self.held_out else 'in-sample'} {counted}"

    @property
    def controls(self) -> list[float]:
        """The measure under random vectors of equal norm."""
        found = self.random
        return found if isinstance(found, list) else [] if found is None else [found]


class Variant(Part):
    """What was written under one of several vectors."""

    name: str
    text: str = ""


class Completions(Part):
    """What base and copy wrote from one prompt."""

    prompt: str
    variants: list[Variant] = []

    @property
    def texts(self) -> dict[str, str]:
        """Name of a variant -> what was written."""
        return {variant.name: variant.text for variant in self.variants}


class Scores(Part):
    """Means of the user's own scorer."""

    scorer: str | None = None
    means: dict[str, Number | None] = {}


class Task(Part):
    """One metric of one lm-eval task."""

    task: str | None = None
    metric: str | None = None
    base: Number | None = None
    base_stderr: Number | None = None
    patched: Number | None = None
    patched_stderr: Number | None = None


class Budget(Part):
    """What measuring was allowed to cost and did, in tokens through all blocks, and what was measured less of."""

    asked: Number | str | None = None
    allowed: Number | None = None
    spent: Number | None = None
    outside: Number | None = None
    capture: Number | None = None
    cut: list[str] = []


class SweepRow(Part):
    """One row of a sweep's report."""

    kind: str | None = None
    name: str | None = None
    layer: int | None = None
    coefficient: Number | None = None
    effect: Number | None = None
    low: Number | None = None
    high: Number | None = None
    damage: Number | None = None
    within_guard: bool | None = None


class SweepChoice(Part):
    """How a sweep chose layer and coefficient."""

    layers: list[int] = []
    coefficients: list[Number] = []
    rule: str | None = None
    recommended: dict[str, Any] | None = None
    reason: str | None = None
    best_default: dict[str, Any] | None = None
    report: list[SweepRow] = []


class Evaluation(RecordedEffect):
    """What the edits do: the first vector's effect on top, each in ``per_vector``, damage, completions."""

    per_vector: list[RecordedEffect] = []
    perplexity: dict[str, Perplexity] | None = None
    guard: Guard | None = None
    curve: list[dict[str, Any]] | None = None
    random_curve: list[dict[str, Any]] | None = None
    kl_tokens: list[dict[str, Any]] | None = None
    shifted: list[dict[str, Any]] | None = None
    generations: list[Completions] = []
    generation_temperature: Number | None = None
    scores: Scores | None = None
    lm_eval: list[Task] = []
    budget: Budget | None = None
    dtype: str | None = None
    sweep: SweepChoice | None = None
