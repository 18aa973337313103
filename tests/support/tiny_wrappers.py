"""Tiny random multimodal wrappers: released ones with small sizes, and any other type of the installed library.

``wrappers.json`` holds a released ``config.json`` of each family with small sizes, in its own spelling (Qwen2.5-VL's is
flat), its processor files, its image tokens, and the shapes of one image. A token's name stands where its id goes.
"""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from support.tiny_models import VOCABULARY, parsed_config, randomise, tiny_tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from patcher.architectures.model_class import quiet_transformers

WRAPPER_VOCABULARY = 416
"""Rows of the embedding: ordinary tokens below ``VOCABULARY``, image tokens above."""
MOST_PARAMETERS = 100_000_000
TEXT_BEFORE, TEXT_AFTER = [1, 70, 71, 72, 73], [80, 81, 82, 83, 84, 85]
TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}: {% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}IMAGE"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
SIZES = json.loads((Path(__file__).parent / "wrapper_sizes.json").read_text(encoding="utf-8"))
"""Small sizes for the keys of a default config, for the types that have no released config here."""


@cache
def released_wrappers() -> dict[str, dict[str, Any]]:
    """The families of ``wrappers.json``: ``release``, ``config``, ``files``, ``tokens``, ``image``, ``inputs`` ..."""
    return json.loads((Path(__file__).parent / "wrappers.json").read_text(encoding="utf-8"))


def all_wrapper_types() -> list[str]:
    """Every wrapper type of the installed library, in the order of its mappings."""
    return [*MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, *MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES]


def image_tokens(name: str) -> list[str]:
    """The tokens that a wrapper's tokenizer has besides the ordinary ones; their ids begin at ``VOCABULARY``."""
    if name in released_wrappers():
        return released_wrappers()[name]["tokens"]
    with quiet_transformers():
        return [f"<{key}>" for key in dict.fromkeys(_token_keys(CONFIG_MAPPING[name]().to_dict()))]


def wrapper_config(name: str, **text: Any) -> dict[str, Any]:
    """A tiny ``config.json`` of a family of ``wrappers.json`` or of another wrapper type.

    Args:
        name: a name of ``wrappers.json``, or a model type.
        text: changed values of the text config (of the top where the config is flat).
    """
    ids = {token: VOCABULARY + index for index, token in enumerate(image_tokens(name))}
    if name in released_wrappers():
        raw = _named(released_wrappers()[name]["config"], {**ids, "VOCABULARY": WRAPPER_VOCABULARY})
    else:
        with quiet_transformers():
            raw = {**_shrunk(CONFIG_MAPPING[name]().to_dict(), ids), "model_type": name}
    inner = raw.get("text_config", raw)
    inner.update({"vocab_size": WRAPPER_VOCABULARY, **text})
    return raw


