"""What stock loaders make of a checkpoint's names and shapes: what they miss, and what they do not read.

The stock ``from_pretrained`` is asked itself, so that its renamings, conversions and tied weights all count. It gets
tensors without data on the meta device, and no file is opened.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from patcher.architectures.class_listing import findings_about
from patcher.architectures.config_keys import stated
from patcher.architectures.decoder import checkpoint_config
from patcher.architectures.model_class import as_saved, on_meta, quiet_transformers

_NUMBER = re.compile(r"\.\d+\.")

Stored = Mapping[str, tuple[torch.dtype | None, tuple[int, ...] | None]]
"""Name on disk -> dtype (None: one that torch does not have) and shape (None: it is not known)."""


@dataclass(frozen=True)
class Loading:
    """What the stock class says, in its own names.

    Attributes:
        class_name: of the class.
        parameters: how many it has.
        missing: parameters that nothing on disk gives.
        buffers: the same of persistent buffers, which the class fills with constants.
        unread: what is stored and not read, as the class would call it.
        mismatched: (parameter, stored shape, the class's shape).
    """

    class_name: str
    parameters: int
    missing: tuple[str, ...] = ()
    buffers: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    mismatched: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...] = ()

    @property
    def complete(self) -> bool:
        return not (self.missing or self.mismatched)


def stock_loading(config: Any, stored: Stored, *, trust_remote_code: bool = False) -> Loading | None:
    """Load names and shapes into the class of ``config``; None where the stock loader does not tell.

    Of a quantised checkpoint, what belongs to a module of which anything is stored counts as there. What was told is
    kept between runs.
    """
    listed = sorted((name, str(dtype), shape) for name, (dtype, shape) in stored.items())
    findings = findings_about(config, trust_remote_code=trust_remote_code)
    try:
        return findings.once(["loading", listed], Loading, lambda: _told(config, stored, trust_remote_code))
    except _NotTold:
        return None


class _NotTold(Exception):  # noqa: N818 - a finding, not a failure
    """The stock loader says nothing of names and shapes; another release may."""


def _told(config: Any, stored: Stored, trust_remote_code: bool) -> Loading:
    config = copy.deepcopy(checkpoint_config(config))
    quantised = stated(config, "quantization_config") is not None
    if quantised:
        del config.quantization_config
    model = on_meta(config, trust_remote_code=trust_remote_code)
    try:
        with quiet_transformers():
            _model, info = type(model).from_pretrained(  # type: ignore[attr-defined]
                None,
                config=config,
                state_dict=_without_data(model, stored),
                device_map={"": "meta"},
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                local_files_only=True,
            )
    except RuntimeError:
        # A conversion failed. Where one of several tensors that are put together is missing, its name can be told.
        lacking = _lacking(model, stored)
        if lacking and not quantised:
            return replace(_about(model), missing=lacking)
        raise _NotTold from None
    except Exception:
        # A later release may not take such a call.
        raise _NotTold from None
    found = _loading(model, info)
    if any(shape is None for _dtype, shape in stored.values()):
        found = replace(found, mismatched=())
    return _of_quantised(model, found, stored) if quantised else found


def expected_names(config: Any, *, trust_remote_code: bool = False) -> Mapping[str, str]:
    """Every name that a checkpoint of this class can have -> the class's own name for it, as far as it is known."""

    def look() -> dict[str, str]:
        model = on_meta(config, trust_remote_code=trust_remote_code)
        state, prefix = dict(model.state_dict()), str(getattr(model, "base_model_prefix", "") or "")
        names = {name: name for name in (as_saved(model, state) or {})} | {name: name for name in state}
        short = {name.removeprefix(prefix + "."): name for name in names} if prefix else {}
        return {**short, **names}

    findings = findings_about(config, trust_remote_code=trust_remote_code)
    return findings.once("expected names", dict[str, str], look)


def tied_names(config: Any, *, trust_remote_code: bool = False) -> Mapping[str, str]:
    """Parameter that the config ties to another -> that other; none where it ties nothing."""

    def look() -> dict[str, str]:
        keys = getattr(on_meta(config, trust_remote_code=trust_remote_code), "_tied_weights_keys", None)
        return dict(keys) if isinstance(keys, dict) else {}

    if not stated(checkpoint_config(config), "tie_word_embeddings", False):
        return {}
    return findings_about(config, trust_remote_code=trust_remote_code).once("tied names", dict[str, str], look)


def _without_data(model: nn.Module, stored: Stored) -> dict[str, torch.Tensor]:
    unknown = any(shape is None for _dtype, shape in stored.values())
    state = dict(model.state_dict()) if unknown else {}
    like = {**(as_saved(model, state) or {}), **state} if unknown else {}
    result = {}
    for name, (dtype, shape) in stored.items():
        known = like.get(name)
        size = shape if shape is not None else tuple(known.shape) if known is not None else (1,)
        result[name] = torch.empty(size, dtype=dtype or torch.uint8, device="meta")
    return result


def _about(model: nn.Module) -> Loading:
    return Loading(type(model).__name__, sum(1 for _ in model.parameters()))


def _lacking(model: nn.Module, stored: Stored) -> tuple[str, ...]:
    """Names that the class is saved under and that are not stored, of kinds (but for numbers) that are."""
    kinds = {_NUMBER.sub(".*.", name) for name in stored}
    saved = as_saved(model, dict(model.state_dict())) or {}
    return tuple(sorted(name for name in saved if name not in stored and _NUMBER.sub(".*.", name) in kinds))


def _loading(model: nn.Module, info: Mapping[str, Any]) -> Loading:
    buffers = {name for name, _buffer in model.named_buffers()}
    missing = sorted(map(str, info["missing_keys"]))
    return replace(
        _about(model),
        missing=tuple(name for name in missing if name not in buffers),
        buffers=tuple(name for name in missing if name in buffers),
        unread=tuple(sorted(map(str, info["unexpected_keys"]))),
        mismatched=tuple(
            sorted((str(name), tuple(found), tuple(wanted)) for name, found, wanted in info["mismatched_keys"])
        ),
    )


def _of_quantised(model: nn.Module, found: Loading, stored: Stored) -> Loading:
    prefix = str(getattr(model, "base_model_prefix", "") or "") + "."
    modules = {name.rpartition(".")[0] for name in (*stored, *found.unread)}
    # Experts that are stored one by one belong to the module that holds them all.
    modules |= {module.partition(".experts.")[0] + ".experts" for module in modules if ".experts." in module}

    def there(name: str) -> bool:
        module = name.rpartition(".")[0]
        return bool({module, module.removeprefix(prefix), prefix + module} & modules)

    plain = (torch.float16, torch.bfloat16, torch.float32)
    floats = {name for name, (dtype, _shape) in stored.items() if dtype in plain}
    return replace(
        found,
        missing=tuple(name for name in found.missing if not there(name)),
        buffers=(),
        unread=(),
        mismatched=tuple(
            entry for entry in found.mismatched if {entry[0], entry[0].removeprefix(prefix), prefix + entry[0]} & floats
        ),
    )
