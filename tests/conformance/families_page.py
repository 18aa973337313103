"""The first table of docs/architectures.md, from the results of families.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

STACKS = {"transformers": "transformers", "vllm": "vLLM", "llama.cpp": "llama.cpp"}
FREE = "none"
OWN_ERROR = 5e-4
CELLS = {"refused": "no", "wrong": "**no**", "no base": "base does not run"}

TEXT = """\
## The models that people use

{count} families by the names that people know, each a tiny random model with the shape of a released config: its flags,
its pattern of blocks, its experts, norms and tied weights. The base and its patched copies were run by the stacks
themselves: transformers {transformers}, vLLM {vllm}, and llama.cpp {llama_cpp} after its own converter. A cell is the
largest difference of log-probabilities from the hook, *of* what the hook changes. Where that explains it, the cell also
says how far the stack is from transformers on the *base*. *backend* is vLLM's Transformers backend. Where a stack does
not steer as the hook does, the cell says *no*, and the reasons follow the table. Where the planner's choice costs
something at run time, a second row has what `prefer: free` takes instead. Where not all three read it, another one has
what `targets: [transformers, vllm, llama.cpp]` takes. Multimodal models are whole wrappers, run with texts here: vLLM's
own class for the wrapper, and the text part that llama.cpp's converter takes out. Made by `{command}`.

| families | |
|---|---|
| free and exact in transformers, vLLM and llama.cpp | {free} |
| exact in all three, at any cost | {exact} |
| exact in transformers | {own} |
| without an exact route | {none} |
| multimodal wrappers among them, exact in transformers | {built} of {wrappers} |
| all | {count} |
"""


def family_table(results: dict[str, Any]) -> str:
    """Counts, table, and what does not run in the stacks' own words."""
    records = results["families"]
    wrappers = [record for record in records if record.get("wrapper")]
    versions = {key.replace(".", "_"): version for key, version in results["versions"].items()}
    text = TEXT.format(
        **versions,
        command=results["command"],
        count=len(by_name(records)),
        free=len(exact_in_all(records, free=True)),
        exact=len(exact_in_all(records, free=False)),
        own=len(_names(records, lambda run: _is_exact(run, "transformers"))),
        none=sum(not any(form["runs"] for form in forms) for forms in by_name(records).values()),
        wrappers=len(by_name(wrappers)),
        built=len(_names(wrappers, lambda run: _is_exact(run, "transformers"))),
    )
    head = ["family", "model type", "route", "run-time cost", *STACKS.values()]
    rows = [_row(head), _row(["---"] * len(head))]
    for record in records:
        rows += [_row(cells) for cells in _lines(record)]
    return "\n".join([text, *rows, *_reasons(records)]) + "\n"


def exact_in_all(records: list[dict[str, Any]], *, free: bool) -> list[str]:
    """Names of the families with a copy that all three stacks steered exactly; every form of a family must have one."""
    return _names(
        records, lambda run: all(_is_exact(run, stack) for stack in STACKS) and (run["cost"] == FREE or not free)
    )


def by_name(records: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The forms of each family."""
    found: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        found.setdefault(record["name"], []).append(record)
    return found


def _names(records: list[dict[str, Any]], serves: Callable[[dict[str, Any]], bool]) -> list[str]:
    return [name for name, forms in by_name(records).items() if all(any(map(serves, form["runs"])) for form in forms)]


def _is_exact(run: dict[str, Any], stack: str) -> bool:
    return run["seen"].get(stack, {}).get("outcome") == "exact"


def title_of(record: dict[str, Any]) -> str:
    return f"{record['name']} ({record['form']})" if record["form"] else str(record["name"])


def _lines(record: dict[str, Any]) -> Iterator[list[str]]:
    title, model_type = title_of(record), f"`{record['model_type']}`"
    if not record["runs"]:
        how = "failed" if record.get("failed") else "none"
        yield [title, model_type, how, *["–"] * 4]
    for run in record["runs"]:
        cells = [_cell(record, run, stack) for stack in STACKS]
        first = run is record["runs"][0]
        yield [title if first else "", model_type if first else "", run["route"], run["cost"], *cells]


def _cell(record: dict[str, Any], run: dict[str, Any], stack: str) -> str:
    seen = run["seen"].get(stack)
    if seen is None:
        return "not run"
    if seen["outcome"] == "no base" and record["base"].get(stack, {}).get("runs"):
        return "base differs"
    if seen["outcome"] != "exact":
        return CELLS[seen["outcome"]]
    through = ", backend" if str(seen.get("reader", "")).startswith("Transformers") else ""
    own = record["base"].get(stack, {}).get("own_error") or 0.0
    beside = f" (base: {own:.1e})" if own > OWN_ERROR else ""
    return f"{seen['difference']:.1e} of {seen['effect']:.2g}{beside}{through}"


def _reasons(records: list[dict[str, Any]]) -> list[str]:
    lines = []
    for record in records:
        title = title_of(record)
        if record.get("refused") or record.get("failed"):
            lines.append(f"- {title}: {_plain(record.get('refused') or record['failed'])}")
        told = {stack for stack, base in record["base"].items() if not base["runs"]}
        lines += [
            f"- {title}: {STACKS[stack]} does not run the base: {_own_words(record, stack)}" for stack in sorted(told)
        ]
        for run in record["runs"]:
            for stack, seen in run["seen"].items():
                begin = f"- {title}, {run['route']}: {STACKS[stack]}"
                if seen["outcome"] == "wrong" and seen.get("gain") is not None:
                    lines.append(
                        f"{begin} gains {seen['gain']:.2g} times what the hook adds, and is off by "
                        f"{seen['difference']:.2g} of {seen['effect']:.2g}"
                    )
                elif seen["outcome"] in ("refused", "wrong") or (seen["outcome"] == "no base" and stack not in told):
                    lines.append(f"{begin} does not steer it: {_plain(seen['line'])}")
    return ["", "### What does not run, in each stack's own words", "", *lines] if lines else []


def _own_words(record: dict[str, Any], stack: str) -> str:
    return _plain(record["base"][stack]["line"])


def _plain(text: str) -> str:
    """Words of others in a Markdown line: nothing in them is markup, and no link leads anywhere."""
    return text if "`" in text else f"`{text}`" if text else "nothing said"


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"
