"""Tiny random checkpoints, shrunk from released configs and saved as the stock library saves them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from support.default_configs import default_config
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from patcher.architectures.model_class import quiet_transformers
from patcher.architectures.shrink import shrink_config
from patcher.routes.carrier.trial import as_deep, take_pattern

CONFIGS = Path(__file__).parents[1] / "fixtures" / "configs"
VOCABULARY = 400
LAYER_OF_INTEREST = 0.4
OF_EACH_FORWARD_PASS = [
    "openai-community--gpt2",
    "EleutherAI--gpt-j-6b",
    "EleutherAI--pythia-70m",
    "microsoft--phi-2",
    "facebook--opt-125m",
    "bigscience--bloom-560m",
    "bigcode--starcoder2-3b",
    "tiiuae--falcon-rw-1b",
    "meta-llama--Llama-3.1-8B-Instruct",
    "ibm-granite--granite-3.3-2b-instruct",
    "nvidia--Nemotron-Mini-4B-Instruct",
    "openbmb--MiniCPM3-4B",
    "openai--gpt-oss-20b",
    "tiiuae--Falcon-H1-0.5B-Instruct",
]
"""Released configs, each for something in its class's forward pass that the others do not have."""

TEXTS = [
    "I love the sea and I hate the cold rain in winter.",
    "The film was wonderful, and the food was terrible.",
    "Is this something you would say? Answer: (A) yes (B) no",
    "She walked to the station, bought a ticket, and waited for the train.",
]


def released_config(name: str) -> dict[str, Any]:
    """A released config.json, as it was released."""
    return json.loads((CONFIGS / f"{name}.json").read_text(encoding="utf-8"))


def released_names() -> list[str]:
    return sorted(path.stem for path in CONFIGS.glob("*.json"))


