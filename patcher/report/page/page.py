"""The report: one HTML file that loads nothing."""

from __future__ import annotations

import base64
import hashlib
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from patcher.disk.whole_files import whole_file
from patcher.report.page import tables
from patcher.report.page.remarks import guard_text, remarks
from patcher.report.pictures.captions import CAPTIONS, TITLES, alt_text
from patcher.report.pictures.changes import limit_of, step, texts_of, underlined
from patcher.report.pictures.drawing import PICTURES, dark_of
from patcher.report.pictures.reading import measure_name, number, part_of, recommended_cell, report_row, rows_of
from patcher.report.pictures.wording import cell_name, interval, shown, visible
from patcher.report.templates import counted, environment

MOST_TOKENS = 1500
"""Tokens of a text that are shown; the rest is only in sweep.json."""


@dataclass(frozen=True)
class Picture:
    """An image as data URIs, in pixels."""

    name: str
    title: str
    caption: str
    alt: str
    light: str
    dark: str | None
    width: int
    height: int


@dataclass(frozen=True)
class Tile:
    """One figure of the summary."""

    label: str
    value: str
    note: str


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
            cell=None if cell is None else cell_name(*cell),
            swept=_swept(sweep),
            tiles=_tiles(sweep),
            remarks=remarks(sweep),
            pictures=loaded,
            further=[picture for name, picture in loaded.items() if name not in PICTURES],
            tables=tables,
            texts=[_coloured(place, title, tokens, limit_of(texts)) for place, (title, tokens) in enumerate(texts)],
            generations=[
                (entry.get("prompt", ""), _variants(entry), tables.generation_table(place, entry))
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


def _picture(name: str, file: Path, sweep: Mapping[str, Any]) -> Picture:
    content = file.read_bytes()
    width, height = struct.unpack(">II", content[16:24])
    dark = dark_of(file)
    return Picture(
        name,
        TITLES.get(name, name),
        CAPTIONS.get(name, ""),
        alt_text(name, sweep),
        _data_uri(content),
        _data_uri(dark.read_bytes()) if dark.is_file() else None,
        width // 2,
        height // 2,
    )


def _data_uri(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def _swept(sweep: Mapping[str, Any]) -> str:
    """One sentence."""
    layers, coefficients = sweep.get("layers") or [], sweep.get("coefficients") or []
    many = f"{counted(len(layers), 'layer')} and {counted(len(coefficients), 'coefficient')}"
    ends = []
    if layers:
        ends.append(f"layers {min(layers)} to {max(layers)}" if len(layers) > 1 else f"layer {layers[0]}")
    if coefficients:
        low, high = shown(min(coefficients), digits=6), shown(max(coefficients), digits=6)
        ends.append(f"coefficients {low} to {high}" if low != high else f"coefficient {low}")
    cells = counted(len(rows_of(sweep, "grid")), "cell")
    return f"{many} ({', '.join(ends)}), {cells} measured" if ends else f"{cells} measured"


def _tiles(sweep: Mapping[str, Any]) -> list[Tile]:
    """The recommended cell on the pairs kept for the report, and its controls."""
    row, base = report_row(sweep, "recommended"), report_row(sweep, "base") or {}
    if row is None:
        return []
    ends = interval(row.get("low"), row.get("high"))
    before, after = shown(base.get("value")), shown(row.get("value"))
    tiles = [
        Tile(
            f"effect on {measure_name(sweep)}",
            shown(row.get("effect"), signed=True),
            f"{before} → {after}" + (f"; 95 % {ends}" if ends else ""),
        ),
    ]
    control = part_of(sweep, "random_control")
    if number(control.get("largest_effect")) is not None:
        note = f"largest of {counted(int(number(control.get('seeds')) or 0), 'random vector')} of equal norm"
        tiles.append(Tile("random control", shown(control.get("largest_effect"), signed=True), note))
    negative = report_row(sweep, "negative")
    if negative is not None:
        tiles.append(
            Tile("negative coefficient", shown(negative.get("effect"), signed=True), "the same vector, turned")
        )
    prompting = report_row(sweep, "prompting")
    if prompting is not None:
        tiles.append(Tile("prompting", shown(prompting.get("effect"), signed=True), "a system prompt instead"))
    if number(row.get("damage")) is not None:
        told = {True: "within the guard", False: "exceeds the guard"}.get(row.get("within_guard"), "")  # type: ignore[arg-type]
        tiles.append(Tile("KL divergence", shown(row.get("damage")), f"nats a token; {told}".removesuffix("; ")))
    if number(row.get("perplexity")) is not None:
        before = shown(base.get("perplexity"))
        tiles.append(Tile("perplexity", f"{before} → {shown(row.get('perplexity'))}", "on neutral text"))
    return tiles


def _variants(entry: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(str(row.get("name", "")), str(row.get("text", ""))) for row in rows_of(entry, "variants")]


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
