"""The recipe: the schema of the YAML file that describes a build. :mod:`patcher.recipe_file` reads it."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Auto = Literal["auto"]
Stack = Literal["transformers", "vllm", "llama.cpp"]


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError("must be a finite number")
    return value


def _not_a_boolean(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("must be a number, not true or false")
    return value


Number = Annotated[float, BeforeValidator(_not_a_boolean), AfterValidator(_finite)]
PositiveNumber = Annotated[float, Field(gt=0), BeforeValidator(_not_a_boolean), AfterValidator(_finite)]
Index = Annotated[int, BeforeValidator(_not_a_boolean)]
Seed = Annotated[int, Field(ge=0, lt=2**32), BeforeValidator(_not_a_boolean)]
Percentage = Annotated[str, Field(pattern=r"^(100(\.0+)?|[0-9]{1,2}(\.[0-9]+)?)%$", description='depth, e.g. "40%"')]
Layer = Index | Percentage
Layers = Annotated[list[Layer], Field(min_length=1)]
Indices = Annotated[list[Index], Field(min_length=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class InlinePair(_Strict):
    """A contrast pair written in the recipe itself."""

    prompt: str | None = None
    """What both sides continue; without it each side is a whole text."""
    positive: str
    """The text that shows what the vector should add."""
    negative: str
    """Its contrast; may be empty."""


class VectorSpec(_Strict):
    """One steering vector: how it is found, where it is added, and how much of it."""

    name: str = Field(default="steering", pattern=r"^[A-Za-z0-9][A-Za-z0-9._ -]*$")
    """A name for reports and for `steering.safetensors`."""
    method: Literal["mean_difference", "pca", "file"] = "mean_difference"
    """`mean_difference` (CAA; over one pair: ActAdd), `pca` of the differences (RepE), or a vector `file`."""
    file: str | None = None
    """For `method: file`: a .safetensors, .pt or .gguf (control vector) file."""
    tensor: str | None = None
    """For `method: file`: which tensor of the file, if it holds several."""
    pairs: str | list[InlinePair] | None = None
    """Contrast pairs: a .json, .jsonl or .csv path, `hf://datasets/owner/name[/config][@split]`, or a list."""
    format: Literal["auto", "ab", "pairs"] = "auto"
    """`ab`: question and answer_(not_)matching_behavior. `pairs`: [prompt], positive, negative."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """Use a seeded sample of this many pairs, balanced over answer letters."""
    chat_template: Auto | bool = "auto"
    """`auto`: for pairs with a prompt, where the tokenizer has a template."""
    system_prompt: str | None = None
    """Put before every prompt (through the chat template where one is used)."""
    add_bos: Auto | bool = "auto"
    """`auto`: what the tokenizer does."""
    align: Literal["auto", "spaces", "none"] = "auto"
    """`spaces`: right-pad the shorter side with space tokens (ActAdd). `auto`: for a single pair without a prompt."""
    position: Literal["auto", "answer", "last", "mean"] | Index = "auto"
    """The token read: the `answer` letter, `last`, the `mean` over the continuation, or an index (-1: the last)."""
    layer: Layer | Layers | None = None
    """The decoder block whose output is steered: a 0-based index, "40%", or a list (a vector of its own for each)."""
    before_layer: Index | Indices | None = None
    """The same counted as ActAdd does: the residual that enters this block, so block `before_layer - 1`."""
    read_layer: Layer | None = None
    """Where the vector is read, if not where it is added."""
    coefficient: Number = 1.0
    """Multiplies the vector; negative turns it round."""
    scale: Literal["raw", "unit", "residual"] | PositiveNumber = "raw"
    """`raw`: as found. `unit`: norm 1. `residual`: the mean residual norm at that layer. A number: that norm."""
    center: bool = False
    """For `pca`: subtract the mean difference first, as repeng does (this removes the mean signal)."""

    @model_validator(mode="after")
    def _consistent(self) -> VectorSpec:
        if self.method == "file":
            if self.file is None:
                raise ValueError("`method: file` needs `file`")
            if self.pairs is not None:
                raise ValueError("`method: file` takes no `pairs`")
            if self.read_layer is not None:
                raise ValueError("`method: file` takes no `read_layer`")
        else:
            if self.file is not None:
                raise ValueError(f"`file` goes with `method: file`, not with `method: {self.method}`")
            if self.pairs is None or self.pairs == []:
                raise ValueError("no contrast pairs: give `pairs` a path or a list")
        if (self.layer is None) == (self.before_layer is None):
            raise ValueError('give exactly one of `layer` (such as 13 or "40%") and `before_layer`')
        if self.coefficient == 0:
            raise ValueError("a coefficient of 0 adds nothing")
        return self


class EvaluateSpec(_Strict):
    """What is measured on the steered model before it is written."""

    enabled: bool = True
    """Measure the effect on held-out pairs beside its controls."""
    pairs: str | list[InlinePair] | None = None
    """Held-out pairs of their own; by default a seeded split of each vector's pairs."""
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


