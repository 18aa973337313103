"""The stock loader, without reading what stays on the disk: names and places are what it finds out there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def values_left_on_disk() -> Iterator[None]:
    """While open, ``from_pretrained`` with a ``device_map`` reads no parameter that stays on the disk as it is stored.

    Transformers reads and casts every one of them, and drops it for its place in the checkpoint. What is converted
    (merged experts, undone quantisation) is read and written out as ever, and what goes to memory is read. In a release
    that loads in another way all is read, and the result is the same.
    """
    try:
        from transformers import modeling_utils
        from transformers.core_model_loading import WeightRenaming

        convert, find_places = WeightRenaming.convert, modeling_utils.accelerate_disk_offload
    except (ImportError, AttributeError):
        yield
        return
    places: set[str] = set()

    def found_places(*given: Any, **named: Any) -> Any:
        index = find_places(*given, **named)
        places.clear()
        places.update(index)
        return index

    def without_value(self: Any, layer_name: str, model: Any = None, *rest: Any, **named: Any) -> Any:
        quantised = any(rest) or named.get("hf_quantizer") is not None
        buffers = {} if model is None else dict(model.named_buffers())
        if layer_name not in places or layer_name in buffers or quantised or self.target_patterns != [layer_name]:
            return convert(self, layer_name, model, *rest, **named)
        self.collected_tensors.clear()
        return {layer_name: torch.empty(0, device="meta")}

    WeightRenaming.convert, modeling_utils.accelerate_disk_offload = without_value, found_places
    try:
        yield
    finally:
        WeightRenaming.convert, modeling_utils.accelerate_disk_offload = convert, find_places
