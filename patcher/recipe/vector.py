"""The recipe's keys for one steering vector: how it is found, where it is added, and how much of it."""

from __future__ import annotations

import json
from datetime import date
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema, model_validator

from patcher.recipe.pairs import Columns, Pairs
from patcher.recipe.types import (
    Amount,
    Auto,
    Count,
    Index,
    Layer,
    Layers,
    Number,
    PositiveNumber,
    Strict,
    not_a_boolean,
)

_OF_FILES = ("file", "tensor", "row", "feature", "layout")
Prompts = str | Annotated[list[str], Field(min_length=1)]
Texts = str | Annotated[list[str | dict[str, Any] | list[Any]], Field(min_length=2)]

_NO_SWITCHES = frozenset({
    "add_generation_prompt", "chat_template", "continue_final_message", "conversation", "documents", "max_length",
    "messages", "padding", "raise_exception", "return_assistant_tokens_mask", "return_dict", "return_tensors",
    "sanitize_control_tokens", "strftime_now", "tokenize", "tokenizer_kwargs", "tools", "truncation",
})  # fmt: skip
_TRUTHS = frozenset({"true", "false", "yes", "no", "on", "off"})


def _plain_values(value: Any) -> Any:
    """Refuse what no template takes, such as what YAML makes of a day."""
    for name, item in value.items() if isinstance(value, dict) else ():
        if isinstance(item, date):
            raise ValueError(f"`{name}` is a date, and a template takes a text: put it in quotes")
        try:
            json.dumps(item, allow_nan=False)
        except (TypeError, ValueError):
            raise ValueError(
                f"`{name}` must be a text, a number, true, false, null, or a list or mapping of these"
            ) from None
    return value


def _switches(value: dict[str, Any]) -> dict[str, Any]:
    """Refuse what is not the template's own, and texts that a template would take for true."""
    for name, item in value.items():
        if name in _NO_SWITCHES or name.endswith("_token"):
            raise ValueError(f"`{name}` is not a switch of a template: it is set by how prompts are rendered")
        if isinstance(item, str) and item.lower() in _TRUTHS:
            raise ValueError(f"`{name}` is the text {item!r}, which a template takes for true: write it without quotes")
    return value


def _only_a_day(value: Any) -> Any:
    if not isinstance(value, (str, date)):
        raise ValueError("must be a day, such as 2026-11-28")
    return value


Switches = Annotated[dict[str, Any], BeforeValidator(_plain_values), AfterValidator(_switches)]
Day = Annotated[
    date, BeforeValidator(_only_a_day), WithJsonSchema({"type": "string", "pattern": "^[0-9]{4}-[0-9]{2}-[0-9]{2}$"})
]


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

    max_new_tokens: Count = 128
    """The longest response, in tokens."""
    temperature: Amount = 1.0
    """0 is greedy. Sampling is seeded (`seed`); a checkpoint's own top-p, top-k and penalties are not used."""
    samples: Count = 1
    """Responses to each question under each persona."""
    batch_size: Count = 16
    """Responses that are written at a time."""

    @model_validator(mode="after")
    def _samples_differ(self) -> GenerateSpec:
        if self.temperature == 0 and self.samples > 1:
            raise ValueError("at `temperature: 0` every sample is the same: set `samples: 1`, or a temperature")
        return self


