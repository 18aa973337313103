"""Tiny models that vLLM and llama.cpp can run, patched, and what a hook makes of each in transformers."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from support.stock_loading import log_probs, stock_model
from support.tiny_models import TEXTS, VOCABULARY, randomise, tiny_checkpoint, tiny_tokenizer
from support.tiny_patch import AMPLIFICATIONS, LEAST_EFFECT, RESIDUAL_SHARE, hooks, planned, residual_norms
from support.writing import write_steered
from transformers import AutoConfig, AutoModelForCausalLM

from patcher.architectures.model_class import quiet_transformers
from patcher.checkpoint.folder import CheckpointFolder
from patcher.routes.plan import Plan
from patcher.verify.stack_jobs import StackJob

LENGTHS = (17, 9, 24)
GREEDY_TOKENS = 8


@dataclass(frozen=True)
class Case:
    """A model to patch.

    Attributes:
        route, reader: what the planner is to choose, and the class that reads the copy.
        released: the released config it is shrunk from; None: a default one of its type, with :data:`SIZES`.
        changes: of the config; vLLM's kernels on a CPU want heads of 32.
        sentencepiece: whether releases have a tokenizer.model, which llama.cpp's converter prefers.
        tokens: special tokens that llama.cpp's converter looks for.
        options: for the planner.
    """

    route: str
    reader: str
    released: str | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)
    sentencepiece: bool = True
    tokens: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


TWO_HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2}
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4,
    "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
HEADS_OF_32 = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
CASES: dict[str, Case] = {
    "llama": Case("flag", "LlamaForCausalLM", "meta-llama--Llama-3.2-1B", HEADS_OF_32),
    "qwen2": Case("relabel", "LlamaForCausalLM", "Qwen--Qwen2.5-0.5B", TWO_HEADS),
    "qwen3": Case("carrier", "Qwen3ForCausalLM", None, HEADS_OF_32),
    "mistral": Case("relabel", "LlamaForCausalLM", "mistralai--Mistral-7B-Instruct-v0.3", HEADS_OF_32),
    "phi3": Case("relabel", "LlamaForCausalLM", None, {**TWO_HEADS, "sliding_window": None}),
    "gemma": Case("carrier", "GemmaForCausalLM", None, HEADS_OF_32),
    "gemma2": Case(
        "carrier",
        "Gemma2ForCausalLM",
        None,
        {**HEADS_OF_32, "num_hidden_layers": 5, "sliding_window": 6, "query_pre_attn_scalar": 32},
        options={"targets": ["transformers", "vllm", "llama.cpp"]},
    ),
    "gpt2": Case("native", "GPT2LMHeadModel", "openai-community--gpt2", {"n_head": 2}),
    "gpt_neox": Case("native", "GPTNeoXForCausalLM", "EleutherAI--pythia-70m", {"num_attention_heads": 2}),
    "starcoder2": Case("native", "Starcoder2ForCausalLM", "bigcode--starcoder2-3b", TWO_HEADS),
    "granite": Case(
        "flag", "GraniteForCausalLM", "ibm-granite--granite-3.3-2b-instruct", {**TWO_HEADS, "logits_scaling": 1.0}
    ),
    "opt": Case("native", "OPTForCausalLM", "facebook--opt-125m", {"num_attention_heads": 2}),
    "gpt_oss": Case(
        "native", "GptOssForCausalLM", "openai--gpt-oss-20b", {"quantization_config": None, "head_dim": 32}
    ),
    "phi": Case("native", "PhiForCausalLM", "microsoft--phi-2", {**TWO_HEADS, "intermediate_size": 256}),
    "nemotron": Case("flag", "NemotronForCausalLM", "nvidia--Nemotron-Mini-4B-Instruct", {**TWO_HEADS, "head_dim": 32}),
    "olmo": Case("relabel", "LlamaForCausalLM", None, TWO_HEADS, sentencepiece=False),
}  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """A base and its patched copy, with what they should compute.

    Attributes:
        plan: how the copy was made.
        ids: the prompts.
        plain, hooked: log-probabilities of the base without and with the hook, [positions, vocabulary] a prompt.
        greedy, greedy_tokens: the hooked base's greedy continuation of the first prompt: [steps, vocabulary], ids.
    """

    name: str
    base: Path
    copy: Path
    plan: Plan
    ids: list[list[int]]
    plain: list[torch.Tensor]
    hooked: list[torch.Tensor]
    greedy: torch.Tensor
    greedy_tokens: list[int]

    def job(self, folder: Path, label: str) -> StackJob:
        return StackJob(
            f"{self.name}-{label}", str(folder), self.ids, self.ids[0], GREEDY_TOKENS, TEXTS[:2], VOCABULARY
        )

    @property
    def folders(self) -> dict[str, Path]:
        return {"base": self.base, "copy": self.copy}

    @property
    def effect(self) -> float:
        return max(float((left - right).abs().max()) for left, right in zip(self.plain, self.hooked, strict=True))


def make_pair(place: Path, name: str, **options: Any) -> Pair:
    """Build a case's tiny base and its patched copy below ``place``."""
    case = CASES[name]
    base = place / name / "base"
    if case.released is None:
        layer = sized_checkpoint(base, name, **case.changes)
    else:
        layer = tiny_checkpoint(base, case.released, **case.changes)
    complete_for_stacks(base, case)
    return patched_pair(name, base, place / name / "copy", layer, **{**case.options, **options})


def complete_for_stacks(base: Path, case: Case = Case("", "")) -> None:
    """What other stacks ask of a tiny base."""
    if case.sentencepiece:
        (base / "tokenizer.model").write_bytes(sentencepiece_model())
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(list(case.tokens), special_tokens=True)
    tokenizer.save_pretrained(base)
    complete_config(base)


