"""The families of models that people use: a tiny base of each, shaped as its release, and its patched copies."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from support.stack_models import GREEDY_TOKENS, LENGTHS, complete_config, continued, sentencepiece_model
from support.stock_loading import log_probs, stock_model
from support.tiny_models import TEXTS, VOCABULARY, parsed_config, randomise, released_config, tiny_tokenizer
from support.tiny_patch import (
    AMPLIFICATIONS,
    REPORTED,
    RESIDUAL_SHARE,
    ROUNDING,
    hooks,
    largest,
    planned,
    residual_norms,
)
from support.tiny_wrappers import wrapper_checkpoint
from support.writing import write_steered
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM

from patcher.architectures.model_class import quiet_transformers
from patcher.checkpoint.folder import CheckpointFolder
from patcher.routes.plan import Plan
from patcher.verify.stack_comparison import Expected
from patcher.verify.stack_jobs import StackJob

TABLE = Path(__file__).with_name("families.json")
SIZES: dict[str, Any] = {
    "hidden_size": 128, "num_hidden_layers": 5, "vocab_size": VOCABULARY, "max_position_embeddings": 512,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.06, "torch_dtype": "float32",
}  # fmt: skip
"""Of every tiny base, where its row does not say otherwise. Weights are wide enough that every block counts."""
ASKED_TOKENS = ("<|endoftext|>", "<|user|>", "[gMASK]", "<|observation|>", "<|startoftext|>", "<unk>")
"""Special tokens of releases that llama.cpp's converter looks up by their names."""
NEWLINES = ("\n", "\n\n", "\n\n\n", "\n\n\n\n")
"""Tokens of Gemma 3 that vLLM's processor looks up."""
LEAST_EFFECT = 0.25


@dataclass(frozen=True)
class Family:
    """A row of the table.

    Attributes:
        name: as people call it.
        form: which of several forms of it; empty where there is one.
        release: the released checkpoint whose shape the tiny base has.
        layer: the block that is steered, about 40 % of the way.
        config: its config.json with small sizes; empty where ``fixture`` has it.
        fixture, sizes: a released config of the tests, and the sizes that make it small.
        wrapper: of one that is released inside a multimodal class, its name in wrappers.json (or the type).
        tokenizer: ``tokenizer.model`` for one of SentencePiece's, as llama.cpp's converter wants it for some; or the
            class that its tokenizer_config.json names.
    """

    name: str
    model_type: str
    release: str
    layer: int = 2
    form: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    fixture: str = ""
    sizes: Mapping[str, Any] = field(default_factory=dict)
    wrapper: str = ""
    tokenizer: str = ""

    @property
    def key(self) -> str:
        """A file name."""
        return "-".join(f"{self.name} {self.form}".replace("/", " ").replace("(", "").replace(")", "").lower().split())

    @property
    def title(self) -> str:
        return f"{self.name} ({self.form})" if self.form else self.name

    def raw(self) -> dict[str, Any]:
        """The tiny base's config.json, in the release's spelling."""
        released = {**released_config(self.fixture), **SIZES} if self.fixture else dict(SIZES)
        found = {"model_type": self.model_type, **released, **self.sizes, **self.config}
        left_out = {"auto_map", *(("quantization_config",) if found.get("quantization_config") is None else ())}
        return {key: value for key, value in found.items() if key not in left_out}


@cache
def families() -> tuple[Family, ...]:
    return tuple(Family(**row) for row in json.loads(TABLE.read_text(encoding="utf-8")))


def family_base(family: Family, folder: Path) -> str | None:
    """Save the tiny random base; what enters its first block has a root mean square of 1, as in trained models.

    Returns:
        Why the stock class of a multimodal wrapper cannot run it, if it cannot.
    """
    if family.wrapper:
        return _wrapper_base(family, folder)
    raw = family.raw()
    config = parsed_config(raw, folder.parent / f"{folder.name}-config")
    torch.manual_seed(0)
    with quiet_transformers():
        model = AutoModelForCausalLM.from_config(config).float().eval()
        randomise(model, 0)
        _scale_embedding(model)
        model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(raw, indent=1), encoding="utf-8")
    tokenizer = tiny_tokenizer()
    # Not as a list of its own: an older transformers reads such a key otherwise.
    tokenizer.add_tokens([AddedToken(text, special=True) for text in ASKED_TOKENS], special_tokens=True)
    tokenizer.save_pretrained(folder)
    if family.tokenizer == "tokenizer.model":
        (folder / "tokenizer.model").write_bytes(sentencepiece_model())
    complete_config(folder)
    path = folder / "tokenizer_config.json"
    keys = {**json.loads(path.read_text(encoding="utf-8")), "add_bos_token": True}
    if family.tokenizer.endswith("Tokenizer"):
        keys["tokenizer_class"] = family.tokenizer
    path.write_text(json.dumps(keys), encoding="utf-8")
    return None


