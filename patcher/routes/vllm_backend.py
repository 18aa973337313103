"""vLLM's Transformers backend: how a copy is read there when vLLM's own class would drop the bias.

``"architectures": ["TransformersForCausalLM"]`` in config.json makes vLLM run the class of transformers, with no flag
and no remote code; transformers itself goes by ``model_type`` (vLLM's documentation, "Transformers modelling backend").
"""

from __future__ import annotations

from dataclasses import replace

from patcher.architectures.analysis import Architecture
from patcher.architectures.model_class import causal_lm_class
from patcher.routes.plan import NotApplicable, Plan
from patcher.stacks.names import LLAMA_CPP, VLLM

DENSE, EXPERTS = "TransformersForCausalLM", "TransformersMoEForCausalLM"


def backend_class(architecture: Architecture) -> str:
    """What ``architectures`` has to say for it."""
    return EXPERTS if any(".experts." in parameter for parameter in architecture.parameters) else DENSE


def through_backend(plan: Plan, architecture: Architecture) -> Plan:
    """The plan with ``architectures`` written so that vLLM takes its Transformers backend.

    Raises:
        NotApplicable: the class does not offer what the backend needs.
    """
    if architecture.wraps:
        raise NotApplicable("vLLM's Transformers backend was not run with a decoder inside a multimodal class")
    copy_type = str((plan.config or {}).get("model_type", architecture.model_type))
    cls = causal_lm_class(copy_type)
    if cls is None or not getattr(cls, "_supports_attention_backend", False):
        raise NotApplicable(
            f"vLLM's class for {plan.architecture} drops it, and its Transformers backend cannot run it"
        )
    name = backend_class(architecture)
    changes = {**plan.config_changes, "architectures": [name]}
    return replace(
        plan,
        config_changes=changes,
        stacks={**plan.stacks, VLLM: "backend", LLAMA_CPP: "no"},
        reason=f"{plan.reason}; `architectures: [{name}]` makes vLLM use its Transformers backend, since its own class "
        "drops the bias (llama.cpp's converter goes by that key, so it no longer converts)",
    )
