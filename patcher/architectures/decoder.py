"""A decoder inside a checkpoint class: the text config of a multimodal wrapper, and the way back to the whole config.

Routes, probes and captures are about a decoder. What stock software loads is the checkpoint class. Of a text model both
are one. A wrapper's text config remembers the wrapper here by a key that survives copies and ``to_dict``, so that
whoever changes a decoder's config can build the class around it.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from patcher.architectures.config_keys import stated
from patcher.errors import InputError

TEXT_KEY = "text_config"
"""Where every wrapper of transformers keeps its decoder's config."""

_INSIDE = "_wrapper"
"""Of a decoder's config: the key of its wrapper. What begins so is no part of a model."""

_OF_THE_WHOLE = frozenset({"architectures", "auto_map", "quantization_config", "dtype", "torch_dtype", "model_type"})
"""Keys that a wrapper's config.json states at its top, whatever it keeps inside."""

_TIED = "tie_word_embeddings"
"""What a wrapper states at its top goes for it; releases differ in where they look."""

_wrappers: dict[str, Any] = {}


def decoder_config(config: Any) -> Any:
    """The config of the decoder: of a text model the config itself, of a wrapper its text config, which remembers it.

    Raises:
        InputError: the wrapper keeps a decoder in a way that is not known here.
    """
    text = stated(config, TEXT_KEY)
    if text is None or isinstance(text, Mapping) or stated(config, _INSIDE) is not None:
        return config
    if not hasattr(text, "to_dict"):
        raise InputError(
            f"`{config.model_type}` keeps its text decoder in a way that is not known",
            where=f"config.json: {TEXT_KEY}",
            found=type(text).__name__,
            remedy="give a checkpoint of a text decoder alone, where one is published",
        )
    text = copy.deepcopy(text)
    rest = {name: value for name, value in config.to_dict().items() if name != TEXT_KEY}
    key = hashlib.sha256(json.dumps([config.model_type, rest], sort_keys=True, default=str).encode()).hexdigest()[:16]
    if key not in _wrappers:
        _wrappers[key] = copy.deepcopy(config)
    setattr(text, _INSIDE, key)
    if stated(config, "quantization_config") is not None:
        text.quantization_config = copy.deepcopy(config.quantization_config)
    return text


def wrapper_of(config: Any) -> Any:
    """The config of the wrapper that a decoder's config comes from, unchanged; None of a text model."""
    return _wrappers.get(stated(config, _INSIDE) or "")


def checkpoint_config(config: Any) -> Any:
    """The config of the class that stock software loads, with this decoder inside; a text model's is itself."""
    wrapper = wrapper_of(config)
    if wrapper is None:
        return config
    whole, text = copy.deepcopy(wrapper), taken_out(config)
    quantised = vars(text).pop("quantization_config", None)
    if hasattr(whole, "quantization_config"):
        whole.quantization_config = quantised
    if stated(text, _TIED) != stated(getattr(whole, TEXT_KEY), _TIED):
        setattr(whole, _TIED, stated(text, _TIED))
    setattr(whole, TEXT_KEY, text)
    dtype = stated(text, "dtype")
    for part in (whole, *(value for value in vars(whole).values() if hasattr(value, "to_dict"))):
        if getattr(part, "dtype", None) != dtype:
            part.dtype = dtype
    return whole


def taken_out(config: Any) -> Any:
    """A decoder's config that is no longer in a wrapper, as that of a text model is."""
    text = copy.deepcopy(config)
    vars(text).pop(_INSIDE, None)
    return text


def put_inside(config: Any, like: Any) -> Any:
    """``config`` in the wrapper that the decoder of ``like`` comes from; the same object.

    Raises:
        ValueError: the wrapper's class makes another config of it.
    """
    key = stated(like, _INSIDE)
    if key is not None:
        setattr(config, _INSIDE, key)
        wrapper = _wrappers[key]
        read = type(wrapper).from_dict({**wrapper.to_dict(), TEXT_KEY: own_values(config)})
        if type(getattr(read, TEXT_KEY)) is not type(config):
            raise ValueError(f"`{wrapper.model_type}` takes no decoder of the type `{config.model_type}`")
    return config


def own_values(config: Any) -> dict[str, Any]:
    """``config.to_dict()`` without what is remembered here."""
    values = dict(config.to_dict())
    values.pop(_INSIDE, None)
    return values


def text_key(content: Mapping[str, Any]) -> str | None:
    """The key of a config.json under which the decoder's keys are; None where they are at its top."""
    return TEXT_KEY if isinstance(content.get(TEXT_KEY), Mapping) else None


def decoder_part(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a config.json states of its decoder."""
    key = text_key(content)
    if key is None:
        return content
    whole = {name: content[name] for name in ("quantization_config",) if name in content}
    return {**content[key], **whole}


def with_changes(
    content: Mapping[str, Any], changes: Mapping[str, Any], decoder: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """A config.json with another decoder.

    Args:
        content: the config.json; it is not changed.
        changes: keys of the decoder, or of the whole (``architectures``, ``quantization_config``); None removes one.
            ``vision_config.KEY`` is a key of another part.
        decoder: all keys of the decoder, instead of those that are stated.
    """
    content, changes = _parts_changed(content, changes)
    key = text_key(content)
    if key is None:
        return _changed(content if decoder is None else decoder, changes)
    of_whole = {name: value for name, value in changes.items() if name in _OF_THE_WHOLE or name == _TIED}
    inside = {name: value for name, value in changes.items() if name not in _OF_THE_WHOLE}
    part = dict(content[key] if decoder is None else decoder)
    return {**_changed(content, of_whole), key: _changed(part, inside)}


def value_at(content: Mapping[str, Any], key: str) -> Any:
    """What a config.json states under a key of its decoder, or under a key of another part (``vision_config.KEY``)."""
    part, _, name = key.rpartition(".")
    inside = content.get(part) if part else decoder_part(content)
    return inside.get(name) if isinstance(inside, Mapping) else None


def _parts_changed(
    content: Mapping[str, Any], changes: Mapping[str, Any]
) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """A config.json with the changes to other parts than the decoder made, and the changes that are left."""
    made = dict(content)
    for key, value in changes.items():
        part, _, name = key.rpartition(".")
        if part:
            made[part] = {**made[part], name: value}
    return made, {key: value for key, value in changes.items() if "." not in key}


def _changed(content: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = {**content, **{name: value for name, value in changes.items() if name != _INSIDE}}
    return {key: value for key, value in merged.items() if value is not None or key not in changes}
