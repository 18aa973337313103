"""Every multimodal model of the installed transformers: made tiny, built by a recipe, loaded by the stock class, and
compared with a hook on a text and, where the class takes images, on a text, an image and a text.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LAYERS = (2, 0)
"""Blocks of the tiny model that are steered, each in a build of its own: the first stands for the type."""
EXACT_LIMIT, EXACT_SHARE, EXACT_NOISE = 2e-5, 5e-5, 5.0
"""As of text models: largest difference, its share of the effect, and times what another rounding does."""
RANDOM_SCALE = 1.0


@dataclass(frozen=True)
class WrapperRun:
    """One build.

    Attributes:
        layer: the block of the tiny model.
        status: ``exact``, ``none`` (refused in words), ``wrong`` (the copy is not what the hook is) or ``failed``.
        reason: why not, or of which route.
        difference, effect: with a text; see ``Run``.
        images: with an image: ``status`` (exact, wrong, none), ``difference``, ``effect``, ``by`` and ``why``.
        causal_lm: what ``AutoModelForCausalLM`` does with the copy, as the build's own proof found.
    """

    layer: int
    status: str
    reason: str = ""
    route: str | None = None
    cost: str | None = None
    reads: str | None = None
    difference: float | None = None
    effect: float | None = None
    images: Mapping[str, Any] = field(default_factory=dict)
    causal_lm: str = ""


@dataclass(frozen=True)
class WrapperRecord:
    """One multimodal type; the first run is the one that stands for it."""

    model_type: str
    class_name: str
    text_type: str
    loader: str
    runs: tuple[WrapperRun, ...]
    seconds: float


def check_wrapper(model_type: str, *, kinds: bool = True) -> WrapperRecord:
    """Build and compare one type: a block in the middle; with ``kinds`` the first block as well."""
    from patcher.architectures.installed import multimodal_models

    start = time.monotonic()
    about = {"class_name": multimodal_models()[model_type], "text_type": "", "loader": ""}
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch) / "base"
        try:
            about |= _made(base, model_type)
        except Exception as error:
            runs = [WrapperRun(LAYERS[0], "none", f"no tiny model of it could be made: {_first_line(error)}")]
        else:
            runs = [_run(base, layer, model_type) for layer in (LAYERS if kinds else LAYERS[:1])]
    return WrapperRecord(model_type, **about, runs=tuple(runs), seconds=round(time.monotonic() - start, 1))


def lost_wrapper(model_type: str, seconds: float, reason: str) -> WrapperRecord:
    """The record of a type whose process died."""
    from patcher.architectures.installed import multimodal_models

    run = WrapperRun(LAYERS[0], "failed", reason)
    return WrapperRecord(model_type, multimodal_models().get(model_type, ""), "", "", (run,), seconds)


def _made(base: Path, model_type: str) -> dict[str, str]:
    """A checkpoint whose residual stream is about as large as a trained model's, and what is known of its class."""
    from support.tiny_wrappers import wrapper_checkpoint
    from transformers import AutoConfig

    from patcher.architectures.decoder import decoder_config
    from patcher.architectures.model_class import auto_class_of, quiet_transformers

    wrapper_checkpoint(base, model_type, embedding_rms=RANDOM_SCALE)
    with quiet_transformers():
        config = AutoConfig.from_pretrained(base)
    return {"text_type": str(decoder_config(config).model_type), "loader": auto_class_of(config)}


