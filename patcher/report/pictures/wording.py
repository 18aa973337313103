"""Numbers and untrusted strings as pictures and reports show them. Needs no drawing package."""

from __future__ import annotations

import unicodedata
from typing import Any

from patcher.report.pictures.reading import number

ABSENT = "–"
_MINUS = "\N{MINUS SIGN}"
_SEEN = {" ": "\N{OPEN BOX}", "\n": "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}", "\t": "\N{RIGHTWARDS ARROW TO BAR}"}
# Zero-width joiners make letters in some scripts and emoji; everything else that is invisible can hide text.
_JOINERS = {"\u200c", "\u200d"}
_INVISIBLE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def shown(value: Any, *, digits: int = 3, signed: bool = False, short: bool = False, padded: bool = False) -> str:
    """A number to ``digits`` significant digits.

    Args:
        value: anything; what is not a finite number is shown as a dash.
        digits: significant digits.
        signed: with a plus sign where it is above 0.
        short: without the 0 before the point, for the cells of a heat map.
        padded: with noughts to that many digits.
    """
    found = number(value)
    if found is None:
        return ABSENT
    text = f"{abs(found):{'#' if padded else ''}.{digits}g}".removesuffix(".")
    if "e" in text and abs(found) >= 1:
        text = f"{abs(found):.0f}" if abs(found) < 1e6 else text
    if short and text.startswith("0."):
        text = text[1:]
    sign = _MINUS if found < 0 and float(f"{found:.{digits}g}") != 0 else "+" if signed and found > 0 else ""
    return sign + text.replace("e-", f"e{_MINUS}").replace("e+", "e")


def fixed(value: Any, places: int, *, signed: bool = True, short: bool = False) -> str:
    """A number to ``places`` decimals: values beside each other are read best at one precision."""
    found = number(value)
    if found is None:
        return ABSENT
    text = f"{abs(found):.{places}f}"
    nought = float(text) == 0
    if short and text.startswith("0."):
        text = text[1:]
    return ("" if nought else _MINUS if found < 0 else "+" if signed else "") + text


def interval(low: Any, high: Any) -> str:
    """Both ends with their signs, or nothing where one is absent."""
    if number(low) is None or number(high) is None:
        return ""
    return f"[{shown(low, signed=True)}, {shown(high, signed=True)}]"


def visible(text: Any) -> str:
    """``text`` with every character that is invisible or turns the writing direction written out (``\\u202e``).

    Line feeds and tabs stay. What is returned can be encoded as UTF-8.
    """
    return "".join(
        character
        if character in "\n\t" or character in _JOINERS or unicodedata.category(character) not in _INVISIBLE
        else escaped(character)
        for character in str(text)
    )


def escaped(character: str) -> str:
    """A character by its number, as Python and JSON write it."""
    code = ord(character)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}"


def visible_token(token: Any, longest: int = 24) -> str:
    """A token on one line: leading and trailing blanks and all line feeds are seen, what is too long is cut."""
    text = visible(token)
    body = text.strip(" ")
    lead, trail = (len(text) - len(text.lstrip(" ")), len(text) - len(text.rstrip(" "))) if body else (len(text), 0)
    text = _SEEN[" "] * lead + body + _SEEN[" "] * trail
    text = text.replace("\n", _SEEN["\n"]).replace("\t", _SEEN["\t"])
    return shortened(text, longest) if text else "(empty)"


def shortened(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[: longest - 1].rstrip() + "…"


def cell_name(layer: Any, coefficient: Any) -> str:
    """ "layer 14, coefficient 4"; without the layer where there is no single one."""
    parts = [] if number(layer) is None else [f"layer {number(layer):.0f}"]
    if number(coefficient) is not None:
        parts.append(f"coefficient {shown(coefficient, digits=6)}")
    return ", ".join(parts)
