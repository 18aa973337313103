"""The stock class behind a config: which one it is, and the parameters that it really creates."""

from __future__ import annotations

import contextlib
import copy
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from patcher.architectures.config_keys import stated
from patcher.architectures.decoder import checkpoint_config, decoder_config, own_values, put_inside, wrapper_of
from patcher.architectures.towers import towers_of
from patcher.errors import InputError
from patcher.errors.causes import cause_of, keep_log

CAUSAL_LM = "AutoModelForCausalLM"


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' own warnings off the terminal; what matters is checked and said by us.

    An error that leaves this keeps them, because some refer to "the above report".
    """
    from transformers.utils import logging as library

    level, bars = library.get_verbosity(), library.is_progress_bar_enabled()
    root, kept = library.get_logger("transformers"), _Kept()
    handlers, propagates = root.handlers, root.propagate
    root.handlers, root.propagate = [kept], False
    # Setting a level, even to what it is, makes every logger of the process look its own up again.
    if level != library.WARNING:
        library.set_verbosity_warning()
    library.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:
        keep_log(error, kept.said)
        raise
    finally:
        root.handlers, root.propagate = handlers, propagates
        if library.get_verbosity() != level:
            library.set_verbosity(level)
        if bars:
            library.enable_progress_bar()


class _Kept(logging.Handler):
    """Takes the place of what would print."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


def auto_class_of(config: Any) -> str:
    """The stock loader of a checkpoint: ``AutoModelForCausalLM``, or of a wrapper the one that loads it all."""
    from transformers.models.auto import modeling_auto as library

    wrapper = wrapper_of(decoder_config(config))
    whole = config if wrapper is None else wrapper
    kind = str(getattr(whole, "model_type", ""))
    of_text = library.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind)
    # Chameleon and a few others keep all in one config, and have no class of text alone.
    if of_text is not None and wrapper is None:
        return CAUSAL_LM
    named = next(iter(getattr(whole, "architectures", None) or ()), None)
    for auto, names in (
        ("AutoModelForImageTextToText", library.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES),
        ("AutoModelForMultimodalLM", getattr(library, "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES", {})),
    ):
        if kind in names and (of_text in (None, names[kind]) or named != of_text):
            return auto
    return CAUSAL_LM


def causal_lm_from_config(config: Any, *, trust_remote_code: bool = False) -> nn.Module:
    """The class that stock software loads for ``config``, instantiated on the current default device.

    Args:
        config: of a causal LM; or of a multimodal wrapper, or of the decoder inside one: then the wrapper is made.

    Raises:
        InputError: no class that writes text exists for this config, or the class cannot be built.
    """
    import transformers

    decoder = decoder_config(config)
    auto, config = auto_class_of(decoder), checkpoint_config(decoder)
    with quiet_transformers():
        try:
            model: nn.Module = getattr(transformers, auto).from_config(
                copy.deepcopy(config), trust_remote_code=trust_remote_code
            )
        except ImportError as error:
            raise InputError(
                f"the class for `{config.model_type}` needs a package that is not installed",
                found=cause_of(error),
                remedy="install it and try again",
            ) from None
        except (
            ValueError, TypeError, LookupError, AttributeError, RuntimeError, AssertionError, ArithmeticError,
        ) as error:  # fmt: skip
            if "Padding_idx" in str(error):
                raise _refused_padding(config) from None
            raise InputError(
                f"transformers cannot build a causal LM from this config (model_type `{config.model_type}`)",
                where="config.json",
                found=cause_of(error),
                remedy=f"give a model whose config stock {auto}.from_config takes",
            ) from None
    return model


def _refused_padding(config: Any) -> InputError:
    found, rows = stated(config, "pad_token_id"), stated(config, "vocab_size")
    return InputError(
        "transformers cannot build the model: its padding token has no embedding",
        where="config.json",
        found=f"pad_token_id {found}, vocab_size {rows}",
        remedy='write `"pad_token_id": null` there; padding is masked, so no result depends on it',
    )


