"""Untrusted strings in pictures: only characters that a font at hand has, the others by their numbers."""

from __future__ import annotations

from functools import lru_cache

from matplotlib import font_manager

from patcher.report.pictures.wording import escaped, shortened, visible

_MONO = "DejaVu Sans Mono"
_SANS = "DejaVu Sans"


@lru_cache(maxsize=2)
def _characters(family: str) -> frozenset[int]:
    path = font_manager.findfont(family)
    return frozenset(font_manager.get_font(path).get_charmap())


def printable(text: object, *, longest: int = 40, mono: bool = False) -> str:
    """``text``, at most ``longest`` characters, in which what the font lacks is written out (``\\u6771``).

    matplotlib brings DejaVu Sans, which has the Latin, Greek, Cyrillic, Arabic and (not in the monospaced one) Hebrew
    scripts, but no Chinese, Japanese or Korean one and few emoji. The report, which a browser draws, shows these as
    they are.
    """
    has = _characters(_MONO if mono else _SANS)
    drawn = "".join(
        character if character == "\n" or ord(character) in has else escaped(character) for character in visible(text)
    )
    return shortened(drawn, longest)
