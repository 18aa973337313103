"""Sweeps that are small, empty in places, weak or hostile."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

from support.sweep_example import sweep


def one_cell() -> dict[str, Any]:
    """One layer and one coefficient."""
    content = sweep()
    layer, coefficient = content["recommended"]["layer"], content["recommended"]["coefficient"]
    for key in ("grid", "random_grid"):
        content[key] = [cell for cell in content[key] if (cell["layer"], cell["coefficient"]) == (layer, coefficient)]
    content["layers"], content["coefficients"] = [layer], [coefficient]
    content["pareto"] = [dict(content["recommended"])]
    geometry = content["geometry"]
    place = geometry["layers"].index(layer)
    geometry.update(
        layers=[layer],
        separation=[geometry["separation"][place]],
        cosine=[[1.0]],
        pca={str(layer): geometry["pca"][str(layer)]},
    )
    return content


def nothing_recommended() -> dict[str, Any]:
    """Every cell exceeds the guard."""
    content = sweep()
    content["recommended"] = None
    content["guard"]["limit"] = 1e-6
    for cell in content["grid"]:
        cell["within_guard"] = False
    content["report"] = [entry for entry in content["report"] if entry["kind"] in ("base", "default")]
    content["random_grid"], content["kl_tokens"], content["shifted"], content["text_changes"] = [], [], [], []
    content["random_control"] = {"seeds": 0, "largest_effect": None, "mean": None, "distinguishable": None}
    return content


def weak() -> dict[str, Any]:
    """A vector that does no more than random ones, recommended at the edge of the grid, and over the guard."""
    content = sweep()
    content["recommended"] = {"layer": 10, "coefficient": 8.0}
    for entry in content["report"]:
        if entry["kind"] == "recommended":
            entry.update(
                value=0.54,
                effect=0.009,
                low=-0.02,
                high=0.04,
                damage=1.2,
                within_guard=False,
                coefficient=8.0,
                layer=10,
            )
    content["random_control"].update(distinguishable=False, largest_effect=0.05)
    return content


def with_nulls() -> dict[str, Any]:
    """Every number that may be null is, here and there; whole parts are missing."""
    content = sweep()
    for place, cell in enumerate(content["grid"]):
        cell["on_topic"] = cell["off_topic"] = None
        if place % 3 == 0:
            cell["damage"] = cell["perplexity"] = cell["effect_low"] = cell["effect_high"] = None
        if place % 7 == 0:
            cell["effect"] = None
    content["grid"] = content["grid"][:-5]
    content["baseline"] = {"steered": None, "perplexity": None, "on_topic": None, "off_topic": None}
    content["guard"]["limit"] = None
    for key in ("random_grid", "pareto", "report", "shifted", "text_changes", "kl_tokens", "behaviours"):
        content[key] = []
    content["random_control"] = None
    content["geometry"] = {"layers": [], "separation": [], "pca": {}, "cosine": []}
    content["generations"] = []
    content["timings"] = {}
    return content


HOSTILE = [
    "</script><script>document.title='owned'</script>",
    '"><img src=x onerror="document.title=1">',
    "$\\nosuch{1}$ and $100 and $",
    "{{ 7 * 7 }}{% for x in y %}",
    "‮gnirts desrever",
    "שלום עולם",
    "مرحبا بالعالم",
    "👩‍👩‍👧‍👦🎉",
    "日本語のトークン",
    "\x00\x1b[31mred\x07",
    "\ud800 lone surrogate",
    "https://example.com/" + "x" * 400,
    "\n\n\n",
    "",
    "   ",
]


def hostile() -> dict[str, Any]:
    """Every string that comes from a model, a recipe or a text is unfriendly."""
    content = sweep()
    content["model"] = HOSTILE[0] + "/" + "very-long-name-" * 40
    content["vector"], content["method"], content["measure"] = HOSTILE[1], HOSTILE[2], HOSTILE[3]
    content["architecture"], content["rule"] = HOSTILE[4], HOSTILE[0] * 3
    content["notes"] = list(HOSTILE)
    content["guard"]["text"] = HOSTILE[1]
    content["guard"]["unit"] = HOSTILE[2]
    for entry, text in zip(content["report"], HOSTILE, strict=False):
        entry["name"] = text
    content["behaviours"] = [{"name": text, "pairs": 1, "base": 0.1, "steered": 0.2} for text in HOSTILE]
    content["shifted"] = [
        {
            "prompt": HOSTILE[0] + " " + "word " * 60,
            "tokens": [
                {"token": text, "base": 0.01, "steered": 0.01 * (place + 1), "log_ratio": math.log(place + 1)}
                for place, text in enumerate(HOSTILE)
            ],
        }
    ]
    content["kl_tokens"] = [{"token": text, "contribution": 0.1, "base": 0.01, "steered": 0.02} for text in HOSTILE]
    content["text_changes"] = [
        {"title": text, "tokens": [{"token": token, "change": 0.1 * place} for place, token in enumerate(HOSTILE)]}
        for text in HOSTILE[:3]
    ]
    content["generations"] = [
        {
            "prompt": text,
            "variants": [
                {
                    "name": name,
                    "text": text * 3,
                    "distinct_1": 1.0,
                    "distinct_2": 1.0,
                    "repetition": 0.0,
                    "words": {text: 1},
                }
                for name in ("base", "steered")
            ],
        }
        for text in HOSTILE
    ]
    content["timings"] = {HOSTILE[0]: 1.0, "total": 2.0}
    return content


def build() -> dict[str, Any]:
    """What a build without a sweep has: a few coefficients of all its vectors together, and shifted tokens."""
    content = sweep()
    kept = ("measure", "guard", "baseline", "shifted")
    cells = copy.deepcopy([cell for cell in content["grid"] if cell["layer"] == 10])
    for cell in cells:
        cell["layer"] = None
    randoms = [{**cell, "layer": None} for cell in content["random_grid"]]
    return {
        **{key: content[key] for key in kept},
        "grid": cells,
        "random_grid": randoms,
        "recommended": {"layer": None, "coefficient": 4.0},
    }


DEGENERATE: dict[str, Callable[[], dict[str, Any]]] = {
    "one cell": one_cell,
    "nothing recommended": nothing_recommended,
    "weak": weak,
    "nulls": with_nulls,
    "hostile": hostile,
    "build": build,
    "empty": dict,
}
