"""The recipe's sections for `method: persona`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from patcher.recipe.types import Strict, finite, not_a_boolean

Prompts = str | Annotated[list[str], Field(min_length=1)]


class Personas(Strict):
    """System prompts for `method: persona`; the first of each side belong together, and so do the second."""

    positive: Prompts
    """What makes the model show the trait: a system prompt, or a list of them."""
    negative: Prompts
    """What makes it show the opposite; as many as on the positive side."""

    @model_validator(mode="after")
    def _in_pairs(self) -> Personas:
        sides = len(self.sides("positive")), len(self.sides("negative"))
        if sides[0] != sides[1]:
            raise ValueError(
                f"{sides[0]} positive and {sides[1]} negative personas: each positive one needs a negative one"
            )
        for positive, negative in self.pairs():
            if positive.strip() == negative.strip():
                raise ValueError("a positive and a negative persona are the same text, so there is no contrast")
        return self

    def sides(self, side: Literal["positive", "negative"]) -> list[str]:
        """The system prompts of one side, as a list."""
        prompts = self.positive if side == "positive" else self.negative
        return [prompts] if isinstance(prompts, str) else prompts

    def pairs(self) -> list[tuple[str, str]]:
        """(positive, negative) system prompts."""
        return list(zip(self.sides("positive"), self.sides("negative"), strict=True))


class GenerateSpec(Strict):
    """How the model writes its responses for `method: persona`; drawn from the model's own distribution."""

    max_new_tokens: Annotated[int, Field(ge=1), BeforeValidator(not_a_boolean)] = 128
    """The longest response, in tokens."""
    temperature: Annotated[float, Field(ge=0), BeforeValidator(not_a_boolean), AfterValidator(finite)] = 1.0
    """0 is greedy. Sampling is seeded (`seed`); a checkpoint's own top-p, top-k and penalties are not used."""
    samples: Annotated[int, Field(ge=1), BeforeValidator(not_a_boolean)] = 1
    """Responses to each question under each persona."""
    batch_size: Annotated[int, Field(ge=1), BeforeValidator(not_a_boolean)] = 16
    """Responses that are written at a time."""

    @model_validator(mode="after")
    def _samples_differ(self) -> GenerateSpec:
        if self.temperature == 0 and self.samples > 1:
            raise ValueError("at `temperature: 0` every sample is the same: set `samples: 1`, or a temperature")
        return self
