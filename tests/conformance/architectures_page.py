"""docs/architectures.md from the results of all_architectures.py."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from families_page import family_table
from wrappers_page import wrappers_part

FAMILIES = Path(__file__).parents[2] / "docs" / "families.json"
STACKS = ("transformers", "vllm", "llama.cpp")
GROUPS = ("exact and free", "exact, at a cost", "fitted", "none", "wrong", "failed")
COMMONPLACE = (
    "creates no bias after this block's MLP",
    "no config flag that creates",
    "no other class is known",
    "no attention output bias is a constant shift",
    "only an edit before block 0",
)
WORDS = {"native": "yes", "backend": "backend", "no": "–"}

TITLE = """\
# Every architecture of transformers

First the models that people use, run by three stacks; then every class that transformers has.
"""

INTRODUCTION = """\
## Every class

Each text causal LM that transformers {transformers} maps to `AutoModelForCausalLM` was built tiny, with random weights,
from its own default config. It was patched by the route that the planner chooses, and the stock class loaded it without
help. Then it was compared with a forward hook on the unpatched model. *Difference* is the largest difference
of log-probabilities between the patched copy and the hook; *effect* is what the hook changes. The vector is half as
long as the residual stream, or longer where that cannot be seen. The embedding is scaled so that the residual stream is
about as large as a trained model's. All of it in float32 on a CPU, with {python}torch {torch}.

The columns of the stacks say which one reads the copy. Only transformers was run here. For vLLM and llama.cpp they
state what is known of those stacks' code, and what the runs above showed.

This page is made by `{command}`; it is not written by hand.
"""


def group_of(run: dict[str, Any]) -> str:
    """Which of :data:`GROUPS` a run belongs to."""
    if run["status"] == "exact":
        return GROUPS[0] if run["cost"] == "none" else GROUPS[1]
    return str(run["status"])


def listed_types(page: str) -> list[str]:
    """The model types in the page's main table."""
    table = page.partition("## Results")[2].partition("\n## ")[0]
    return re.findall(r"^\| `([^`]+)` \|", table, flags=re.MULTILINE)


def render(results: dict[str, Any], families: dict[str, Any] | None = None) -> str:
    """The page; ``families`` are the results of families.py, by default the documented ones."""
    records = results["architectures"]
    families = families or json.loads(FAMILIES.read_text(encoding="utf-8"))
    versions = {**results["versions"]}
    versions["python"] = f"Python {versions['python']}, "
    parts = [TITLE, family_table(families), INTRODUCTION.format(**versions, command=results["command"])]
    parts += [_counts(records), _table(records), _free(records), _other_layers(records), _embedding(records)]
    parts += [_fits(records), _warnings(records), _reasons(records), _decoders(records)]
    parts += [wrappers_part(results.get("wrappers", []))]
    return "\n".join(part for part in parts if part)


def _main(record: dict[str, Any]) -> dict[str, Any]:
    run: dict[str, Any] = record["runs"][0]
    return run


def _counts(records: list[dict[str, Any]]) -> str:
    counts = Counter(group_of(_main(record)) for record in records)
    lines = ["## Counts", "", "| a block in the middle | architectures |", "|---|---|"]
    lines += [f"| {group} | {counts[group]} |" for group in GROUPS if counts[group]]
    lines += [f"| all | {len(records)} |", ""]
    free = [record for record in records if record.get("free")]
    able = counts[GROUPS[0]] + sum(group_of(record["free"]) == GROUPS[0] for record in free)
    exact = counts[GROUPS[0]] + counts[GROUPS[1]]
    lines += [
        f"{exact} are exact. {able} have an exact route that is free: {counts[GROUPS[0]]} take it by default; for the "
        "others the planner prefers one that more stacks read, and `prefer: free` takes it.",
        "",
    ]
    routes = Counter(_main(record)["route"] for record in records if _main(record)["route"])
    lines += ["By route: " + ", ".join(f"{name} {count}" for name, count in routes.most_common()) + ".", ""]
    for stack in STACKS:
        read = sum(_main(record)["stacks"].get(stack, "no") != "no" for record in records)
        lines.append(f"- {stack} reads the copies of {read}.")
    return "\n".join(lines) + "\n"


def _table(records: list[dict[str, Any]]) -> str:
    head = ["model type", "class", "route", "exact", "run-time cost", *STACKS, "difference", "effect"]
    lines = ["## Results", "", _row(head), _row(["---"] * len(head))]
    for record in records:
        run = _main(record)
        cells = [f"`{record['model_type']}`", _class(record, run), *_outcome(run)]
        lines.append(_row(cells))
    return "\n".join(lines) + "\n"


def _class(record: dict[str, Any], run: dict[str, Any]) -> str:
    own = str(record["class_name"])
    return own if run["reads"] in (None, own) else f"{own} → {run['reads']}"


