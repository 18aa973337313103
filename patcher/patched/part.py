"""What the parts of ``steering.json`` have in common."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

Number = Annotated[float, Field(allow_inf_nan=False)]


class Part(BaseModel):
    """A part of the manifest; keys that it does not name are kept."""

    model_config = ConfigDict(extra="allow", strict=True)

    def as_json(self) -> dict[str, Any]:
        """As it was read or made: no key is added."""
        return self.model_dump(mode="json", exclude_unset=True)
