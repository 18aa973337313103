"""The report: one HTML file that loads nothing."""

from __future__ import annotations

import base64
import hashlib
import struct
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from patcher.disk.whole_files import whole_file
from patcher.report.page import tables
from patcher.report.page.remarks import guard_text, remarks
from patcher.report.pictures.captions import CAPTIONS, alt_text
from patcher.report.pictures.changes import limit_of, step, texts_of, underlined
from patcher.report.pictures.drawing import PICTURES, dark_of
from patcher.report.pictures.reading import measure_name, number, part_of, recommended_cell, report_row, rows_of
from patcher.report.pictures.wording import cell_name, interval, shown, visible
from patcher.report.templates import counted, environment

MOST_TOKENS = 1500
"""Tokens of a text that are shown; the rest is only in sweep.json."""


def write_report(sweep: Mapping[str, Any], pictures: Mapping[str, Path], path: Path) -> None:
    """Write a sweep's report as one HTML file without any reference to another file or address.

    Args:
        sweep: the content of sweep.json; what is absent is left out.
        pictures: PNG files by name, from ``draw_all``; where a file's dark version lies beside it, it is shown on dark
            screens. May be empty. The coloured text of ``token_changes`` is written as text instead.
        path: the file; its folder is made where it is missing. It is replaced as a whole.

    Raises:
        OSError: a picture cannot be read or the report not written.
    """
    page = render(sweep, pictures)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as partial:
        partial.write_bytes(page.encode("utf-8", "replace"))


def render(sweep: Mapping[str, Any], pictures: Mapping[str, Path]) -> str:
    """The report as text; see :func:`write_report`."""
    style, script = _part("page.css"), _part("page.js")
    loaded = {name: _picture(name, file, sweep) for name, file in pictures.items() if name != "token_changes"}
    texts = texts_of(sweep)
    cell = recommended_cell(sweep)
    return (
        _environment()
        .get_template("page.html.jinja")
        .render(
            style=Markup(style),
            script=Markup(script),
            policy=_policy(style, script),
            sweep=sweep,
            vector=sweep.get("vector") or "a vector",
            model=sweep.get("model"),
            rule=sweep.get("rule"),
            reason=sweep.get("reason"),
            cell=None if cell is None else cell_name(*cell),
            swept=_swept(sweep),
            tiles=_tiles(sweep),
            remarks=remarks(sweep),
            pictures=loaded,
            further=[picture for name, picture in loaded.items() if name not in PICTURES],
            tables=tables,
            texts=[_coloured(place, title, tokens, limit_of(texts)) for place, (title, tokens) in enumerate(texts)],
            generations=[
                (entry.get("prompt", ""), rows_of(entry, "variants"), tables.generation_table(place, entry))
                for place, entry in enumerate(rows_of(sweep, "generations"))
            ],
            limit=shown(limit_of(texts), digits=2),
            details=_details(sweep),
            notes=[note for note in sweep.get("notes") or [] if note],
        )
    )


def _finalize(value: Any) -> Any:
    """Everything that a template shows passes here: a hidden or a direction-turning character is written out."""
    return value if isinstance(value, Markup) else visible(value)


@lru_cache(maxsize=1)
def _environment() -> Environment:
    return environment(__package__, autoescape=True, finalize=_finalize)


def _part(name: str) -> str:
    return (resources.files(__package__) / name).read_text(encoding="utf-8")


def _policy(style: str, script: str) -> str:
    """Nothing is loaded; only this style and this script are obeyed, whatever a string may smuggle in."""

    def digest(text: str) -> str:
        return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"

    return (
        f"default-src 'none'; img-src data:; style-src {digest(style)}; script-src {digest(script)};"
        " base-uri 'none'; form-action 'none'"
    )


def _picture(name: str, file: Path, sweep: Mapping[str, Any]) -> dict[str, Any]:
    """An image in its words, light and (where there is one) dark as data URIs, and its size in pixels of a card."""
    content = file.read_bytes()
    width, height = struct.unpack(">II", content[16:24])
    dark = dark_of(file)
    return {
        "name": name,
        "caption": CAPTIONS.get(name, ""),
        "alt": alt_text(name, sweep),
        "light": _data_uri(content),
        "dark": _data_uri(dark.read_bytes()) if dark.is_file() else None,
        "width": width // 2,
        "height": height // 2,
    }


