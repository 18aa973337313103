"""The report as text: whole, escaped, loading nothing."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image
from support.degenerate_sweeps import DEGENERATE, HOSTILE, hostile, nothing_recommended, weak
from support.sweep_example import sweep

from patcher.report.page.page import render, write_report
from patcher.report.page.remarks import remarks
from patcher.report.pictures.drawing import PICTURES, dark_of

VOID = {"meta", "img", "source", "br", "link", "input", "hr"}
NESTED = {"p": {"p", "div", "table", "ul"}, "button": {"button"}, "a": {"a"}}


class Page(HTMLParser):
    """Tags, attributes, text, scripts and styles of a page; fails on tags that do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.code: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attributes: list) -> None:
        assert not any(tag in NESTED.get(outer, ()) for outer in self.open), (tag, self.open)
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        (self.code if self.open and self.open[-1] in ("script", "style") else self.texts).append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


@pytest.fixture
def pictures(tmp_path: Path) -> dict[str, Path]:
    """Files that stand for drawn pictures, dark ones for all but the first."""
    found = {}
    for place, name in enumerate(PICTURES):
        found[name] = tmp_path / f"{name}.png"
        Image.new("RGB", (40, 20 + place), "white").save(found[name])
        if place:
            Image.new("RGB", (40, 20 + place), "black").save(dark_of(found[name]))
    return found


@pytest.mark.parametrize("name", [*DEGENERATE, "full"])
def test_every_sweep_makes_a_whole_page_that_loads_nothing(name, tmp_path, pictures):
    content = DEGENERATE[name]() if name in DEGENERATE else sweep()
    path = tmp_path / "made" / "report.html"
    write_report(content, pictures, path)
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]
    page = Page(path.read_text(encoding="utf-8"))
    for _, attributes in page.tags:
        for key, value in attributes.items():
            assert key not in ("href", "action", "background", "style", "formaction") and not key.startswith("on")
            if key in ("src", "srcset"):
                assert value.startswith("data:image/png;base64,")
    assert not re.search(
        r"https?://|//[a-z]|url\(|@import|fetch\(|XMLHttp|eval\(|innerHTML",
        re.sub(r"^// .*$", "", "".join(page.code), flags=re.M),
    )
    assert len(page.all("script")) == len(page.all("style")) == len(page.all("h1")) == len(page.all("title")) == 1
    assert "None" not in page.text and "nan" not in page.text.lower().split()
    identities = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(identities) == len(set(identities))


