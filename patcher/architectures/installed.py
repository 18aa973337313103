"""The language models that the installed transformers has, by its own mappings, and the names that each goes by."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterable, Mapping

_CAUSAL = ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",)
_MULTIMODAL = ("MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES")


@functools.cache
def text_models() -> Mapping[str, str]:
    """Model type -> the class that ``AutoModelForCausalLM`` picks. A type may be an alias, or also multimodal."""
    return _mapped(_CAUSAL)


@functools.cache
def multimodal_models() -> Mapping[str, str]:
    """Model type -> the class that ``AutoModelForMultimodalLM`` or ``AutoModelForImageTextToText`` picks."""
    return _mapped(_MULTIMODAL)


@functools.cache
def config_types() -> Mapping[str, str]:
    """Model type -> its config class, of all that transformers has: of encoders and of parts of models as well."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return dict(CONFIG_MAPPING_NAMES)


@functools.cache
def language_models() -> tuple[str, ...]:
    """Every model type of a text or multimodal language model, sorted; an alias of another is left out."""
    configs = config_types()
    types = [name for name in {**text_models(), **multimodal_models()} if name in configs]
    return tuple(sorted(name for name in types if alias_of(name) is None))


def alias_of(model_type: str) -> str | None:
    """The type whose configs this one has: checkpoints of ``gpt-sw3`` say ``gpt2``."""
    own = config_types().get(model_type)
    alike = [other for other, name in config_types().items() if name == own and other != model_type]
    if not alike:
        return None
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    stated = str(getattr(CONFIG_MAPPING[model_type], "model_type", model_type))
    return stated if stated in alike else None


def model_type_of(name: str) -> str | None:
    """The model type that a name means: a type itself or the name of a class, in any case, also with hyphens."""
    return _names().get(_plain(name)) or {_plain(other): other for other in config_types()}.get(_plain(name))


def near_types(name: str) -> list[str]:
    """Up to three model types whose names (or classes) are spelt nearly like this one."""
    names = _names()
    near = difflib.get_close_matches(_plain(name), names, n=3)
    return list(dict.fromkeys(names[one] for one in near))


def wrappers_of(part: str) -> list[str]:
    """The multimodal types that keep a config of this type inside: of the text decoder, or of another part."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    found = []
    for model_type in multimodal_models():
        if model_type in config_types():
            parts = getattr(CONFIG_MAPPING[model_type], "sub_configs", None) or {}
            if any(getattr(kind, "model_type", None) == part for kind in parts.values()):
                found.append(model_type)
    return sorted(found)


def _mapped(names: Iterable[str]) -> dict[str, str]:
    from transformers.models.auto import modeling_auto

    # An older release has fewer mappings.
    return {key: str(value) for name in names for key, value in getattr(modeling_auto, name, {}).items()}


@functools.cache
def _names() -> Mapping[str, str]:
    """Every name that a language model goes by, plainly spelt -> its model type."""
    by_class: dict[str, str] = {}
    for classes in (text_models(), multimodal_models()):
        # Text models first, and of several types with one class the one that it is named after.
        ranks = {name: (name in multimodal_models(), not _is_named_after(classes[name], name)) for name in classes}
        for model_type in sorted(classes, key=ranks.__getitem__):
            by_class.setdefault(_plain(classes[model_type]), model_type)
    return by_class | {_plain(name): name for name in (*text_models(), *multimodal_models())}


def _is_named_after(class_name: str, model_type: str) -> bool:
    return _plain(class_name).replace("_", "").startswith(_plain(model_type).removesuffix("_text").replace("_", ""))


def _plain(name: str) -> str:
    return name.lower().replace("-", "_")