def _run(base: Path, layer: int, model_type: str) -> WrapperRun:
    from support.building import build_recipe
    from support.tiny_models import write_recipe

    from patcher.errors import PatchModelError

    copy = base.parent / f"copy-{layer}"
    recipe = write_recipe(base.parent / f"recipe-{layer}.yaml", base, layer, copy)
    try:
        manifest = build_recipe(recipe, copy).manifest
    except PatchModelError as error:
        problem = error.problems[0]
        return WrapperRun(layer, "none", " – ".join(filter(None, (problem.message, str(problem.found or "")))))
    except Exception as error:
        print(f"{model_type}, block {layer}:\n{traceback.format_exc()}", file=sys.stderr)
        return WrapperRun(layer, "failed", f"{type(error).__name__}: {_first_line(error)}")
    route = manifest["route"]
    proof = next(entry for entry in manifest["verification"] if entry["stack"] == "transformers")
    causal = (proof.get("causal_lm") or {}).get("does", "")
    said = {"route": route["name"], "cost": route["cost"], "reads": route["architecture"], "causal_lm": causal}
    try:
        compared = _compared(base, copy, layer, model_type)
    except Exception as error:
        print(f"{model_type}, block {layer}:\n{traceback.format_exc()}", file=sys.stderr)
        return WrapperRun(layer, "failed", f"the copy does not run: {_first_line(error)}", **said)
    images = compared.pop("images") or _of_proof(proof)
    exact = compared.pop("exact") and images.get("status") != "wrong"
    reason = "" if exact else "the copy differs from the hook"
    return WrapperRun(layer, "exact" if exact else "wrong", reason, **said, **compared, images=images)


def _of_proof(proof: Mapping[str, Any]) -> dict[str, Any]:
    """With an image, as the build's own proof found; the build is refused where that is wrong."""
    images = proof.get("images")
    if not images:
        return {}
    keys = {"difference": "max_abs_logprob_diff", "effect": "steering_effect", "by": "by", "why": "why"}
    found = {name: images.get(key) for name, key in keys.items() if images.get(key) is not None}
    return {"status": "exact" if images.get("checked") else "none", **found}


def _compared(base: Path, copy: Path, layer: int, model_type: str) -> dict[str, Any]:
    """The copy against a hook on the base, with a text and an image of this suite; it shares no code with the proof."""
    import torch
    import transformers
    from safetensors.torch import load_file
    from support.tiny_models import VOCABULARY
    from support.tiny_patch import ROUNDING, architecture_of, hooks, largest, probe_ids
    from support.tiny_wrappers import image_inputs, released_wrappers

    from patcher.architectures.model_class import quiet_transformers

    blocks, classes = architecture_of(base).blocks, transformers.AutoModelForMultimodalLM
    manifest = json.loads((copy / "steering.json").read_text(encoding="utf-8"))
    vector = load_file(copy / "steering.safetensors")[manifest["edits"][0]["tensor"]]
    noise = 1.0 + ROUNDING * torch.randn(vector.shape, generator=torch.Generator().manual_seed(3))
    with quiet_transformers():
        plain = classes.from_pretrained(base, dtype=torch.float32).eval()
        steered = classes.from_pretrained(copy, dtype=torch.float32).eval()

    def log_probs(model: Any, inputs: Mapping[str, Any]) -> torch.Tensor:
        with torch.no_grad():
            return torch.log_softmax(model(**inputs, use_cache=False).logits.float(), dim=-1)

    def measured(inputs: Mapping[str, Any]) -> dict[str, Any]:
        with hooks(plain, blocks, {layer: vector}):
            hooked = log_probs(plain, inputs)
        with hooks(plain, blocks, {layer: vector * noise}):
            rounded = largest(log_probs(plain, inputs), hooked)
        difference, effect = largest(log_probs(steered, inputs), hooked), largest(log_probs(plain, inputs), hooked)
        exact = difference <= max(EXACT_LIMIT, EXACT_SHARE * effect, EXACT_NOISE * rounded) and effect > 0.01
        return {"difference": difference, "effect": effect, "exact": exact}

    ids = probe_ids(VOCABULARY)
    found: dict[str, Any] = measured({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    found["images"] = {}
    if any(entry["config"]["model_type"] == model_type for entry in released_wrappers().values()):
        image = measured(image_inputs(plain))
        found["images"] = {"status": "exact" if image.pop("exact") else "wrong", **image, "by": "random pixel values"}
    return found


def _first_line(error: BaseException) -> str:
    found = getattr(error, "problems", None)
    if found and found[0].found:
        return str(found[0].found)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if "validator" in str(error) and lines else lines[0] if lines else type(error).__name__)[:300]