class VerifySpec(_Strict):
    """How the finished folder is checked against the hook reference."""

    stacks: Literal["installed"] | Annotated[list[Stack], Field(min_length=1)] = ["transformers"]
    """The stock stacks that are run, transformers in any case. `installed`: those of `targets` that are installed."""
    probes: list[str] | None = None
    """Texts to compare on; by default a bundled set that no recipe uses."""
    tolerance: Annotated[float, Field(gt=0, le=1e-3)] = 1e-4
    """Largest allowed difference of a log-probability, fp32; raised to 5x the noise floor, never above 1e-3."""
    long_prompt_limit: Annotated[int, Field(ge=0)] = 4608
    """The longest prompt (tokens) run to get past a sliding window; longer windows are reported as not checked."""
    fit_error: Annotated[float, Field(gt=0, le=1)] = 0.3
    """Of a fitted route: largest mean error of the added vector, relative, on held-out activations."""
    fit_kl: Annotated[float, Field(gt=0, le=1)] = 0.15
    """Of a fitted route: largest KL(hook || fit) as a share of KL(hook || base)."""


class CaptureSpec(_Strict):
    """How activations are read."""

    batch_size: Annotated[int, Field(ge=1)] = 16
    """Prompts per forward pass."""


class CalibrationSpec(_Strict):
    """What a fitted route is fitted on."""

    texts: str | None = None
    """A text file (one passage a paragraph) or .jsonl with `text`; by default a bundled set."""
    tokens: Annotated[int, Field(ge=256)] = 100_000
    """At most this many tokens are used."""


class PushSpec(_Strict):
    """Where the folder is published."""

    repo: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?$")
    """`owner/name` on the Hub."""
    private: bool = False
    """Create the repository as private."""
    revision: str | None = None
    """A branch other than the default one; created if it is not there."""
    pull_request: bool = False
    """Open a pull request instead of committing to the branch."""
    commit_message: str | None = None
    """The commit's title."""


class Recipe(_Strict):
    """A build: model, vectors, and what is asked of the result."""

    model: str = Field(min_length=1)
    """Hub id, id@revision, or a local folder."""
    adapter: str | None = None
    """A PEFT adapter (Hub id or folder), merged before anything else."""
    vectors: list[VectorSpec] = Field(min_length=1)
    """One or more; they add up."""
    targets: Auto | list[Stack] = "auto"
    """`auto`: transformers must be steered. A list is a hard demand."""
    exact: bool = True
    """`false` also allows the fitted `rank_one` route, which is close but not equal to the hook."""
    prefer: Literal["stacks", "free", "same_model_type"] = "stacks"
    """Decides between exact routes: read by most stacks, no run-time cost, or the same model type."""
    route: str = "auto"
    """Force a route by name: native, flag, relabel, parallel, embedding, carrier, rank_one."""
    evaluate: EvaluateSpec = EvaluateSpec()
    verify: VerifySpec = VerifySpec()
    capture: CaptureSpec = CaptureSpec()
    calibration: CalibrationSpec = CalibrationSpec()
    seed: Seed = 0
    """Of the samples, the held-out split and the random vectors."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the capture. `auto`: float32 if the model then fits in half of the memory, else the checkpoint's own."""
    device: str = "auto"
    """Of the capture: `auto`, `cpu`, `cuda`, `cuda:1`, `mps`."""
    trust_remote_code: bool = False
    """Allow code that comes with the model to run."""
    output: str | None = None
    """The folder to write, relative to the working directory. Default: <model>-steered."""
    push: PushSpec | None = None

    @model_validator(mode="after")
    def _distinct_names(self) -> Recipe:
        names = [vector.name for vector in self.vectors]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two vectors are named {name!r}; give each a name of its own")
        return self


def recipe_schema() -> dict[str, Any]:
    """The JSON schema of a recipe, for editors and ``patch-model schema``."""
    schema = Recipe.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "patch-model recipe"
    return schema