def _wrapper_base(family: Family, folder: Path) -> str | None:
    """The same of a family that is released inside a multimodal class, with its processor's files."""
    try:
        wrapper_checkpoint(folder, family.wrapper, **family.sizes)
    except ImportError as error:
        return f"the stock class needs a package that is not here: {str(error).strip().splitlines()[0]}"
    raw = (folder / "config.json").read_bytes()
    model, _report = stock_model(folder)
    try:
        _scale_embedding(model)
    except Exception as error:
        # Some classes of a library's release are broken.
        return f"the stock class does not run: {type(error).__name__}: {error}"
    with quiet_transformers():
        model.save_pretrained(folder)
    (folder / "config.json").write_bytes(raw)
    if family.wrapper == "gemma3":
        _rename(folder / "model.safetensors", r"vision_tower\.(?!vision_model)", "vision_tower.vision_model.")
    if family.tokenizer == "tokenizer.model":
        (folder / "tokenizer.model").write_bytes(sentencepiece_model())
    complete_config(folder)
    path = folder / "tokenizer_config.json"
    keys = {**json.loads(path.read_text(encoding="utf-8")), "add_bos_token": True}
    if isinstance(keys.get("extra_special_tokens"), list):
        del keys["extra_special_tokens"]
    path.write_text(json.dumps(keys), encoding="utf-8")
    # Tokens that have no text of their own take the names that llama.cpp's converter and vLLM's processors look up.
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    free = [token for token in content["added_tokens"] if token["content"].startswith("<unused")]
    for token, name in zip(free, (*ASKED_TOKENS, *NEWLINES), strict=False):
        token["content"], token["special"] = name, name in ASKED_TOKENS
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return None


def _rename(path: Path, pattern: str, name: str) -> None:
    """Tensors as the release names them, where the installed library saves them otherwise."""
    tensors = {re.sub(pattern, name, old): tensor for old, tensor in load_file(path).items()}
    save_file(tensors, path, {"format": "pt"})


MOST_LOGITS = 2.0
"""The largest standard deviation of a base's logits: a trained model is never as sure as a wide random head."""


def _scale_embedding(model: torch.nn.Module) -> None:
    ids = torch.arange(3, 43)[None]
    with torch.no_grad():
        entering = model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states[0]
        weight = model.get_input_embeddings().weight
        weight.div_(entering.float().square().mean().sqrt())
        head, logits = model.get_output_embeddings(), model(input_ids=ids, use_cache=False).logits.float()
        if logits.std() > MOST_LOGITS and "gemma" not in model.config.model_type:
            scaled = model.get_decoder().norm if head is None or head.weight is weight else head
            scaled.weight.div_(logits.std())


@dataclass(frozen=True)
class Copied:
    """One copy of a family's base, and how far transformers' run of it is from the hook's.

    Attributes:
        asked: what the planner was asked for, in a word.
        base, folder: the two checkpoints.
        expected: what the stacks are to compute.
        difference, effect, noise: as in :class:`support.tiny_patch.Patched`.
        report: what loading the copy reports and loading the base does not.
        vectors: layer -> what its residual stream gains, [hidden].
    """

    asked: str
    base: Path
    folder: Path
    plan: Plan
    expected: Expected
    difference: float
    effect: float
    noise: float
    report: Mapping[str, list[str]]
    reader: str
    vectors: Mapping[int, torch.Tensor] = field(default_factory=dict)


def probe_prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, VOCABULARY - 8, (length,), generator=generator).tolist() for length in LENGTHS]


def family_job(name: str, folder: Path) -> StackJob:
    ids = probe_prompts()
    return StackJob(name, str(folder), ids, ids[0], GREEDY_TOKENS, TEXTS[:2], VOCABULARY)


def copy_family(family: Family, base: Path, folder: Path, asked: str = "", **options: Any) -> Copied:
    """Plan, patch, and compare in transformers.

    Args:
        base: of :func:`family_base`.
        folder: where the copy goes.
        asked: for the result.
        options: for :func:`patcher.routes.planner.choose_route`; ``exact`` is true.

    Raises:
        InputError: there is no exact route.
    """
    layer = family.layer
    plan = planned(base, [layer], exact=True, **options)
    model, own_report = stock_model(base)
    ids = probe_prompts()
    plain = _all_log_probs(model, ids)
    norm = residual_norms(model, plan.blocks, [layer], torch.tensor(ids[:1]))[layer]
    generator = torch.Generator().manual_seed(7)
    hidden = model.get_input_embeddings().weight.shape[-1]
    direction = torch.nn.functional.normalize(torch.randn(hidden, generator=generator), dim=0)
    for amplification in AMPLIFICATIONS:
        vector = amplification * RESIDUAL_SHARE * norm * direction
        with hooks(model, plan.blocks, {layer: vector}):
            hooked = _all_log_probs(model, ids)
            greedy, tokens = continued(model, ids[0])
        effect = _furthest(hooked, plain)
        if effect > LEAST_EFFECT:
            break
    rounded = vector * (1.0 + ROUNDING * torch.randn(len(vector), generator=generator))
    with hooks(model, plan.blocks, {layer: rounded}):
        noise = _furthest(_all_log_probs(model, ids), hooked)
    write_steered(plan, {layer: vector}, CheckpointFolder(base), folder)
    steered, report = stock_model(folder)
    new = {key: sorted({*map(str, report.get(key) or ())} - {*map(str, own_report.get(key) or ())}) for key in REPORTED}
    return Copied(
        asked=asked,
        base=base,
        folder=folder,
        plan=plan,
        expected=Expected(plain, hooked, greedy=tokens, greedy_logprobs=greedy),
        difference=_furthest(_all_log_probs(steered, ids), hooked),
        effect=effect,
        noise=noise,
        report={key: names for key, names in new.items() if names},
        reader=type(steered).__name__,
        vectors={layer: vector},
    )


def _all_log_probs(model: torch.nn.Module, ids: list[list[int]]) -> list[torch.Tensor]:
    return [log_probs(model, torch.tensor([row]))[0] for row in ids]


def _furthest(left: list[torch.Tensor], right: list[torch.Tensor]) -> float:
    return max(largest(a, b) for a, b in zip(left, right, strict=True))
