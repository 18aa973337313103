"""The part of docs/architectures.md about multimodal models, from the results of all_architectures.py."""

from __future__ import annotations

from collections import Counter
from typing import Any

LOADS = {"whole": "the whole", "text": "the text part", "refuses": "refuses", "": "–"}

INTRODUCTION = """\
## Multimodal models

Each model that transformers maps to `AutoModelForImageTextToText` or `AutoModelForMultimodalLM` was built tiny, with
random weights, from its own default config with small sizes (of families that people use: from a released config). A
recipe of three pairs was built as a user builds it, proof included. The stock class loaded the copy. It was compared
with a hook as above: on a text, and, where the class takes images, on a text, an image and a text. *by default* is what
`AutoModelForCausalLM` does with the copy: it loads the whole model, the text part alone, or refuses.
"""


def wrappers_part(records: list[dict[str, Any]]) -> str:
    """The section; empty where none were run."""
    if not records:
        return ""
    head = [
        "model type",
        "class",
        "decoder",
        "route",
        "exact",
        "run-time cost",
        "difference",
        "effect",
        "image",
        "default",
    ]
    lines = [INTRODUCTION, *_counts(records), "", _row(head), _row(["---"] * len(head))]
    for record in records:
        run = record["runs"][0]
        cells = [
            f"`{record['model_type']}`",
            record["class_name"],
            f"`{record['text_type']}`" if record["text_type"] else "–",
        ]
        lines.append(_row([*cells, *_outcome(run), _image(run), LOADS.get(run["causal_lm"], run["causal_lm"])]))
    return "\n".join([*lines, "", *_first_blocks(records), *_why_no_image(records), *_reasons(records)])


def _counts(records: list[dict[str, Any]]) -> list[str]:
    runs = [record["runs"][0] for record in records]
    exact = [run for run in runs if run["status"] == "exact"]
    images = Counter(run["images"].get("status", "none") for run in exact)
    routes = Counter(run["route"] for run in exact)
    other = Counter(run["status"] for run in runs if run["status"] not in ("exact", "none"))
    said = "".join(f", {count} {status}" for status, count in other.items())
    return [
        f"{len(exact)} of {len(records)} are exact, {sum(run['cost'] == 'none' for run in exact)} of them free at run "
        f"time; {images['exact']} with an image as well{said}.",
        "",
        "By route: " + ", ".join(f"{name} {count}" for name, count in routes.most_common()) + ".",
    ]


def _outcome(run: dict[str, Any]) -> list[str]:
    if run["route"] is None or run["difference"] is None:
        return ["none" if run["status"] == "none" else run["status"], *["–"] * 4]
    exact = "yes" if run["status"] == "exact" else f"**{run['status']}**"
    return [run["route"], exact, run["cost"], f"{run['difference']:.1e}", f"{run['effect']:.2g}"]


def _image(run: dict[str, Any]) -> str:
    images = run["images"]
    if images.get("difference") is None:
        return "–"
    said = f"{images['difference']:.1e} of {images['effect']:.2g}"
    return said if images["status"] == "exact" else f"**{said}**"


def _first_blocks(records: list[dict[str, Any]]) -> list[str]:
    """Features of an image may be added block by block, so that the first block is another matter."""
    others = [(record, run) for record in records for run in record["runs"][1:]]
    if not others:
        return []
    exact = [run for _record, run in others if run["status"] == "exact"]
    lines = [
        "### The first block",
        "",
        f"It was steered in a build of its own: {len(exact)} of {len(others)} are exact, "
        f"{sum(run['images'].get('status') == 'exact' for run in exact)} with an image as well. Others than above:",
        "",
    ]
    for record, run in others:
        main = record["runs"][0]
        if (run["status"], run["route"]) != (main["status"], main["route"]):
            said = f"{run['route']}, {run['status']}" if run["route"] else _short(run["reason"])
            lines.append(f"- `{record['model_type']}`: {said}")
    return [*lines, ""]


def _why_no_image(records: list[dict[str, Any]]) -> list[str]:
    found: dict[str, list[str]] = {}
    for record in records:
        run = record["runs"][0]
        if run["status"] == "exact" and run["images"].get("status") != "exact":
            why = run["images"].get("why") or "its forward pass takes no pixel values"
            found.setdefault(_short(why), []).append(f"`{record['model_type']}`")
    lines = [f"- {why}: {', '.join(names)}" for why, names in found.items()]
    return ["### Exact, and not run with an image", "", *lines, ""] if lines else []


def _reasons(records: list[dict[str, Any]]) -> list[str]:
    left = [record for record in records if record["runs"][0]["status"] != "exact"]
    lines = [f"- `{record['model_type']}`: {_short(record['runs'][0]['reason'], 600)}" for record in left]
    return ["### Multimodal models that are not steered, and why", "", *lines, ""] if lines else []


def _short(text: str, most: int = 240) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 1].rsplit(" ", 1)[0] + " …"


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"