def tiny_wrapper(name: str, scratch: Path, *, seed: int = 0, **text: Any) -> PreTrainedModel:
    """A random fp32 model of it, in the class that stock software loads; ``scratch`` is a folder for its config."""
    config = parsed_config(wrapper_config(name, **text), scratch)
    model_class = getattr(transformers, MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES[config.model_type])
    with quiet_transformers(), torch.device("meta"):
        size = sum(parameter.numel() for parameter in model_class(copy.deepcopy(config)).parameters())
    assert size < MOST_PARAMETERS, f"a tiny {name} has {size / 1e6:.0f} million parameters"
    torch.manual_seed(seed)
    with quiet_transformers():
        model = model_class(config).float().eval()
    randomise(model, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():  # a projector that begins at zero would hide the image
            if parameter.ndim >= 2 and not parameter.any():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
    return model


def wrapper_checkpoint(
    folder: Path,
    name: str,
    *,
    sharded: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    processor: bool = True,
    template: str = "tokenizer",
    embedding_rms: float | None = None,
    **text: Any,
) -> Path:
    """Save a tiny wrapper as a release of it is: weights, ``config.json`` in its own spelling, tokenizer, processor.

    Args:
        folder: where; made.
        name: a name of ``wrappers.json``, or a model type (which has no processor files here).
        sharded: in several files.
        dtype: of the weights.
        seed: of the weights.
        processor: whether the processor's files are there.
        template: where the chat template is: ``tokenizer``, ``processor`` (``chat_template.json``), or ``none``.
        embedding_rms: what the root mean square of the embedding of tokens is made.
        text: changed values of the text config.
    """
    model = tiny_wrapper(name, folder.parent / f"{folder.name}-config", seed=seed, **text)
    if embedding_rms is not None:
        embedding = model.get_input_embeddings().weight.data
        embedding.mul_(embedding_rms / embedding.std())
    with quiet_transformers():
        model.to(dtype).save_pretrained(folder, max_shard_size="300KB" if sharded else "5GB")
    raw = wrapper_config(name, **text)
    raw["dtype"] = str(dtype).removeprefix("torch.")
    raw.setdefault("architectures", [type(model).__name__])
    (folder / "config.json").write_text(json.dumps(raw, indent=2), encoding="utf-8")
    chat_template = wrapper_template(name)
    wrapper_tokenizer(name, chat_template if template == "tokenizer" else None).save_pretrained(folder)
    if template == "processor":
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": chat_template}), encoding="utf-8")
    files = released_wrappers()[name]["files"] if processor and name in released_wrappers() else {}
    for file, content in files.items():
        (folder / file).write_text(json.dumps(content, indent=2), encoding="utf-8")
    return folder


def wrapper_tokenizer(name: str, chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """The tests' tokenizer with the wrapper's image tokens behind the ordinary ones."""
    tokenizer = tiny_tokenizer(chat_template)
    tokenizer.add_tokens([f"<unused{index}>" for index in range(VOCABULARY - len(tokenizer))])
    tokens = image_tokens(name)
    tokenizer.add_tokens(tokens, special_tokens=True)
    assert tokenizer.convert_tokens_to_ids(tokens) == list(range(VOCABULARY, VOCABULARY + len(tokens)))
    if name not in released_wrappers():
        return tokenizer
    names = released_wrappers()[name]["names"]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=1000,
        extra_special_tokens=names,
        chat_template=chat_template,
    )


def wrapper_template(name: str) -> str:
    """A chat template that takes texts and images."""
    return TEMPLATE.replace("IMAGE", released_wrappers()[name]["image"] if name in released_wrappers() else "")


def image_inputs(model: PreTrainedModel, *, seed: int = 9) -> dict[str, torch.Tensor]:
    """A prompt of a text, an image of random pixel values, and a text, as the keywords of the model's forward pass.

    Args:
        model: a tiny wrapper of a type in ``wrappers.json``.
        seed: of the pixel values.

    Returns:
        ``input_ids`` and ``attention_mask`` [1, positions], the pixel values and what goes with them.
    """
    entries = released_wrappers().values()
    entry = next(entry for entry in entries if entry["config"]["model_type"] == model.config.model_type)
    ids = {token: VOCABULARY + index for index, token in enumerate(entry["tokens"])}
    row = torch.tensor([*TEXT_BEFORE, *(ids[token] for token in entry["image_tokens"]), *TEXT_AFTER])[None]
    generator = torch.Generator().manual_seed(seed)
    inputs = {"input_ids": row, "attention_mask": torch.ones_like(row)}
    for key, shape in entry["inputs"].items():
        if isinstance(shape, list):
            inputs[key] = torch.randn(shape, generator=generator)
        else:
            inputs[key] = torch.tensor(shape["values"])
    placeholder = max(entry["image_tokens"], key=entry["image_tokens"].count)
    known = inspect.signature(type(model).forward).parameters
    types = {key: (row == ids[placeholder]).long() for key in ("token_type_ids", "mm_token_type_ids") if key in known}
    return {**inputs, **types}


def _named(value: Any, names: dict[str, int]) -> Any:
    """A copy with ids in place of names."""
    if isinstance(value, dict):
        return {key: _named(inner, names) for key, inner in value.items()}
    if isinstance(value, list):
        return [_named(inner, names) for inner in value]
    return names.get(value, value) if isinstance(value, str) else copy.copy(value)


def _token_keys(config: dict[str, Any]) -> Iterator[str]:
    """The keys of a whole config that hold the id of a token which only the wrapper has."""
    for key, value in config.items():
        if isinstance(value, dict) and key.endswith("_config"):
            yield from (inner for inner in _token_keys(value) if inner not in SIZES["ordinary tokens"])
        elif key.endswith(("token_id", "token_index", "_token_idx")) and key not in SIZES["ordinary tokens"]:
            yield from [key] * (isinstance(value, int) and value >= 0)


def _shrunk(config: dict[str, Any], ids: dict[str, int], where: str = "") -> dict[str, Any]:
    """A default config with small sizes, layer lists left to the class, and its tokens within the vocabulary."""
    tower = any(word in where for word in ("vision", "visual", "audio", "qformer", "perceiver"))
    small: dict[str, Any] = {}
    for key, value in config.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0
        if key in SIZES["left to the class"]:
            continue
        if isinstance(value, dict) and ("model_type" in value or key.endswith("_config")):
            value = _shrunk(value, ids, key)
        elif number and key in SIZES["sizes"]:
            value = SIZES["sizes"][key]
        elif number and key in SIZES["layers"]:
            value = 2 if tower else 4
        elif f"<{key}>" in ids:
            value = ids[f"<{key}>"]
        elif key in SIZES["ordinary tokens"] and value is not None:
            value = SIZES["ordinary tokens"][key]
        elif isinstance(value, dict) and "mrope_section" in value:
            value = {**value, "mrope_section": [4, 2, 2]}
        elif tower and number and key == "image_size":
            value = 28 if config.get("patch_size") == 14 else 32
        small[key] = value
    for place, value in SIZES["of type"].get(config.get("model_type"), {}).items():
        *inner, key = place.split(".")
        holder = small[inner[0]] if inner else small
        if holder is not None:
            holder[key] = value
    return small
