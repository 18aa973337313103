"""Every row of rows.json is true for the installed transformers, and a class without a row is never silently wrong."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from support import default_configs
from support.old_transformers import skip_if_too_old
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import patcher.architectures.analysis as analysis
from patcher.architectures.analysis import Architecture, Slot
from patcher.architectures.config_keys import block_count
from patcher.architectures.model_class import (
    causal_lm_from_config,
    on_meta,
    quiet_transformers,
    why_config_is_refused,
    with_flags,
)
from patcher.architectures.registry import ModelTypeRow, rows
from patcher.architectures.shrink import shrink_config
from patcher.errors import InputError

ROWS_JSON = Path(analysis.__file__).with_name("rows.json")

# Kinds of blocks that have no slot by themselves, by a parameter that only they have.
WITHOUT_SLOT = {"nemotron_h": "mixer.q_proj.weight"}
SLOW = {"git": "its class holds a vision encoder that is not made small"}
MULTIPLIER = 0.37


def default_config(model_type: str) -> Any:
    """The default config of a model type, with multipliers that show."""
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no `{model_type}`")
    config = default_configs.default_config(model_type)
    row = rows().get(model_type)
    for key in row.scale if row is not None else ():
        name, _, index = key.partition(".")
        value = getattr(config, name)
        if index:
            setattr(config, name, [MULTIPLIER if i == int(index) else v for i, v in enumerate(value)])
        elif isinstance(value, float):
            setattr(config, name, MULTIPLIER)
    return config


def without_flags(config: Any, row: ModelTypeRow) -> Any:
    """The config as it is where a checkpoint does not have what the row's flags create."""
    return with_flags(config, {name: not value for name, value in row.flags.items()})


def block_kinds(architecture: Architecture) -> dict[tuple[str, ...], int]:
    """Parameter names of a block -> the first block that has them."""
    kinds: dict[tuple[str, ...], int] = {}
    for layer in range(architecture.block_count):
        prefix = f"{architecture.blocks}.{layer}."
        names = (name.removeprefix(prefix) for name in architecture.parameters if name.startswith(prefix))
        kinds.setdefault(tuple(names), layer)
    return kinds