def _data_uri(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def _swept(sweep: Mapping[str, Any]) -> str:
    """One sentence."""
    layers, coefficients = sweep.get("layers") or [], sweep.get("coefficients") or []
    ends = [_from_to(noun, found) for noun, found in (("layer", layers), ("coefficient", coefficients)) if found]
    cells = f"{counted(len(rows_of(sweep, 'grid')), 'cell')} measured"
    many = f"{counted(len(layers), 'layer')} and {counted(len(coefficients), 'coefficient')}"
    return f"{many} ({', '.join(ends)}), {cells}" if ends else cells


def _from_to(noun: str, values: Sequence[float]) -> str:
    low, high = shown(min(values), digits=6), shown(max(values), digits=6)
    return f"{noun}s {low} to {high}" if low != high else f"{noun} {low}"


def _tiles(sweep: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(label, value, note) of the recommended cell on the pairs kept for the report, and of its controls."""
    row, base = report_row(sweep, "recommended"), report_row(sweep, "base") or {}
    if row is None:
        return []
    ends = interval(row.get("low"), row.get("high"))
    note = f"{shown(base.get('value'))} → {shown(row.get('value'))}" + (f"; 95 % {ends}" if ends else "")
    tiles = [(f"effect on {measure_name(sweep)}", shown(row.get("effect"), signed=True), note)]
    control = part_of(sweep, "random_control")
    if control.get("largest_effect") is not None:
        note = f"largest of {counted(control.get('seeds', 0), 'random vector')} of equal norm"
        tiles.append(("random control", shown(control["largest_effect"], signed=True), note))
    for kind, label, note in (
        ("negative", "negative coefficient", "the same vector, turned"),
        ("prompting", "prompting", "a system prompt instead"),
    ):
        beside = report_row(sweep, kind)
        if beside is not None:
            tiles.append((label, shown(beside.get("effect"), signed=True), note))
    if row.get("damage") is not None:
        told = {True: "; within the guard", False: "; exceeds the guard"}.get(row.get("within_guard"), "")  # type: ignore[arg-type]
        tiles.append(("KL divergence", shown(row["damage"]), f"nats a token{told}"))
    if row.get("perplexity") is not None:
        tiles.append(("perplexity", f"{shown(base.get('perplexity'))} → {shown(row['perplexity'])}", "on neutral text"))
    return tiles


def _coloured(place: int, title: str, tokens: Sequence[tuple[str, float | None]], limit: float) -> dict[str, Any]:
    """A text as spans: class (more1 ... more8, less1 ... less8, with u where underlined), blank, text, exact change."""
    spans = []
    for token, change in tokens[:MOST_TOKENS]:
        strength = step(change, limit)
        name = f"{'more' if strength > 0 else 'less'}{abs(strength)}" if strength else ""
        # A blank before a word has no colour, or the end of a line would.
        body = token.lstrip(" ") or token
        blank = token[: len(token) - len(body)]
        spans.append((f"{name} u" if underlined(strength) else name, blank, body, shown(change, signed=True)))
    return {
        "title": title,
        "spans": spans,
        "left": max(0, len(tokens) - MOST_TOKENS),
        "table": tables.changes_table(place, tokens[:MOST_TOKENS]),
    }


def _details(sweep: Mapping[str, Any]) -> list[tuple[str, str]]:
    splits, guard = part_of(sweep, "splits"), part_of(sweep, "guard")
    told = [f"{splits[key]} to {key}" for key in ("make", "choose", "report") if splits.get(key) is not None]
    sign = number(sweep.get("expected_sign"))
    found = [
        ("model", sweep.get("model")),
        ("architecture", sweep.get("architecture")),
        ("decoder blocks", sweep.get("blocks")),
        ("vector", sweep.get("vector")),
        ("method", sweep.get("method")),
        ("scale", sweep.get("scale")),
        ("measure", measure_name(sweep) if sweep.get("measure") else None),
        ("expected way", None if sign is None else "more of it" if sign > 0 else "less of it"),
        ("contrast pairs", ", ".join(told)),
        ("rule", sweep.get("rule")),
        ("guard", guard_text(sweep) if guard else None),
        ("guard's text", guard.get("text")),
        ("seed", sweep.get("seed")),
        ("patch-model", sweep.get("tool_version")),
    ]
    return [(name, str(value)) for name, value in found if value not in (None, "")]