def causal_lm_class(model_type: str) -> type | None:
    """The stock causal LM class of a model type, or None."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if model_type not in CONFIG_MAPPING:
        return None
    found: type | None = MODEL_FOR_CAUSAL_LM_MAPPING.get(CONFIG_MAPPING[model_type], None)
    return found


def on_meta(config: Any, flags: Mapping[str, Any] | None = None, *, trust_remote_code: bool = False) -> nn.Module:
    """The class without weights (nothing is allocated), with ``flags`` set in its config."""
    changed = with_flags(decoder_config(config), flags or {})
    with torch.device("meta"):
        return causal_lm_from_config(changed, trust_remote_code=trust_remote_code)


def embedding_rows(model: Any) -> int | None:
    """How many token ids a model has embeddings for: 0 to one less than this; None where the class does not say."""
    try:
        embedding = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    # A quantised table's weight has another shape than the table.
    rows = getattr(embedding, "num_embeddings", None)
    if rows is None:
        shape: tuple[int, ...] = tuple(getattr(getattr(embedding, "weight", None), "shape", ()))
        rows = shape[0] if len(shape) == 2 else None
    return None if rows is None else int(rows)


def with_flags(config: Any, flags: Mapping[str, Any]) -> Any:
    """A copy of the config with ``flags`` set."""
    changed = copy.deepcopy(config)
    for name, value in flags.items():
        setattr(changed, name, value)
    return changed


def why_config_is_refused(config: Any, flags: Mapping[str, Any]) -> str | None:
    """Why a config.json with ``flags`` could not be loaded although the one without them can, or None."""

    def refusal(values: dict[str, Any]) -> str | None:
        try:
            with quiet_transformers():
                put_inside(type(config).from_dict(values), config)
        except Exception as error:
            # Classes check their configs in their own ways, with errors of any type.
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            return lines[-1] if lines else type(error).__name__
        return None

    plain = own_values(config)
    refused = refusal({**plain, **flags})
    return refused if refused is not None and refusal(plain) is None else None


def parameter_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter that the class creates."""
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}


def stored_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every tensor of the class that a checkpoint stores and that is no parameter."""
    stored = model.state_dict()
    return {name: buffer for name, buffer in model.named_buffers() if name in stored}


def parameter_aliases(model: nn.Module) -> dict[str, str]:
    """Names of tensors that the class ties to an earlier one, with that one's name; a checkpoint stores it alone."""
    first: dict[int, str] = {}
    aliases = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner = first.setdefault(id(parameter), name)
        if owner != name:
            aliases[name] = owner
    return aliases


def as_saved(model: nn.Module, named: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor] | None:
    """Tensors of the class under the names, and in the parts, that transformers stores them in; None: not known.

    A class that was renamed since its first release is still stored under the old names.
    """
    try:
        # It is no public function.
        from transformers.core_model_loading import revert_weight_conversion

        return dict(revert_weight_conversion(model, dict(named)))
    except (ImportError, TypeError, ValueError, LookupError, AttributeError, RuntimeError):
        return None


def saved_names(model: nn.Module, parameters: Iterable[str]) -> dict[str, str]:
    """Parameter -> the name under which transformers stores it; where that is not known, its own.

    A checkpoint under other names is then refused, never written wrongly.
    """
    names = list(parameters)
    saved = renamed_alone(model, names)
    return {name: saved.get(name, name) for name in names}


def renamed_alone(model: nn.Module, parameters: Iterable[str]) -> dict[str, str]:
    """The same for those alone of which the library says it: none that is stored in parts, or together with another."""
    names = list(parameters)
    reverted = as_saved(model, {name: torch.tensor(index) for index, name in enumerate(names)}) or {}
    return {names[int(tensor)]: name for name, tensor in reverted.items() if tensor.numel() == 1}


def submodule(model: nn.Module, path: str) -> Any:
    """``model.get_submodule`` that says None instead of raising."""
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def require_decoder(config: Any) -> None:
    """Refuse in words a config that is not of a decoder of blocks.

    Args:
        config: of a text model, or of the decoder inside a wrapper.

    Raises:
        InputError: it lacks what a decoder has.
    """
    missing = [name for name in ("num_hidden_layers", "hidden_size", "vocab_size") if stated(config, name, ...) is ...]
    if missing:
        raise InputError(
            f"`{config.model_type}` is not a decoder of blocks: its config has no {' and no '.join(missing)}",
            where="config.json",
            remedy="give a causal LM, or a multimodal model around one",
        )


def longest_module_list(model: nn.Module, count: int) -> str | None:
    """Path of the ModuleList of ``count`` blocks that holds the most parameters, or None; a wrapper's towers not
    counted."""
    best: tuple[int, str] | None = None
    outside = tuple(f"{tower}." for tower in towers_of(model))
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count and not f"{name}.".startswith(outside):
            size = sum(parameter.numel() for parameter in module.parameters())
            if best is None or size > best[0]:
                best = (size, name)
    return best[1] if best else None