def steered_and_hooked(config: Any, slot: Slot, blocks: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of a small random model that carries a vector in the slot, of the same model under a hook, and of neither.

    This shares no code with the probe: another seed, every tensor disturbed, the vector divided by the factor.
    """
    tiny, stand_in = shrink_config(with_flags(config, slot.flags), slot.layer)
    torch.manual_seed(11)
    model = causal_lm_from_config(tiny).float().eval()
    generator = torch.Generator().manual_seed(12)
    with torch.no_grad():
        for tensor in model.parameters():
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.add_(0.15 * noise if tensor.ndim < 2 or tensor.numel() < 2 else 0.3 * float(tensor.std()) * noise)
    block, prefix = model.get_submodule(f"{blocks}.{stand_in}"), f"{blocks}.{slot.layer}."
    parameter = block.get_parameter(slot.parameter.removeprefix(prefix))
    vector = torch.randn(parameter.shape[-1], generator=generator)
    ids = torch.randint(3, tiny.vocab_size, (2, 9), generator=generator)

    def add(_module: Any, _inputs: Any, output: Any) -> Any:
        return output + vector if isinstance(output, torch.Tensor) else (output[0] + vector, *output[1:])

    def logits() -> torch.Tensor:
        with torch.no_grad(), quiet_transformers():
            return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits

    plain = logits()
    handle = block.register_forward_hook(add)
    hooked = logits()
    handle.remove()
    with torch.no_grad():
        row = rows().get(config.model_type)
        if slot.times is not None:
            vector = vector / block.get_parameter(slot.times.removeprefix(prefix))
        # A factor may depend on the number of layers.
        parameter.add_(vector / (row.factor(tiny) if row is not None and row.scale else slot.factor))
    return logits(), hooked, plain


def assert_steers(config: Any, slot: Slot, blocks: str, advice: str) -> None:
    steered, hooked, plain = steered_and_hooked(config, slot, blocks)
    assert torch.isfinite(steered).all()
    effect = float((hooked - plain).abs().max())
    difference = float((steered - hooked).abs().max())
    assert effect > 1e-4, f"{slot.parameter}: a vector in block {slot.layer} cannot be seen in the logits"
    assert difference <= 1e-2 * effect, (
        f"{slot.parameter} with factor {slot.factor:g} does not steer as a hook on block {slot.layer} does: "
        f"off by {difference:.2g} at an effect of {effect:.2g}. {advice}"
    )


# The rows

SLOTTED = [name for name, row in rows().items() if row.slots]


KEYS = {
    "blocks", "slots", "flags", "block_flags", "also", "scale", "stacks", "loads", "patterns", "depths",
}  # fmt: skip


def test_the_file_is_sorted_and_has_no_unknown_keys() -> None:
    raw = json.loads(ROWS_JSON.read_text(encoding="utf-8"))
    assert list(raw) == sorted(raw), "keep the rows in alphabetical order"
    for name, row in raw.items():
        assert set(row) <= KEYS, name
        assert "loads" in row, name
        assert ("slots" in row) == ("stacks" in row), (
            f"{name}: a slot needs to be said of each stack whether it reads it"
        )
        assert "slots" in row or not {"flags", "also", "scale"} & set(row), f"{name}: these are said of slots"
        for support in (row["loads"], row.get("stacks", row["loads"])):
            assert set(support) == {"vllm", "llama.cpp"}, f"{name}: say it of each stack"
            assert set(support.values()) <= {"native", "backend", "no"}, name
            assert support["llama.cpp"] != "backend", f"{name}: llama.cpp has no Transformers backend"
        for stack, support in row.get("stacks", {}).items():
            assert support in ("no", row["loads"][stack]), f"{name}: {stack} reads the slot as it loads the class"
        for stack, pattern in row.get("patterns", {}).items():
            assert row["loads"][stack] != "no", f"{name}: {stack} does not load it"
            assert pattern == "listed" or (isinstance(pattern, int) and pattern > 1), name
        assert not set(row.get("also", {})) & set(row.get("flags", {})), name


@functools.cache
def slots_of(model_type: str) -> tuple[Architecture, Any, list[Slot]]:
    """What the registry's row finds, one slot for each kind of block of the default config."""
    skip_if_too_old(model_type)
    config = default_config(model_type)
    row = rows()[model_type]
    plain = without_flags(config, row)
    architecture = Architecture(plain)
    found, reasons = [], []
    for kind, layer in block_kinds(architecture).items():
        slot, reason = architecture.flagged_slot(layer) if row.flags else architecture.native_slot(layer)
        if slot is not None:
            found.append(slot)
        elif WITHOUT_SLOT.get(model_type) not in kind:
            reasons.append(f"block {layer}: {reason}")
    assert found and not reasons, (
        f"the row of `{model_type}` in rows.json finds no slot ({'; '.join(reasons)}). Print the parameters of "
        f"a block of {architecture.class_name} with and without {dict(row.flags) or 'flags'}, and correct `blocks`, "
        "`slots` or `flags`; if a norm or multiplier was put after the MLP, correct `scale` or remove the row. If the "
        "default config only lacks a value, add it to NEEDED in this test"
    )
    return architecture, plain, found


@pytest.mark.slow_but("gpt2", "llama", "falcon", "granite", "gpt_oss", "nemotron_h", "starcoder2")
@pytest.mark.parametrize("model_type", SLOTTED)
def test_the_row_is_true(model_type: str) -> None:
    architecture, plain, found = slots_of(model_type)
    row = rows()[model_type]
    assert architecture.row is row
    assert architecture.block_count == block_count(plain)
    for slot in found:
        relative = slot.parameter.removeprefix(f"{architecture.blocks}.{slot.layer}.")
        assert relative in row.slots
        assert slot.factor == pytest.approx(row.factor(plain))
        tiny, _ = shrink_config(with_flags(plain, slot.flags), slot.layer)
        assert architecture.probe(slot.layer, relative, _own_flags(slot, row)).factor == pytest.approx(
            row.factor(tiny), rel=1e-3
        ), f"correct `scale` of `{model_type}`: the stand-in gains another multiple of the slot than the row states"
        assert_steers(
            plain, slot, architecture.blocks, f"The row of `{model_type}` in rows.json is wrong; correct or remove it"
        )


@pytest.mark.slow_but("gpt2", "llama", "falcon", "granite", "gpt_oss", "nemotron_h", "starcoder2")
@pytest.mark.parametrize("model_type", SLOTTED)
def test_every_slot_of_the_row_is_used_by_some_block(model_type: str) -> None:
    architecture, _, found = slots_of(model_type)
    row = rows()[model_type]
    used = {slot.parameter.removeprefix(f"{architecture.blocks}.{slot.layer}.") for slot in found}
    assert used == set(row.slots), f"no kind of block of `{model_type}` uses {sorted(set(row.slots) - used)}; remove it"


def _own_flags(slot: Slot, row: ModelTypeRow) -> dict[str, Any]:
    return {name: value for name, value in slot.flags.items() if name not in row.also}


@pytest.mark.slow_but("llama", "falcon", "granite", "helium")
@pytest.mark.parametrize("model_type", [name for name, row in rows().items() if row.flags])
def test_the_flags_and_nothing_else_create_the_slot(model_type: str) -> None:
    architecture, plain, found = slots_of(model_type)
    row = rows()[model_type]
    for slot in found:
        own = _own_flags(slot, row)
        assert slot.parameter not in architecture.parameters
        for name in own:
            others = {other: value for other, value in own.items() if other != name}
            needed = why_config_is_refused(plain, others) or slot.parameter not in _names(plain, others)
            assert needed, f"`{name}` of `{model_type}` is not needed; remove it"
        with_own = _names(plain, own)
        assert slot.parameter in with_own
        assert _names(plain, slot.flags) == with_own, (
            f"`also` of `{model_type}` must be read by another stack only, but {architecture.class_name} reads it too; "
            "make it a flag"
        )
        assert set(slot.created) == with_own - set(architecture.parameters)
        assert all("bias" in name for name in slot.created), f"`{model_type}`: zeros are no neutral value for a weight"
    used = {name for slot in found for name in slot.flags}
    assert used == set(row.flags) | set(row.also), (
        f"flags that create nothing: {(set(row.flags) | set(row.also)) - used}"
    )


def _names(config: Any, flags: Mapping[str, Any]) -> set[str]:
    # Tied tensors once, as a checkpoint stores them.
    return {name for name, _ in on_meta(config, flags).named_parameters()}


def test_scale_rules_are_applied_to_the_real_config() -> None:
    """MiniCPM3's factor depends on the number of layers, which the stand-in has not."""
    config = default_config("minicpm3")
    slot, _ = Architecture(config).flagged_slot(config.num_hidden_layers // 2)
    assert slot is not None
    assert slot.factor == pytest.approx(MULTIPLIER / config.num_hidden_layers**0.5)


# Classes without a row


@pytest.mark.slow_but(
    "bert",
    "bloom",
    "cohere",
    "falcon",
    "gemma",
    "gpt2",
    "gpt_neox",
    "granite",
    "llama",
    "mamba",
    "mistral",
    "mixtral",
    "olmo2",
    "opt",
    "phi",
    "phi3",
    "qwen2",
    "qwen3",
    "stablelm",
    "starcoder2",
)
@pytest.mark.parametrize("model_type", sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
def test_without_a_row_a_slot_is_found_by_measurement_or_not_at_all(
    model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if model_type in SLOW:
        pytest.skip(SLOW[model_type])
    try:
        config = default_config(model_type)
        architecture = Architecture(config)
    except (InputError, ValueError, TypeError, AttributeError, StrictDataclassError) as error:
        pytest.skip(f"the default config makes no causal LM: {(str(error).splitlines() or [''])[0]}")
    monkeypatch.setattr(analysis, "rows", dict)
    monkeypatch.setattr(analysis, "row_inside", lambda _wrapper, _decoder: None)
    architecture = Architecture(config)
    assert architecture.row is None
    for layer in block_kinds(architecture).values():
        native, why_not_native = architecture.native_slot(layer)
        flagged, why_not_flagged = architecture.flagged_slot(layer)
        assert native is not None or why_not_native
        assert flagged is not None or why_not_flagged
        for slot in (native, flagged):
            if slot is not None:
                assert_steers(
                    architecture.config,
                    slot,
                    architecture.blocks,
                    f"The probe lets a slot of `{model_type}` pass that is none: teach "
                    "patcher/architectures/probe.py to see why, before anything else",
                )
