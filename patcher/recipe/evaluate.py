"""The recipe's keys for what is measured, and for the search of a layer and a coefficient."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from patcher.recipe.pairs import Columns, Pairs
from patcher.recipe.types import Auto, Layers, Number, PositiveNumber, Strict


class GuardSpec(Strict):
    """The most damage that is accepted."""

    kl: PositiveNumber | None = 0.5
    """KL divergence of the next-token distributions on neutral text, nats a token. `null`: none."""
    perplexity: PositiveNumber | None = None
    """Perplexity on neutral text, as a multiple of the base's. `null`: none."""


class EvaluateSpec(Strict):
    """What is measured on the steered model before it is written."""

    enabled: bool = True
    """Measure the effect on held-out pairs beside its controls."""
    budget: PositiveNumber | Literal["full"] = 1.0
    """What measuring may cost, in multiples of what reading the activations costs (counted in tokens that pass through
    all blocks, 2,000 at least); what does not fit is measured on less, and said. `full`: everything is measured."""
    pairs: Pairs | None = None
    """Held-out pairs of their own; by default a seeded split of each vector's pairs."""
    format: Literal["auto", "ab", "pairs"] = "auto"
    """Of these `pairs`, as a vector's `format`."""
    columns: Columns | None = None
    """Of these `pairs`, as a vector's `columns`."""
    held_out: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """The share of the pairs that is kept out of the vector."""
    limit: Annotated[int, Field(ge=1)] = 50
    """At most this many held-out pairs are measured."""
    random_vectors: Annotated[int, Field(ge=1, le=100)] = 3
    """How many random vectors of equal norm stand beside the effect."""
    on_topic: str | None = None
    """A text file, one passage a line or paragraph: perplexity where the vector should help."""
    off_topic: str | None = None
    """A text file: perplexity where the vector should do nothing."""
    neutral: str | None = None
    """A text file, one passage a line: what the vector should leave alone. By default a bundled set."""
    neutral_limit: Annotated[int, Field(ge=1)] = 40
    """At most this many neutral passages are used."""
    guard: GuardSpec = GuardSpec()
    """How much damage is too much: warned about in a build, refused with `--strict`, never chosen by a sweep."""
    system_prompt: str | None = None
    """A system prompt that asks for the behaviour: prompting alone, and with steering, stand beside the effect."""
    prompts: list[str] = Field(default=[])
    """Prompts to show completions of, base and steered."""
    generate_tokens: Annotated[int, Field(ge=0, le=2048)] = 40
    """The length of these completions; 0: none."""
    pictures: bool = True
    """Draw the effect for the card, where the extra `plots` is installed."""
    topic_words: list[str] = Field(default=[])
    """Words that are counted in the completions."""
    scorer: str | None = None
    """A function of your own that scores completions: an entry point of `patch_model.scorers`, or `module:function`."""
    lm_eval: list[str] = Field(default=[])
    """Tasks of lm-eval (extra `lm-eval`), such as `truthfulqa_mc1`, run on the base and on the finished folder."""
    lm_eval_folder: str | None = None
    """A folder with lm-eval task files of your own."""
    lm_eval_limit: Annotated[int, Field(ge=1)] | None = None
    """At most this many questions of each lm-eval task."""

    @model_validator(mode="after")
    def _of_pairs(self) -> EvaluateSpec:
        if self.columns is not None and not isinstance(self.pairs, str):
            raise ValueError("`columns` says what the columns of a data set are: give `pairs` a path")
        if self.format != "auto" and self.pairs is None:
            raise ValueError("`format` is that of `evaluate.pairs`, which are not given")
        return self


class SweepSpec(Strict):
    """How a layer and a coefficient are chosen: `patch-model sweep`, or `auto` in a vector."""

    vector: str | None = None
    """The name of the vector that is swept; by default the one with `auto`, else the first. Others stay as they are."""
    layers: Auto | Layers = "auto"
    """Decoder blocks to try. `auto`: the vector's own `layer`, or with `auto` there twelve, evenly spread."""
    coefficients: Auto | Annotated[list[Number], Field(min_length=1)] = "auto"
    """Coefficients to try. `auto`: seven, up to the mean residual norm of the model, and up to two more between the
    best one and the guard; two are of the other sign than the vector's own, and are never recommended."""
    search: Literal["auto", "grid", "halving"] = "auto"
    """`grid`: every cell on all choosing pairs. `halving`: all on a few, the best third of them on more (successive
    halving). `auto`: halving above 150 cells."""
    choose: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """The share of the pairs that the cell is chosen on; `evaluate.held_out` is the share that is reported."""
    limit: Annotated[int, Field(ge=2)] = 50
    """At most this many pairs are chosen on."""
    random_vectors: Annotated[int, Field(ge=1, le=100)] = 5
    """How many random vectors of equal norm the chosen cell must do more than."""

    @model_validator(mode="after")
    def _no_zero(self) -> SweepSpec:
        if isinstance(self.coefficients, list):
            if 0 in self.coefficients:
                raise ValueError("`coefficients`: 0 adds nothing; the base is measured in any case")
            if len(set(self.coefficients)) < len(self.coefficients):
                raise ValueError("`coefficients`: one is named twice")
        return self