def test_the_policy_lets_only_this_style_and_this_script_run(pictures):
    page = Page(render(sweep(), pictures))
    (policy,) = [tag["content"] for tag in page.all("meta") if tag.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none';") and "unsafe" not in policy and "http" not in policy
    style, script = page.code
    for code, key in ((style, "style-src"), (script, "script-src")):
        digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
        assert f"{key} 'sha256-{digest}'" in policy


def test_pictures_are_inside_with_words_and_a_dark_version(pictures):
    page = Page(render(sweep(), pictures))
    images = page.all("img")
    # The coloured text is written as text.
    assert len(images) == len(PICTURES) - 1
    light = {base64.b64decode(image["src"].split(",")[1]) for image in images}
    assert light == {path.read_bytes() for name, path in pictures.items() if name != "token_changes"}
    assert all(image["width"] == "20" and len(image["alt"]) > 20 for image in images)
    dark = {base64.b64decode(source["srcset"].split(",")[1]) for source in page.all("source")}
    files = [dark_of(path) for name, path in pictures.items() if name != "token_changes"]
    assert dark == {file.read_bytes() for file in files if file.exists()}
    assert len(page.all("source")) == len(images) - 1
    assert all(source["media"] == "screen and (prefers-color-scheme: dark)" for source in page.all("source"))


def test_a_picture_of_an_unknown_name_is_shown_too(pictures):
    text = render(sweep(), {"own": pictures["controls"]})
    assert 'id="picture-own"' in text and "More pictures" in text


def test_what_is_untrusted_is_escaped(pictures):
    text = render(hostile(), pictures)
    page = Page(text)
    assert not any("\u202a" <= character <= "\u202e" or character in "\x00\x1b\x07" for character in text)
    text.encode("utf-8")
    assert "owned" not in "".join(page.code) and not any("onerror" in attributes for _, attributes in page.tags)
    for told in (HOSTILE[0], HOSTILE[1], "{{ 7 * 7 }}", "שלום", "日本語", "\\u202egnirts", "\\ud800 lone", "$\\nosuch"):
        assert told in page.text
    assert "49" not in re.findall(r"effect on (\S+)", page.text)
    assert all(tag["src"].startswith("data:") for tag in page.all("img"))


def test_the_numbers_are_in_sortable_tables():
    content = sweep()
    text = render(content, {})
    page = Page(text)
    tables = {tag["id"]: tag for tag in page.all("table")}
    expected = {"report", "grid", "random", "behaviours", "kl-tokens", "shifted-0", "shifted-1", "generations-0"}
    expected |= {"layers", "cosine", "changes-0", "changes-1", "timings"}
    assert set(tables) == {f"table-{name}" for name in expected}
    assert all(tag["class"] == "sortable" for tag in tables.values())
    assert len(page.all("th")) == len(page.all("button")) and not page.all("svg")
    grid = text[text.index('id="table-grid"') : text.index('id="table-random"')]
    keys = set(re.findall(r'data-key="([^"]+)"', grid))
    for cell in content["grid"]:
        assert {str(cell[key]) for key in ("effect", "damage", "on_topic", "norm")} <= keys
    assert grid.count("<tr") == len(content["grid"]) + 1
    assert grid.count('class="marked"') == 1 and grid.count("recommended") == 1
    here = content["recommended"]
    marked = re.search(r'<tr class="marked">(.*?)</tr>', grid).group(1)
    assert re.findall(r'data-key="([^"]+)"', marked)[:2] == [f"{here['layer']}.0", str(here["coefficient"])]


def test_a_column_without_numbers_is_left_out():
    content = sweep()
    for cell in content["grid"]:
        cell["on_topic"] = None
    assert "on-topic perplexity" in Page(render(sweep(), {})).text
    assert "on-topic perplexity" not in Page(render(content, {})).text


def test_the_summary_says_what_was_found():
    page = Page(render(sweep(), {}))
    start = page.text[: page.text.index("Beside its controls")]
    for told in (
        "Recommended: layer 10, coefficient 4",
        "Qwen/Qwen2.5-0.5B-Instruct : 12 layers and 7 coefficients",
        "84 cells measured",
        "+0.307",
        "0.531 → 0.838; 95 % [+0.245, +0.369]",
        "largest of 5 random vectors of equal norm",
        "within the guard",
        "the cell with the largest effect",
    ):
        assert told in start
    assert "Warning" not in start and remarks(sweep()) == []


def test_warnings_are_plain():
    told = [remark.text for remark in remarks(weak()) if remark.serious]
    assert len(told) == 3
    assert "cannot be told from that of random vectors of equal norm (as much as 0.05)" in told[0]
    assert "interval" in told[1] and "holds 0: [−0.02, +0.04]" in told[1]
    assert (
        "exceeds the guard: KL divergence 1.2 nats a token (guard: KL divergence at most 0.5 nats a token)" in told[2]
    )
    mild = " ".join(remark.text for remark in remarks(weak()) if not remark.serious)
    assert "Coefficient 8 is the strongest of the grid" in mild and "A prompt that asks" in mild
    page = Page(render(weak(), {}))
    assert page.texts.count("Warning:") == 3 and page.texts.count("Note:") == 2


def test_nothing_within_the_guard_is_said():
    (remark,) = remarks(nothing_recommended())
    assert remark.serious and "No cell of the grid is within the guard (KL divergence at most 1e−06" in remark.text
    content = nothing_recommended()
    content["grid"][0]["within_guard"] = True
    (remark,) = remarks(content)
    assert "No cell within the guard has an effect in the expected way" in remark.text
    assert "Nothing is recommended" in Page(render(content, {})).text
    assert remarks({})[0].text == "No cell was measured."


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"effect": -0.2, "low": -0.3, "high": -0.1}, "goes against the expected way"),
        ({"effect": None}, "was not measured on pairs of its own"),
    ],
)
def test_a_recommendation_that_does_not_hold_is_said(change, told):
    content = sweep()
    next(row for row in content["report"] if row["kind"] == "recommended").update(change)
    assert any(remark.serious and told in remark.text for remark in remarks(content))


def test_a_missing_control_is_said():
    content = {**sweep(), "random_control": None}
    assert ["No random vectors" in remark.text for remark in remarks(content)] == [True]


def test_coloured_tokens_carry_their_change():
    content = sweep()
    text = render(content, {})
    spans = re.findall(r'<span(?: class="([^"]*)")? title="([^"]*) nats">([^<]*)</span>', text)
    tokens = [token for entry in content["text_changes"] for token in entry["tokens"]]
    assert len(spans) == len(tokens)
    for (name, title, shown), token in zip(spans, tokens, strict=True):
        assert shown.replace("&#39;", "'") == token["token"].lstrip(" ")
        assert abs(float(title.replace("−", "-")) - token["change"]) < 0.006 * max(1, abs(token["change"]))
        if abs(token["change"]) > 0.5:
            assert name.startswith("more" if token["change"] > 0 else "less") and name.endswith(" u")


def test_a_very_long_text_is_cut_and_says_so():
    tokens = [{"token": " a", "change": 0.1}] * 2000
    page = Page(render({"text_changes": [{"title": "long", "tokens": tokens}]}, {}))
    assert "… and 500 more tokens, in sweep.json" in page.text


def test_an_existing_report_stays_when_writing_fails(tmp_path):
    path = tmp_path / "report.html"
    write_report(sweep(), {}, path)
    before = path.read_bytes()
    with pytest.raises(OSError):
        write_report(sweep(), {"controls": tmp_path / "missing.png"}, path)
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["report.html"]
