"""How much of a recipe's pairs a vector is made of, as types and in words."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Annotated

from pydantic import Field

from patcher.patched.part import Number, Part


class MadeOf(Part):
    """``count`` of the ``of`` pairs (or texts of two lists: ``unit``) that the recipe gives make the vector.

    With `refit` all do, and its effect is that of the vector that ``measured`` of them make: ``cosine`` says how alike
    the two are. ``images`` of those that the final vector is made of have an image.
    """

    count: Annotated[int, Field(ge=0)]
    of: Annotated[int, Field(ge=0)]
    measured: Annotated[int, Field(ge=0)] | None = None
    cosine: Number | None = None
    unit: str = "pairs"
    images: Annotated[int, Field(ge=0)] = 0


def pairs_in_words(made_of: Iterable[tuple[str, MadeOf | None]], measured: Collection[str | None]) -> list[str]:
    """For each vector whose pairs were split: which part of them it is made of, and which part its effect is of.

    And for each whose pairs have images, how many.

    Args:
        made_of: of each edit of a patch, with the name of its vector.
        measured: the vectors whose effect was measured on held-out pairs.
    """
    by_name: dict[str, list[MadeOf]] = {}
    for name, part in made_of:
        if part is not None:
            by_name.setdefault(name, []).append(part)
    said = []
    for name, parts in by_name.items():
        first, evaluated = parts[0], name in measured
        if first.images:
            some = "each of them is" if first.images == first.count else f"{first.images} of {first.count} are"
            said.append(f"`{name}` is made of pairs with images: {some} about one, which both sides share")
        if first.measured is not None:
            cosines = sorted(part.cosine for part in parts if part.cosine is not None)
            span = " to ".join(dict.fromkeys(f"{cosine:.4f}" for cosine in cosines[:1] + cosines[-1:])) or "not known"
            said.append(
                f"`{name}` is made of all {first.of} {first.unit}. "
                + (
                    f"Its effect is that of the vector that {first.measured} of them make, measured on the others "
                    f"(cosine of the two: {span}); what is measured on texts is of the final vector"
                    if evaluated
                    else "No effect was measured on those that were held out first; its cosine with the vector of the "
                    f"other {first.measured} is {span}"
                )
            )
        elif first.count < first.of:
            rest, why = first.of - first.count, "" if evaluated else ", though no effect was measured on them"
            said.append(
                f"`{name}` is made of {first.count} of {first.of} {first.unit}; the other {rest} were held out"
                f"{why or ' to measure its effect'} (`refit: true` makes the final vector of all)"
            )
    return said
