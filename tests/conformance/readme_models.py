"""The README's section about models, from the results of families.py and all_architectures.py.

Somebody who has one model looks for its name: rows are in the order of the alphabet, and families that fare alike share
one.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from architectures_page import GROUPS, group_of
from families_page import FREE, STACKS, by_name, exact_in_all, title_of

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
HEADING = "## For which models\n"
FILES = ("families.json", "architectures.json")
WIDTH = 120
SEEN = {"exact": "yes", "wrong": "no", "refused": "no", "no base": "not known"}
"""What a stack did with the copy, in the table's words; of a base that it does not run, nothing can be known."""

TEXT = """
Ask for yours: `patch-model inspect MODEL`, where MODEL is a Hub id, a folder, or a type such as `qwen3`. It tells
whether a copy is exact, by which route, at what cost, and which stacks read it. Families that people use, in the order
of the alphabet, each run as a tiny random model with the shape of a release:

{table}

*Exact*: log-probabilities are those of a hook, up to rounding. *Multimodal*: released around a vision or audio tower;
the whole is loaded as before, and the language model inside gains the vector. *Not known*: that stack did not run the
base here either. *Not run*: it was not asked. Numbers, routes and reasons are in
[docs/architectures.md](docs/architectures.md).

{counts}

Quantised checkpoints keep their bytes, and an inserted block stays unquantised ([routes](docs/routes.md)).
"""


def section(families: Mapping[str, Any], architectures: Mapping[str, Any]) -> str:
    """The section below its heading.

    Args:
        families: the content of docs/families.json.
        architectures: the content of docs/architectures.json.
    """
    head = ["model", "exact copy", "run-time cost", *STACKS.values()]
    records = [_or_of_its_type(record, architectures) for record in families["families"]]
    rows = [_row(head), _row(["---"] * len(head)), *map(_row, table(records))]
    counts = [*_of_types(architectures), *_of_families(families["families"])]
    return TEXT.format(table="\n".join(rows), counts=textwrap.fill(" ".join(counts), WIDTH))


def with_section(readme: str) -> str:
    """The README with the section as the results in docs/ make it."""
    before, heading, rest = readme.partition(HEADING)
    if not heading:
        raise ValueError(f"the README has no {HEADING.strip()!r}")
    after = rest[rest.index("\n## ") :]
    found = [json.loads((ROOT / "docs" / name).read_text(encoding="utf-8")) for name in FILES]
    return f"{before}{heading}{section(*found)}{after}"


def _or_of_its_type(record: Mapping[str, Any], architectures: Mapping[str, Any]) -> Mapping[str, Any]:
    """Of a family that no run of the stacks is documented of: what transformers did with a tiny one of its type."""
    if record["runs"]:
        return record
    for other in (*architectures["architectures"], *architectures.get("wrappers", ())):
        run = other["runs"][0]
        if other["model_type"] == record["model_type"] and run["status"] == "exact":
            seen = {"transformers": {"outcome": "exact"}}
            return {**record, "runs": [{"asked": "stacks", "cost": run["cost"], "seen": seen}]}
    return record


def table(records: Iterable[Mapping[str, Any]]) -> list[list[str]]:
    """Rows of cells: names that fare alike, and how they do."""
    alike: dict[tuple[str, ...], list[str]] = {}
    for record in records:
        title = f"{title_of(dict(record))}{' *multimodal*' if record.get('wrapper') else ''}"
        alike.setdefault((_brand(str(record["name"])), *_fares(record)), []).append(title)
    rows = sorted(alike.items(), key=lambda item: (item[0][0].casefold(), item[1]))
    return [[", ".join(titles), *cells] for (_brand_name, *cells), titles in rows]


def _brand(name: str) -> str:
    """What the families of one maker begin with: `Qwen2/2.5`, `Qwen3-VL` -> `Qwen`."""
    found = re.match(r"[A-Za-z]+", name)
    return found[0] if found else name


def _fares(record: Mapping[str, Any]) -> tuple[str, ...]:
    runs = {run["asked"]: run for run in record["runs"]}
    if not runs:
        return ("no", "–", *["–"] * len(STACKS))
    first = next(iter(runs.values()))
    cost = _cost(first["cost"])
    if "free" in runs:
        cost += "; none with `prefer: free`"
    cells = []
    for stack in STACKS:
        outcome = SEEN.get(first["seen"].get(stack, {}).get("outcome", ""), "not run")
        wider = runs.get("targets", {}).get("seen", {}).get(stack, {}).get("outcome") == "exact"
        cells.append("with `targets`" if wider and outcome == "no" else outcome)
    return "yes", cost, *cells


def _cost(cost: str) -> str:
    """Without what hangs on the depth of the tiny model: `one more layer in 5 and its KV cache` -> `one more layer`."""
    return "none" if cost == FREE else re.sub(r" in \d+ and (its|their) KV cache$", "", cost)


def _of_types(architectures: Mapping[str, Any]) -> list[str]:
    records = architectures["architectures"]
    counts = Counter(group_of(record["runs"][0]) for record in records)
    exact = counts[GROUPS[0]] + counts[GROUPS[1]]
    free = counts[GROUPS[0]] + sum(group_of(record["free"]) == GROUPS[0] for record in records if record.get("free"))
    wrappers = [record["runs"][0] for record in architectures.get("wrappers", ())]
    of_wrappers = f"Of {len(wrappers)} multimodal ones {sum(run['status'] == 'exact' for run in wrappers)} are exact."
    return [
        f"Every text causal LM of transformers {architectures['versions']['transformers']} was built tiny, patched, "
        f"loaded by the stock class and compared with a hook. Of {len(records)} architectures **{exact} are steered "
        "exactly**,",
        f"{free} of them at no run-time cost ({counts[GROUPS[0]]} by default, the others with `prefer: free`).",
        f"{counts['fitted']} more have the fitted route, and {counts['none']} have none, with the reason.",
        *([of_wrappers] if wrappers else []),
    ]


def _of_families(records: list[dict[str, Any]]) -> list[str]:
    names, free = by_name(records), exact_in_all(records, free=True)
    return [
        f"Of the {len(names)} families above, {len(exact_in_all(records, free=False))} are exact in all three stacks,",
        f"{len(free)} of them at no run-time cost.",
    ]


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"