def _outcome(run: dict[str, Any]) -> list[str]:
    if run["route"] is None:
        return ["none" if run["status"] == "none" else run["status"], *["–"] * 7]
    exact = {"exact": "yes", "fitted": "no: fitted", "wrong": "**wrong**"}[run["status"]]
    stacks = [WORDS[run["stacks"].get(stack, "no")] for stack in STACKS]
    return [run["route"], exact, run["cost"], *stacks, f"{run['difference']:.1e}", f"{run['effect']:.2g}"]


def _other_layers(records: list[dict[str, Any]]) -> str:
    head = ["model type", "kind of block", "route", "exact", "run-time cost", *STACKS, "difference", "effect"]
    rows = [
        _row([f"`{record['model_type']}`", run["kind"].replace("_", " "), *_outcome(run)])
        for record in records
        for run in record["runs"]
        if run["layer"] >= 0 and sum(other["layer"] >= 0 for other in record["runs"]) > 1
    ]
    if not rows:
        return ""
    text = "## Architectures with several kinds of blocks\n\nOne block of each kind was steered by itself.\n"
    return "\n".join([text, _row(head), _row(["---"] * len(head)), *rows]) + "\n"


def _free(records: list[dict[str, Any]]) -> str:
    found = [(record, record["free"]) for record in records if record.get("free")]
    if not found:
        return ""
    head = ["model type", "class", "route", "exact", "run-time cost", *STACKS, "difference", "effect"]
    rows = [_row([f"`{record['model_type']}`", _class(record, run), *_outcome(run)]) for record, run in found]
    text = "## With `prefer: free`\n\nThe same block, where the planner's choice above costs something at run time.\n"
    return "\n".join([text, _row(head), _row(["---"] * len(head)), *rows]) + "\n"


def _embedding(records: list[dict[str, Any]]) -> str:
    runs = [(record, run) for record in records for run in record["runs"] if run["layer"] == -1]
    if not runs:
        return ""
    counts = Counter(group_of(run) for _record, run in runs)
    differences = [run["difference"] for _record, run in runs if run["status"] == "exact"]
    most = f", the largest difference {max(differences):.1e}" if differences else ""
    lines = [
        "## An edit before block 0",
        "",
        ", ".join(f"{group} {counts[group]}" for group in GROUPS if counts[group]) + most + ".",
    ]
    for group in GROUPS[1:]:
        names = [record["model_type"] for record, run in runs if group_of(run) == group]
        if names:
            lines += ["", f"{group}: " + ", ".join(f"`{name}`" for name in names)]
    return "\n".join(lines) + "\n"


def _fits(records: list[dict[str, Any]]) -> str:
    runs = [(record, run) for record in records for run in record["runs"] if run["fit"]]
    if not runs:
        return ""
    head = ["model type", "kind of block", "held-out error", "KL(hook, fit) / KL(hook, base)"]
    rows = [
        _row([f"`{record['model_type']}`", run["kind"].replace("_", " "), _number(run["fit"], "error_mean"),
              _number(run["fit"], "ratio")])
        for record, run in runs
    ]  # fmt: skip
    text = (
        "## Fitted routes\n\nA tiny model with random weights on random text says that the route works, not how well "
        "it fits: real, wide models fit better. Every build measures its own.\n"
    )
    return "\n".join([text, _row(head), _row(["---"] * len(head)), *rows]) + "\n"


def _warnings(records: list[dict[str, Any]]) -> str:
    found: dict[str, list[str]] = {}
    for record in records:
        for text in _main(record)["warnings"]:
            found.setdefault(text, []).append(f"`{record['model_type']}`")
    if not found:
        return ""
    lines = [f"- {text}: {', '.join(names)}" for text, names in found.items()]
    return "\n".join(["## What the model cards of such copies warn of", "", *lines]) + "\n"


def _number(values: dict[str, Any], name: str) -> str:
    value = values.get(name)
    return "–" if value is None else f"{value:.2g}"


def _reasons(records: list[dict[str, Any]]) -> str:
    left = [record for record in records if _main(record)["status"] not in ("exact", "fitted")]
    if not left:
        return ""
    lines = ["## Why not", ""]
    lines += [f"- `{record['model_type']}` ({_main(record)['status']}): {_telling(_main(record))}" for record in left]
    return "\n".join(lines) + "\n"


def _telling(run: dict[str, Any]) -> str:
    """The reasons without those that are true of nearly every class."""
    parts = re.split(r"; (?=[a-z_]+: )", run["reason"])
    return "; ".join(part for part in parts if not any(text in part for text in COMMONPLACE)) or run["reason"]


def _decoders(records: list[dict[str, Any]]) -> str:
    names = [f"`{record['model_type']}`" for record in records if record["decoder_set"]]
    if not names:
        return ""
    text = (
        "## Encoders as decoders\n\nThe default config of these is an encoder's; they were run with `is_decoder: true`"
    )
    return f"{text}: {', '.join(names)}.\n"


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"