class VectorSpec(Strict):
    """One steering vector: how it is found, where it is added, and how much of it."""

    name: str = Field(default="steering", pattern=r"^[A-Za-z0-9][A-Za-z0-9._ -]*$")
    """A name for reports and for `steering.safetensors`."""
    method: Literal["mean_difference", "pca", "persona", "file"] = "mean_difference"
    """`mean_difference` (CAA; over one pair: ActAdd), `pca` of the differences (RepE), `persona` (Persona Vectors:
    mean difference over responses that the model writes under opposite system prompts), or a vector `file`."""
    file: str | None = None
    """For `method: file`: a .safetensors, .pt, .npz, .npy, .gguf (control vector) or .svec file, or the folder of a
    sparse autoencoder or a PEFT adapter."""
    tensor: str | None = None
    """For `method: file`: which tensor of the file, if it holds several. One that is named is taken whatever the file
    says of it."""
    row: Index | Annotated[list[Index], Field(min_length=1)] | None = None
    """For `method: file`: which row of the tensor is the vector; an index for each dimension before the last."""
    feature: Annotated[int, Field(ge=0), BeforeValidator(not_a_boolean)] | None = None
    """For `method: file`: which feature of a sparse autoencoder's decoder is the vector."""
    layout: Literal["blocks", "hidden_states", "columns"] | None = None
    """For `method: file`: what the rows of the tensor are, where their number does not say. `blocks`: row k belongs to
    block k. `hidden_states`: row k is what enters block k. `columns`: with `feature`, each column is a vector."""
    pairs: Pairs | None = None
    """Contrast pairs: a .json, .jsonl, .csv, .tsv or .parquet path, `hf://datasets/owner/name[/config][@split]`, or a
    list."""
    positives: Texts | None = None
    """Instead of pairs, one of two lists without partners, of any lengths: what shows that which the vector should add.
    A .txt (one text a line), .json, .jsonl, .csv, .tsv or .parquet path, `hf://datasets/...`, or a list; an item is a
    text, a conversation (a list of `{role, content}`), or `{prompt, response}`."""
    negatives: Texts | None = None
    """The other list."""
    format: Literal["auto", "ab", "pairs"] = "auto"
    """`ab`: question and answer_(not_)matching_behavior. `pairs`: [prompt], positive, negative; texts are taken as they
    are. `auto` also knows preference data (chosen, rejected), and reads a text of Human and Assistant as turns."""
    columns: Columns | None = None
    """Which column of the data set is which, where they have other names: `{positive: chosen, negative: rejected}`."""
    questions: str | list[str] | None = None
    """For `method: persona`: a .txt (one a line), .json, .jsonl or .csv path, `hf://datasets/...`, or a list."""
    personas: Personas | None = None
    """For `method: persona`: the system prompts under which the model answers every question."""
    generate: GenerateSpec = GenerateSpec()
    """For `method: persona`: how it writes its answers."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """Use a seeded sample of this many pairs, balanced over answer letters; for `method: persona`, of questions."""
    refit: bool = False
    """After the effect was measured on the held-out pairs, make the final vector of all pairs."""
    chat_template: Auto | bool = "auto"
    """`auto`: for pairs with a prompt, where the tokenizer has a template."""
    chat_template_kwargs: Switches | None = None
    """The chat template's own switches, such as `{enable_thinking: false}`, wherever a prompt goes through it."""
    template_date: Day | None = None
    """What a chat template that writes the date takes for today, such as 2026-11-28. By default the day of the build,
    which `steering.json` then holds."""
    system_prompt: str | None = None
    """Put before every prompt (through the chat template where one is used)."""
    add_bos: Auto | bool = "auto"
    """`auto`: what the tokenizer does."""
    align: Literal["auto", "spaces", "none"] = "auto"
    """`spaces`: right-pad the shorter side with space tokens (ActAdd). `auto`: for a single pair without a prompt."""
    position: Literal["auto", "answer", "last", "mean"] | Index = "auto"
    """The token read: the `answer` letter, `last`, the `mean` over the continuation, or an index (-1: the last).
    For `method: persona`, `auto` is the `mean` over the response."""
    layer: Layer | Layers | Auto | None = None
    """The decoder block whose output is steered: a 0-based index, "40%", a list (a vector of its own for each), or
    `auto`: chosen by the sweep."""
    before_layer: Index | Annotated[list[Index], Field(min_length=1)] | None = None
    """The same counted as ActAdd does: the residual that enters this block, so block `before_layer - 1`."""
    read_layer: Layer | None = None
    """Where the vector is read, if not where it is added."""
    coefficient: Number | Auto = 1.0
    """Multiplies the vector; negative turns it round. `auto`: chosen by the sweep."""
    scale: Literal["raw", "unit", "residual"] | PositiveNumber = "raw"
    """`raw`: as found. `unit`: norm 1. `residual`: the mean residual norm at that layer. A number: that norm."""
    center: bool = False
    """For `pca`: subtract the mean difference first, as repeng does (this removes the mean signal)."""

    @property
    def of_lists(self) -> bool:
        """Whether it is made of two lists without partners."""
        return self.positives is not None

    @property
    def swept(self) -> bool:
        """Whether the layer or the coefficient is for the sweep to choose."""
        return "auto" in (self.layer, self.coefficient)

    @property
    def factor(self) -> float:
        """The coefficient as a number; one that the sweep has yet to choose counts as 1."""
        return 1.0 if self.coefficient == "auto" else float(self.coefficient)

    @model_validator(mode="after")
    def _consistent(self) -> VectorSpec:
        for key in _OF_FILES:
            if self.method != "file" and getattr(self, key) is not None:
                raise ValueError(f"`{key}` goes with `method: file`, not with `method: {self.method}`")
        if self.row is not None and (self.feature is not None or self.layout is not None):
            raise ValueError("`row` names the vector: it takes no `feature` or `layout` beside it")
        if self.feature is not None and self.layout not in (None, "columns"):
            raise ValueError(f"`feature` is of a sparse autoencoder, which has no `layout: {self.layout}`")
        if self.layout == "columns" and self.feature is None:
            raise ValueError("`layout: columns` needs `feature`, the number of the column")
        for key in ("questions", "personas", "generate"):
            if self.method != "persona" and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"`{key}` goes with `method: persona`, not with `method: {self.method}`")
        wrong_for_method = {
            "persona": (
                (self.pairs is not None, "takes no `pairs`: the model writes them; give `questions`"),
                (not self.questions, "needs `questions`: a path or a list"),
                (self.personas is None, "needs `personas`: {positive: a system prompt, negative: its opposite}"),
                (self.system_prompt is not None, "takes no `system_prompt`: the `personas` are the system prompts"),
                (
                    self.position not in ("auto", "mean", "last"),
                    f"reads the `mean` over a response or its `last` token, not {self.position!r}",
                ),
            ),
            "file": (
                (self.file is None, "needs `file`"),
                (self.pairs is not None, "takes no `pairs`"),
                (self.read_layer is not None, "takes no `read_layer`"),
                (self.refit, "takes no `refit`: it is not made of pairs"),
            ),
        }
        for wrong, message in wrong_for_method.get(self.method, ()):
            if wrong:
                raise ValueError(f"`method: {self.method}` {message}")
        self._check_lists()
        if self.method not in wrong_for_method and not self.of_lists and self.pairs in (None, []):
            raise ValueError("no contrast pairs: give `pairs` a path or a list")
        if (self.layer is None) == (self.before_layer is None):
            raise ValueError('give exactly one of `layer` (such as 13 or "40%") and `before_layer`')
        if self.columns is not None and not any(isinstance(given, str) for given in self._data):
            key = "`positives` and `negatives`" if self.of_lists else "`pairs`"
            raise ValueError(f"`columns` says what the columns of a data set are: give {key} a path")
        for key in ("chat_template_kwargs", "template_date"):
            if self.chat_template is False and getattr(self, key) is not None:
                raise ValueError(f"`{key}` is for a chat template, and `chat_template: false` uses none")
        if self.coefficient == 0:
            raise ValueError("a coefficient of 0 adds nothing")
        return self

    @property
    def _data(self) -> tuple[object, ...]:
        return (self.positives, self.negatives) if self.of_lists else (self.pairs,)

    def _check_lists(self) -> None:
        given = [key for key in ("positives", "negatives") if getattr(self, key) is not None]
        if not given:
            return
        if len(given) == 1:
            other = "negatives" if given == ["positives"] else "positives"
            raise ValueError(
                f"`{given[0]}` needs `{other}`: the vector is the mean over one list minus that over the other"
            )
        if self.pairs is not None:
            raise ValueError("`pairs`, or `positives` and `negatives`: a vector is made of one of them, not of both")
        if self.method == "pca":
            raise ValueError(
                "`method: pca` takes the differences within pairs, and lists have no partners: leave `method` out for "
                "the mean difference, or give `pairs`"
            )
        wrong = {
            f"`method: {self.method}`": self.method != "mean_difference",
            f"`format: {self.format}`": self.format != "auto",
            f"`align: {self.align}`": self.align == "spaces",
            "`position: answer`": self.position == "answer",
            "`columns: {system: ...}`": self.columns is not None and self.columns.system is not None,
            "`columns: {image: ...}`": self.columns is not None and self.columns.image is not None,
        }
        for key in (key for key, is_wrong in wrong.items() if is_wrong):
            raise ValueError(f"{key} goes with `pairs`, not with `positives` and `negatives`")
