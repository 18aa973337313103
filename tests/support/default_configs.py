"""The default configs of the package, as far as an older transformers computes them."""

from __future__ import annotations

from support.old_transformers import is_too_old

from patcher.architectures.default_configs import NEEDED, default_config
from patcher.architectures.installed import language_models, multimodal_models
from patcher.architectures.model_class import quiet_transformers
from patcher.architectures.registry import excluded

__all__ = ["TEXT_TYPES", "WRAPPER_TYPES", "default_config", "needs_is_decoder"]

TEXT_TYPES = [name for name in language_models() if name not in excluded() and name not in multimodal_models()]
"""Every text causal LM of the installed transformers."""

WRAPPER_TYPES = [name for name in language_models() if name not in excluded() and name in multimodal_models()]
"""Every multimodal language model of the installed transformers."""

if is_too_old("zamba2 with two shared transformers"):
    NEEDED["zamba2"] = {"num_mem_blocks": 1}


def needs_is_decoder(model_type: str) -> bool:
    """Whether the default config is that of an encoder."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    with quiet_transformers():
        config = CONFIG_MAPPING[model_type](**NEEDED.get(model_type, {}))
    return getattr(config, "is_decoder", None) is False
