"""The towers of a multimodal wrapper (vision, audio): found in its class, and left out where only text is run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from patcher.architectures.config_keys import stated
from patcher.architectures.decoder import decoder_config


def towers_of(model: nn.Module) -> tuple[str, ...]:
    """Paths of the models inside a wrapper that are no part of its text decoder; none of a text model.

    A part that every prompt goes through (a projection) is no model in the sense of transformers, and is none of these.
    """
    from transformers import PreTrainedModel

    config: Any = getattr(model, "config", None)
    text = decoder_config(config)
    if text is config:
        return ()
    inside = stated(config, "text_config")
    found: list[str] = []
    for name, module in model.named_modules():
        if not name or any(name.startswith(tower + ".") for tower in found):
            continue
        if isinstance(module, PreTrainedModel) and type(module.config) not in (type(inside), type(config)):
            found.append(name)
    return tuple(found)


def places_without(model: nn.Module, towers: Sequence[str], device: str) -> dict[str, str]:
    """A ``device_map`` that leaves the towers on meta.

    Some classes ask where they are by their first parameter, which may be a tower's: that one is loaded.
    """
    places = {"": device, **dict.fromkeys(towers, "meta")}
    first = next((name for name, _parameter in model.named_parameters()), "")
    if first.startswith(tuple(f"{tower}." for tower in towers)):
        places[first] = device
    return places


@contextlib.contextmanager
def left_on_meta() -> Iterator[None]:
    """While open, a stock loader leaves those parts where a ``device_map`` says ``meta``, instead of moving them about.

    What accelerate would do for a model that is spread over devices is left out: nothing of it is computed there.
    """
    import transformers.modeling_utils as library

    name = "accelerate_dispatch"
    stock = getattr(library, name, None)
    try:
        if stock is not None:
            setattr(library, name, lambda *_args, **_options: None)
        yield
    finally:
        if stock is not None:
            setattr(library, name, stock)


def can_stay_on_meta() -> bool:
    """Whether this release of transformers lets parts of a model stay without weights."""
    import transformers.modeling_utils as library

    return hasattr(library, "accelerate_dispatch")
