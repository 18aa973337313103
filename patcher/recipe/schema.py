"""The recipe: the schema of the YAML file that describes a build. :mod:`patcher.recipe.file` reads it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from patcher.recipe.evaluate import EvaluateSpec, InlinePair, SweepSpec
from patcher.recipe.types import Amount, Auto, Count, Index, Layer, Layers, Number, PositiveNumber, Seed, Strict
from patcher.stacks.names import TRANSFORMERS, Stack

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
    """For `method: file`: a .safetensors, .pt or .gguf (control vector) file."""
    tensor: str | None = None
    """For `method: file`: which tensor of the file, if it holds several."""
    pairs: str | list[InlinePair] | None = None
    """Contrast pairs: a .json, .jsonl or .csv path, `hf://datasets/owner/name[/config][@split]`, or a list."""
    format: Literal["auto", "ab", "pairs"] = "auto"
    """`ab`: question and answer_(not_)matching_behavior. `pairs`: [prompt], positive, negative."""
    questions: str | list[str] | None = None
    """For `method: persona`: a .txt (one a line), .json, .jsonl or .csv path, `hf://datasets/...`, or a list."""
    personas: Personas | None = None
    """For `method: persona`: the system prompts under which the model answers every question."""
    generate: GenerateSpec = GenerateSpec()
    """For `method: persona`: how it writes its answers."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """Use a seeded sample of this many pairs, balanced over answer letters; for `method: persona`, of questions."""
    chat_template: Auto | bool = "auto"
    """`auto`: for pairs with a prompt, where the tokenizer has a template."""
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
    def swept(self) -> bool:
        """Whether the layer or the coefficient is for the sweep to choose."""
        return "auto" in (self.layer, self.coefficient)

    @property
    def factor(self) -> float:
        """The coefficient as a number; one that the sweep has yet to choose counts as 1."""
        return 1.0 if self.coefficient == "auto" else float(self.coefficient)

    @model_validator(mode="after")
    def _consistent(self) -> VectorSpec:
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
            ),
        }
        for wrong, message in wrong_for_method.get(self.method, ()):
            if wrong:
                raise ValueError(f"`method: {self.method}` {message}")
        if self.method != "file" and self.file is not None:
            raise ValueError(f"`file` goes with `method: file`, not with `method: {self.method}`")
        if self.method not in wrong_for_method and self.pairs in (None, []):
            raise ValueError("no contrast pairs: give `pairs` a path or a list")
        if (self.layer is None) == (self.before_layer is None):
            raise ValueError('give exactly one of `layer` (such as 13 or "40%") and `before_layer`')
        if self.coefficient == 0:
            raise ValueError("a coefficient of 0 adds nothing")
        return self


class VerifySpec(Strict):
    """How the finished folder is checked against the hook reference."""

    stacks: Literal["installed"] | Annotated[list[Stack], Field(min_length=1)] = Field(default=[TRANSFORMERS])
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


def _no_pipeline(value: Any) -> Any:
    if isinstance(value, str) and value in ("pp", "pipeline"):
        raise ValueError(
            "with pipeline parallelism blocks of another process read wrong values; "
            "`fsdp` needs as little memory, and `tp` is the other way to share a block out"
        )
    return value


class CaptureSpec(Strict):
    """How activations are read."""

    mode: Literal["auto", "memory", "stream"] = "auto"
    """`memory`: the model is loaded. `stream`: block after block is read from the disk, for models larger than memory.
    Of a Hub model, the shards after the last block that is read are downloaded only once the vectors are found.
    `auto`: streamed where the weights do not fit in the free memory."""
    batch_size: Auto | Annotated[int, Field(ge=1)] = "auto"
    """Rows per forward pass. `auto`: as many as are fast on the device and fit in its memory."""
    parallel: Annotated[Literal["auto", "fsdp", "tp", "replicate"], BeforeValidator(_no_pipeline)] = "auto"
    """Under torchrun: `fsdp` (a part of each block kept in each process), `tp` (a part computed in each), `replicate`
    (all of it in each). `auto`: fsdp, or of a quantised base replicate."""

    @property
    def rows(self) -> int | None:
        """The `batch_size` that was set, or None."""
        return None if self.batch_size == "auto" else self.batch_size


class CalibrationSpec(Strict):
    """What a fitted route is fitted on."""

    texts: str | None = None
    """A text file (one passage a paragraph) or .jsonl with `text`; by default a bundled set."""
    tokens: Annotated[int, Field(ge=256)] = 100_000
    """At most this many tokens are used."""


class PushSpec(Strict):
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


class Recipe(Strict):
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
    sweep: SweepSpec = SweepSpec()
    """How `patch-model sweep`, or `auto` in a vector, chooses a layer and a coefficient."""
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
    """The folder to write, relative to the working directory. Default: <model>-steered. `null` together with `push`:
    no folder here, the copy is made on the Hub, and of the base only what is needed is downloaded."""
    push: PushSpec | None = None

    @property
    def model_name(self) -> str:
        """The model's name without its owner, folder or revision, as the names of outputs begin."""
        return self.model.partition("@")[0].rstrip("/").rpartition("/")[2] or "model"

    @model_validator(mode="after")
    def _distinct_names(self) -> Recipe:
        names = [vector.name for vector in self.vectors]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two vectors are named {name!r}; give each a name of its own")
        if sum(vector.swept for vector in self.vectors) > 1:
            raise ValueError("only one vector can have `auto`: a sweep chooses one layer and one coefficient")
        if self.sweep.vector is not None and self.sweep.vector not in names:
            raise ValueError(f"`sweep.vector`: no vector is named {self.sweep.vector!r}")
        automatic = [vector.name for vector in self.vectors if vector.swept and vector.name != self.sweep.vector]
        if self.sweep.vector is not None and automatic:
            raise ValueError(f"`sweep.vector` names {self.sweep.vector!r}, but {automatic[0]!r} is the one with `auto`")
        return self


def recipe_schema() -> dict[str, Any]:
    """The JSON schema of a recipe, for editors and ``patch-model schema``."""
    schema = Recipe.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "patch-model recipe"
    return schema
