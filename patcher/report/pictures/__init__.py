"""Pictures of a sweep. Importing this needs no matplotlib; drawing does (the extra ``plots``)."""

from patcher.report.pictures.captions import CAPTIONS, TITLES, alt_text
from patcher.report.pictures.drawing import CARD_PICTURES, PICTURES, dark_of, draw_all, draw_card_pictures
from patcher.report.pictures.extra import can_draw, require_plots

__all__ = [
    "CAPTIONS",
    "CARD_PICTURES",
    "PICTURES",
    "TITLES",
    "alt_text",
    "can_draw",
    "dark_of",
    "draw_all",
    "draw_card_pictures",
    "require_plots",
]
