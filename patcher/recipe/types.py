"""The types that the recipe's keys are made of."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

Auto = Literal["auto"]


def finite(value: float) -> float:
    """Refuse infinities and NaN."""
    if not math.isfinite(value):
        raise ValueError("must be a finite number")
    return value


def not_a_boolean(value: Any) -> Any:
    """Refuse `true` and `false`, which pydantic takes for 1 and 0."""
    if isinstance(value, bool):
        raise ValueError("must be a number, not true or false")
    return value


Number = Annotated[float, BeforeValidator(not_a_boolean), AfterValidator(finite)]
PositiveNumber = Annotated[float, Field(gt=0), BeforeValidator(not_a_boolean), AfterValidator(finite)]
Amount = Annotated[float, Field(ge=0), BeforeValidator(not_a_boolean), AfterValidator(finite)]
Count = Annotated[int, Field(ge=1), BeforeValidator(not_a_boolean)]
Index = Annotated[int, BeforeValidator(not_a_boolean)]
Seed = Annotated[int, Field(ge=0, lt=2**32), BeforeValidator(not_a_boolean)]
Percentage = Annotated[str, Field(pattern=r"^(100(\.0+)?|[0-9]{1,2}(\.[0-9]+)?)%$", description='depth, e.g. "40%"')]
Layer = Index | Percentage
Layers = Annotated[list[Layer], Field(min_length=1)]


class Strict(BaseModel):
    """A section of the recipe: unknown keys are refused, and nothing can be changed once it is read."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