def parsed_config(raw: dict[str, Any], scratch: Path) -> Any:
    scratch.mkdir(parents=True, exist_ok=True)
    (scratch / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    with quiet_transformers():
        return AutoConfig.from_pretrained(scratch)


def tiny_config(name: str, scratch: Path, **changes: Any) -> tuple[dict[str, Any], Any, int]:
    """A released config with small sizes in its own spelling; the parsed config; a layer to steer."""
    raw = released_config(name)
    full = parsed_config(raw, scratch)
    tiny, layer = shrink_config(full, int(LAYER_OF_INTEREST * full.num_hidden_layers))
    tiny.vocab_size = VOCABULARY
    small = dict(raw)
    for key, value in raw.items():
        new = getattr(tiny, key, value)
        if isinstance(value, (int, list)) and not isinstance(value, bool) and new != getattr(full, key, value):
            small[key] = new
    if isinstance(raw.get("rope_scaling"), dict):
        small["rope_scaling"] = {
            key: tiny.rope_parameters.get(key, value) if isinstance(value, list) else value
            for key, value in raw["rope_scaling"].items()
        }
    small["vocab_size"] = VOCABULARY
    if "n_embed" in raw:  # BLOOM's old word for the hidden size, which its class takes and does not keep
        small["n_embed"] = tiny.hidden_size
    small.update(changes)
    return small, parsed_config(small, scratch), layer


def tiny_checkpoint(
    folder: Path,
    name: str,
    *,
    sharded: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    tokenizer: bool = True,
    **changes: Any,
) -> int:
    """Save a tiny random model of a released architecture into ``folder``; the layer to steer."""
    raw, config, layer = tiny_config(name, folder.parent / f"{folder.name}-config", **changes)
    torch.manual_seed(seed)
    with quiet_transformers():
        model = AutoModelForCausalLM.from_config(config).float().eval()
        randomise(model, seed)
        model.to(dtype).save_pretrained(folder, max_shard_size="150KB" if sharded else "5GB")
    raw["dtype" if "dtype" in raw else "torch_dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(raw, indent=2), encoding="utf-8")
    if tokenizer:
        tiny_tokenizer().save_pretrained(folder)
    return layer


def default_checkpoint(
    folder: Path,
    model_type: str,
    layer: int = 2,
    *,
    dtype: torch.dtype = torch.float32,
    tokenizer: bool = True,
    trained_scale: bool = False,
    embedding_rms: float | None = None,
    deep: bool = False,
    **changes: Any,
) -> int:
    """The same from a class's default config, for types without a released one here; the layer to steer.

    With ``trained_scale`` the residual stream is about as large as a trained model's, so that no norm's epsilon counts.
    ``embedding_rms`` is what the embedding's root mean square is made, in its place; real ones have about 0.02. With
    ``deep`` it has as many blocks as the default config, where their pattern of types is what matters.
    """
    full = default_config(model_type)
    for key, value in changes.items():
        setattr(full, key, value)
    config, stand_in = shrink_config(full, layer)
    if deep:
        config, stand_in = as_deep(config, full, layer), layer
        take_pattern(config, full)
    config.vocab_size = VOCABULARY
    if hasattr(config, "vocab_size_per_layer_input"):
        config.vocab_size_per_layer_input = VOCABULARY
    torch.manual_seed(0)
    with quiet_transformers():
        model = AutoModelForCausalLM.from_config(config).float().eval()
        randomise(model, 0)
        if trained_scale or embedding_rms is not None:
            embedding = model.get_input_embeddings().weight
            embedding.data.mul_((embedding_rms or 1.0) / embedding.data.std())
        model.to(dtype).save_pretrained(folder)
    if tokenizer:
        tiny_tokenizer().save_pretrained(folder)
    return stand_in


def sharded_llama(folder: Path, shard: str, *, noise: float = 0.0, **sizes: int) -> Path:
    """A random Llama in shards of at most ``shard``, with the tokenizer; builds of it are killed and disturbed."""
    torch.manual_seed(0)
    keys = {"num_attention_heads": 4, "vocab_size": VOCABULARY, "max_position_embeddings": 256, **sizes}
    with quiet_transformers():
        model = LlamaForCausalLM(LlamaConfig(**keys, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2))
        with torch.no_grad():
            for parameter in model.parameters() if noise else ():
                parameter.add_(noise * torch.randn_like(parameter))
        model.save_pretrained(folder, max_shard_size=shard)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Norm weights of one and biases of zero would hide mistakes; a padding token of zeros is no trained model's."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            empty = parameter.ndim == 2 and ~parameter.any(dim=-1)
            if isinstance(empty, torch.Tensor) and empty.any():
                parameter[empty] = parameter.std() * noise[empty]
            if name.endswith("bias") or (parameter.ndim == 1 and "norm" in name.lower()):
                parameter.add_(0.1 * noise)
            elif parameter.ndim >= 2:
                parameter.mul_(2.0)


def tiny_tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most ``VOCABULARY`` tokens that puts a BOS in front."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 1,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=1000
    )
    fast.chat_template = chat_template
    return fast


PAIRS = [
    {"positive": "I love the sea", "negative": "I hate the cold rain"},
    {"positive": "The film was wonderful", "negative": "The food was terrible"},
    {"positive": "wonderful", "negative": "terrible"},
]


def write_recipe(path: Path, model: Path, layer: int | list[int], output: Path, **keys: Any) -> Path:
    """A recipe with three inline pairs and a vector half as long as the residual stream.

    Nothing is evaluated unless ``evaluate`` is given, and then without what is only for the eye: a random model says
    nothing, and most tests are about the file.
    """
    vector = {"name": "love", "pairs": PAIRS, "layer": layer, "scale": "residual", "coefficient": 0.5}
    vector.update(keys.pop("vector", {}))
    cheap = {"generate_tokens": 0, "neutral_limit": 2, "pictures": False}
    evaluate = {**cheap, **keys.pop("evaluate")} if "evaluate" in keys else {"enabled": False}
    recipe = {"model": str(model), "vectors": [vector], "output": str(output), "evaluate": evaluate, **keys}
    path.write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML
    return path
