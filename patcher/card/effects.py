"""The sections of the model card that show what steering does: damage, pictures, completions, how it was chosen."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from patcher.card.values import grid, number, rows, table

_ALTERNATIVES = {
    "steering_by_coefficient.png": "Effect on the measure and damage on neutral text at multiples of the vector, "
    "beside random vectors of equal norm",
    "steering_shifted_tokens.png": "Next tokens whose probability the vector changes most",
}
_LONGEST = 400


def side_effects(manifest: Mapping[str, Any]) -> str:
    """Damage on neutral text, with a warning where it is beyond the guard; and prompting as a control."""
    found = table(manifest, "evaluation")
    guard = table(found, "guard")
    parts = []
    prompted = [
        (
            result.get("vector"),
            number(result.get("base")),
            number(result["prompting"].get("alone")),
            number(result.get("steered")),
            number(result["prompting"].get("steered")),
        )
        for result in rows(found, "per_vector")
        if isinstance(result.get("prompting"), Mapping)
    ]
    if prompted:
        parts.append("Beside a system prompt that asks for the behaviour:")
        parts.append(grid(("vector", "base", "system prompt alone", "steered", "both"), prompted))
    if guard:
        perplexity = table(guard, "perplexity")
        limit = guard.get("kl_limit")
        line = (
            f"On text that the vector should leave alone ({guard.get('text')}), the next-token distributions move by "
            f"{number(guard.get('kl'))} nats a token (KL divergence from the base"
            + (f"; the guard is {number(limit)}" if limit is not None else "")
            + f"), and perplexity goes from {number(perplexity.get('base'))} to {number(perplexity.get('steered'))}."
        )
        parts.append(line)
        if guard.get("within") is False:
            parts.append(
                "> **Warning:** this damage is beyond the guard. Expect the model to be worse at other things."
            )
    return "\n\n".join(parts)


def tasks(manifest: Mapping[str, Any]) -> str:
    """Tasks of lm-eval, base against copy."""
    lines = [
        (
            row.get("task"),
            row.get("metric"),
            f"{number(row.get('base'))} ± {number(row.get('base_stderr'))}",
            f"{number(row.get('patched'))} ± {number(row.get('patched_stderr'))}",
        )
        for row in rows(table(manifest, "evaluation"), "lm_eval")
    ]
    return grid(("lm-eval task", "metric", "base", "this copy"), lines) if lines else ""


def shown(pictures: Sequence[str]) -> str:
    """The pictures, by the files beside the card."""
    return "\n\n".join(f"![{_ALTERNATIVES.get(name, 'What steering does')}]({name})" for name in pictures)


def completions(manifest: Mapping[str, Any]) -> str:
    """What the base and the copy write from the same prompt and seed; generated, not picked."""
    found = rows(table(manifest, "evaluation"), "generations")
    if not found:
        return ""
    lines = []
    for entry in found:
        texts = {str(variant.get("name")): variant for variant in rows(entry, "variants")}
        lines.append((_quoted(entry.get("prompt")), *(_quoted(texts.get(name, {}).get("text")) for name in _NAMES)))
    head = ("prompt", "base", "steered", "sign reversed")
    text = "The same prompt and seed in a row, sampled at temperature 0.7; none was picked."
    scores = table(table(table(manifest, "evaluation"), "scores"), "means")
    if scores:
        name = table(table(manifest, "evaluation"), "scores").get("scorer")
        text += f" Mean of `{name}`: " + ", ".join(f"{key} {number(value)}" for key, value in scores.items()) + "."
    return f"## Completions\n\n{grid(head, lines)}\n\n{text}"


_NAMES = ("base", "steered", "negative")


def choice(manifest: Mapping[str, Any]) -> str:
    """How a sweep chose the layer and the coefficient."""
    sweep = table(table(manifest, "evaluation"), "sweep")
    best = table(sweep, "recommended")
    if not best:
        return ""
    report = [
        (
            row.get("name"),
            row.get("layer"),
            number(row.get("coefficient")),
            number(row.get("effect")),
            f"{number(row.get('low'))} to {number(row.get('high'))}",
            number(row.get("damage")),
            "" if row.get("within_guard") is not False else "beyond the guard",
        )
        for row in rows(sweep, "report")
        if row.get("kind") in ("recommended", "default", "prompting", "prompting_and_steering")
    ]
    head = ("", "layer", "coefficient", "effect", "95 % interval", "KL, nats a token", "")
    return (
        "## How layer and coefficient were chosen\n\n"
        f"By a sweep over {len(sweep.get('layers') or [])} layers and {len(sweep.get('coefficients') or [])} "
        f"coefficients. Rule: {sweep.get('rule')}. The vector was made on one part of the pairs and the cell chosen on "
        "another; these are the effects on a third, beside what people take without a search:\n\n" + grid(head, report)
    )


def _quoted(value: Any) -> str:
    """A model's own words, so that Markdown shows them and does nothing else with them."""
    text = re.sub(r"\s+", " ", str(value or "")).strip()
    text = text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
    return re.sub(r"([\\`*_{}\[\]<>()#+!~$@])", r"\\\1", text)