def patched_pair(name: str, base: Path, copy: Path, layer: int, **options: Any) -> Pair:
    """Patch ``base`` after ``layer`` by the planner's choice under ``options``, and run the hooked base."""
    plan = planned(base, [layer], exact=True, **options)
    model, _ = stock_model(base)
    generator = torch.Generator().manual_seed(5)
    ids = [torch.randint(3, VOCABULARY - 1, (length,), generator=generator).tolist() for length in LENGTHS]
    plain = [log_probs(model, torch.tensor([row]))[0] for row in ids]
    norm = residual_norms(model, plan.blocks, [layer], torch.tensor(ids[:1]))[layer]
    direction = torch.nn.functional.normalize(torch.randn(int(model.config.hidden_size), generator=generator), dim=0)
    for amplification in AMPLIFICATIONS:
        vectors = {layer: amplification * RESIDUAL_SHARE * norm * direction}
        with hooks(model, plan.blocks, vectors):
            hooked = [log_probs(model, torch.tensor([row]))[0] for row in ids]
            greedy, tokens = continued(model, ids[0])
        if max(float((left - right).abs().max()) for left, right in zip(plain, hooked, strict=True)) > LEAST_EFFECT:
            break
    write_steered(plan, vectors, CheckpointFolder(base), copy)
    return Pair(name, base, copy, plan, ids, plain, hooked, greedy, tokens)


def sized_checkpoint(folder: Path, model_type: str, **changes: Any) -> int:
    """A tiny random model of a type's default config; its residual stream is as large as a trained model's."""
    config = AutoConfig.for_model(model_type, **{**SIZES, **changes})
    torch.manual_seed(0)
    with quiet_transformers():
        model = AutoModelForCausalLM.from_config(config).float().eval()
        randomise(model, 0)
        embedding = model.get_input_embeddings().weight
        # Where the head is the same matrix, the class multiplies what is embedded by sqrt(hidden) (Gemma).
        tied = float(config.hidden_size) ** 0.5 if "gemma" in model_type and config.tie_word_embeddings else 1.0
        embedding.data.div_(tied * embedding.data.std())
        model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return 1


def continued(model: torch.nn.Module, ids: list[int]) -> tuple[torch.Tensor, list[int]]:
    """Greedy decoding without a cache."""
    rows, tokens = [], list(ids)
    for _ in range(GREEDY_TOKENS):
        rows.append(log_probs(model, torch.tensor([tokens]))[0, -1])
        tokens.append(int(rows[-1].argmax()))
    return torch.stack(rows), tokens[len(ids) :]


def complete_config(folder: Path) -> None:
    """Keys that released checkpoints have and llama.cpp's converter reads, where transformers has a default."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.get("quantization_config", ...) is None:
        del config["quantization_config"]
    if config["model_type"] == "gpt2":
        config["n_ctx"] = config["n_positions"]
    if config["model_type"] == "gpt_neox":
        config["rotary_pct"] = 0.25
    if config["model_type"] == "cohere2":
        config.setdefault("rotary_pct", 1.0)
    if config["model_type"] == "lfm2":
        sizes = dict.fromkeys(("block_dim", "conv_dim"), config["hidden_size"])
        sizes["block_ff_dim"] = config.get("intermediate_size", config.get("block_ff_dim"))
        adjusted = {"block_multiple_of": 32, "block_ffn_dim_multiplier": 1.0, "block_auto_adjust_ff_dim": False}
        config = {**sizes, **adjusted, **config}
    # Words of released configs, which transformers 5 replaces.
    old = {"linear_attention": "mamba", "full_attention": "attention"}
    if config["model_type"] == "granitemoehybrid":
        config["layer_types"] = [old.get(kind, kind) for kind in config.get("layer_types") or ()]
    if config["model_type"] == "nemotron_h" and "layers_block_type" in config:
        letters = {"linear_attention": "M", "full_attention": "*", "mlp": "-", "moe": "E"}
        config["hybrid_override_pattern"] = "".join(letters[kind] for kind in config.pop("layers_block_type"))
        config["num_hidden_layers"] = len(config["hybrid_override_pattern"])
        if "E" not in config["hybrid_override_pattern"]:
            config = {key: value for key, value in config.items() if not re.search("expert|moe|_group$", key)}
    path.write_text(json.dumps(config), encoding="utf-8")
    path = folder / "tokenizer_config.json"
    # Released ones have a name that the transformers which the converter asks for knows as well.
    tokenizer = {**json.loads(path.read_text(encoding="utf-8")), "tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(tokenizer), encoding="utf-8")


def with_vector(pair: Pair, folder: Path, factor: float) -> Path:
    """The copy with its vector times ``factor``: 0 drops it, 0.5 halves it, -1 turns it round."""
    shutil.copytree(pair.copy, folder)
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        base = {}
        for item in pair.base.glob("*.safetensors"):
            base |= load_file(item)
        for write in pair.plan.carriers:
            if write.name in tensors:
                neutral = base[write.name] if write.kind == "added" else torch.full((), float(write.offset))
                neutral = neutral.to(tensors[write.name].dtype)
                tensors[write.name] = neutral + factor * (tensors[write.name] - neutral)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})
    return folder


@cache
def sentencepiece_model() -> bytes:
    """A tokenizer as llama.cpp's converter reads it for Llama, Gemma and Nemotron; only the ids count here."""
    model = io.BytesIO()
    lines = [f"{text} {number}" for text in TEXTS for number in range(20)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        vocab_size=VOCABULARY - 1,
        model_type="bpe",
        byte_fallback=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return model.getvalue()
