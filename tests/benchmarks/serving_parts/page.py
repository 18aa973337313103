"""The page docs/performance-serving.md."""

from __future__ import annotations

import datetime
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from capture_parts.tables import Table
from serving_parts.models import Pair, Size

OF_A_TINY_MODEL = """
**These figures say nothing about speed:** the model is tiny, and a step of it takes no longer than calling it does.
They show that each copy runs in each stack. Without `--tiny` the same command measures.
""".strip()
INTRODUCTION = """\
Each model is random, in fp32: {size}. A request has a prompt of {prompt} tokens and gets
{tokens} new ones, greedily and alone (batch 1). The rate is new tokens by the seconds of the whole request. In each
stack, base and copy are loaded in the same process and take turns ({repeats} of them, each beginning with another one);
a ratio is made of the two in the same turn. Given are the median and, in brackets, the quartiles of the turns. The
base is loaded twice: what "base again" differs from the base is noise. "Hooked" is the base with a forward hook that
adds the same vector. vLLM runs eagerly. llama.cpp runs GGUF files of its own converter, with the settings of the
verification (fp32 weights and cache, no flash attention).
"""
ROUTES = {
    "native": "the bias is there; the vector is added to it",
    "flag": "a config key adds a bias to every MLP: all but one are zero",
    "relabel": "the same with another class (Qwen2 becomes Llama)",
    "carrier": "one block more",
    "rank_one": "fitted into a weight that is there",
}


def page(
    facts: Sequence[tuple[str, str]],
    pairs: Sequence[Pair],
    found: Mapping[str, Mapping[str, Any]],
    *,
    size: Size,
    prompt: int,
    tokens: int,
    repeats: int,
    command: str,
) -> str:
    """Markdown, from what :func:`serving_parts.stacks.run` found in each stack."""
    today = datetime.datetime.now(datetime.timezone.utc).date()
    shape = f"{size.blocks} blocks, hidden {size.hidden}, MLP {size.intermediate}, vocabulary {size.vocabulary:,}"
    parts = [
        "# Performance: running a copy",
        f"Measured on {today} by one run of",
        f"```\npatch-model stacks install vllm\npatch-model stacks install llama.cpp\n{command}\n```",
        "which writes this page.",
        *([OF_A_TINY_MODEL] if "--tiny" in command else []),
        summary(pairs, found).markdown(),
        "## How it was measured",
        INTRODUCTION.format(size=shape, prompt=prompt, tokens=tokens, repeats=repeats).strip(),
        "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in facts)]),
    ]
    parts += [rates(stack, pairs, each).markdown() for stack, each in found.items()]
    return "\n\n".join(parts) + "\n"


def summary(pairs: Sequence[Pair], found: Mapping[str, Mapping[str, Any]]) -> Table:
    """Of each route, the copy's rate divided by the base's in each stack, and the hook's in transformers."""
    rows = []
    for pair in pairs:
        row = [f"`{pair.route}`", ROUTES[pair.route], f"{pair.weights:.3f}"]
        for each in found.values():
            row.append(ratio(each, pair.route, "copy"))
        row.append(ratio(found.get("transformers", {}), pair.route, "hooked"))
        rows.append(row)
    noise = [
        f"{median:.3f} in {stack}"
        for stack, each in found.items()
        if (median := _median([ratios(each, pair.route, "base again") for pair in pairs])) is not None
    ]
    return Table(
        "Tokens a second of the copy, divided by those of the base",
        ("route", "what the copy has more", "bytes of weights, copy / base", *found, "a hook in transformers"),
        rows,
        [f"The base, loaded twice, beside itself: {', '.join(noise)} (median over all routes)."] if noise else [],
    )


def rates(stack: str, pairs: Sequence[Pair], found: Mapping[str, Any]) -> Table:
    """Median tokens a second in one stack."""
    title = f"{stack} {found['about']['version']} ({found['about']['detail']})" if "about" in found else stack
    names = ["base", "base again", "copy", *(["hooked"] if stack == "transformers" else [])]
    rows, notes = [], []
    for pair in pairs:
        made = _rates(found, pair.route)
        values = [f"{statistics.median(made[name]):.1f}" if name in made else "not run" for name in names]
        compared = [ratio(found, pair.route, name) for name in names[1:]]
        rows.append([f"`{pair.route}`", pair.case.model_type, pair.architecture, *values, *compared])
        if not made and "missing" not in found:
            notes.append(f"`{pair.route}`: {found['routes'][pair.route]['error']}.")
    if "missing" in found:
        notes.append(f"Not run: {found['missing']}.")
    columns = ("route", "base", "class of the copy", *(f"{name}, tokens/s" for name in names))
    return Table(title, (*columns, *(f"{name} / base" for name in names[1:])), rows, notes)


def ratio(found: Mapping[str, Any], route: str, name: str) -> str:
    """The median of a variant's rates by the base's, and the quartiles."""
    each = ratios(found, route, name)
    if not each:
        return "not run"
    if len(each) < 2:
        return f"{each[0]:.3f}"
    low, _, high = statistics.quantiles(each, n=4, method="inclusive")
    return f"{statistics.median(each):.3f} ({low:.3f} to {high:.3f})"


def ratios(found: Mapping[str, Any], route: str, name: str) -> list[float]:
    made = _rates(found, route)
    return [rate / base for rate, base in zip(made.get(name, []), made.get("base", []), strict=name in made)]


def _rates(found: Mapping[str, Any], route: str) -> Mapping[str, list[float]]:
    measured: Mapping[str, list[float]] = found.get("routes", {}).get(route, {}).get("rates", {})
    return measured


def _median(each: Sequence[Sequence[float]]) -> float | None:
    together = [value for values in each for value in values]
    return statistics.median(together) if together else None
