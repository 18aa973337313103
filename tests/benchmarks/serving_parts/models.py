"""Small random models, one for each route, and their steered copies."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[2]
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

import torch  # noqa: E402
from build_parts.material import END, make_tokenizer  # noqa: E402
from capture_parts.setting import progress  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from support.stack_models import complete_config  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase  # noqa: E402

from patcher.architectures.model_class import quiet_transformers  # noqa: E402
from patcher.build.job import Job, silent  # noqa: E402
from patcher.build.local import build  # noqa: E402
from patcher.errors import PatchModelError  # noqa: E402
from patcher.recipe.file import load_recipe  # noqa: E402


@dataclass(frozen=True)
class Case:
    """A model whose copy is made by a route.

    Attributes:
        model_type: of transformers.
        blocks: where its decoder blocks are.
        recipe: what the recipe needs for the route.
        config: keys of its config, beside those of :func:`sizes`.
    """

    model_type: str
    blocks: str
    recipe: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)


# A fitted route in a random model is as far off as it likes: what is measured here is its speed.
FITTED = {
    "exact": False,
    "route": "rank_one",
    "calibration": {"tokens": 4096},
    "verify": {"fit_error": 1, "fit_kl": 1},
}
COEFFICIENT = 4
CASES = {
    "native": Case("gpt2", "transformer.h"),
    "flag": Case("llama", "model.layers"),
    "relabel": Case("qwen2", "model.layers"),
    "carrier": Case("qwen3", "model.layers", config={"head_dim": 64}),
    "rank_one": Case("qwen3", "model.layers", FITTED, {"head_dim": 64}),
}


@dataclass(frozen=True)
class Size:
    """Of a model: tokens, width, width of the MLP (of GPT-2, llama.cpp takes four times the width only), blocks."""

    vocabulary: int
    hidden: int
    intermediate: int
    blocks: int


FULL = Size(16_384, 640, 2560, 12)
TINY = Size(2048, 128, 512, 2)


@dataclass(frozen=True)
class Pair:
    """A base and its copy.

    Attributes:
        architecture: the class of the copy.
        weights: bytes of the copy's weights, divided by those of the base's.
        vector: a file with what the hook adds to block ``layer``.
    """

    route: str
    case: Case
    base: Path
    copy: Path
    architecture: str
    weights: float
    vector: Path
    layer: int

    def request(self) -> dict[str, Any]:
        return {
            "route": self.route, "base": str(self.base), "copy": str(self.copy), "blocks": self.case.blocks,
            "vector": str(self.vector), "layer": self.layer,
        }  # fmt: skip


def make_pairs(folder: Path, routes: list[str], size: Size) -> tuple[list[Pair], dict[str, str]]:
    """Make the models below ``folder``, and build and verify their copies; of routes without a copy, why."""
    encoder = make_tokenizer(size.vocabulary)
    found, failed = [], {}
    for route in routes:
        start = time.perf_counter()
        try:
            found.append(make_pair(folder / route, route, size, encoder))
        except PatchModelError as error:
            failed[route] = " ".join(str(error).replace(f"{folder}/", "").split())
        progress(f"{route}: {failed.get(route, 'built')} ({time.perf_counter() - start:.1f} s)")
    return found, failed


def make_pair(folder: Path, route: str, size: Size, encoder: PreTrainedTokenizerBase) -> Pair:
    case, base, layer = CASES[route], folder / "base", int(0.4 * size.blocks)
    torch.manual_seed(0)
    with quiet_transformers():
        config = AutoConfig.for_model(case.model_type, **sizes(case.model_type, size, encoder), **case.config)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        # As large as a trained model's residual stream: a carrier works behind a norm, and not beside its epsilon.
        torch.nn.init.normal_(model.get_input_embeddings().weight)
        model.save_pretrained(base)
    encoder.save_pretrained(base)
    complete_config(base)
    direction = torch.nn.functional.normalize(torch.randn(size.hidden), dim=0)
    save_file({"direction": direction}, folder / "direction.safetensors")
    vector = {
        "name": "direction",
        "method": "file",
        "file": "direction.safetensors",
        "layer": layer,
        "coefficient": COEFFICIENT,
    }
    recipe = {"model": "base", "vectors": [vector], "evaluate": {"enabled": False}, **case.recipe}
    (folder / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    copy = folder / "copy"
    manifest = build(Job(load_recipe(folder / "recipe.yaml"), copy, silent), hash=False).manifest
    if manifest["route"]["name"] != route:
        raise RuntimeError(f"the copy of {case.model_type} was made by {manifest['route']['name']}, not by {route}")
    save_file({"added": COEFFICIENT * direction}, folder / "added.safetensors")
    architecture = json.loads((copy / "config.json").read_text(encoding="utf-8"))["architectures"][0]
    weights = _bytes(copy) / _bytes(base)
    return Pair(route, case, base, copy, architecture, weights, folder / "added.safetensors", layer)


def sizes(model_type: str, size: Size, encoder: PreTrainedTokenizerBase) -> dict[str, Any]:
    end = encoder.convert_tokens_to_ids(END)
    common = {"vocab_size": size.vocabulary, "bos_token_id": end, "eos_token_id": end, "tie_word_embeddings": False}
    heads = size.hidden // 64
    if model_type == "gpt2":
        return {**common, "n_embd": size.hidden, "n_inner": size.intermediate, "n_layer": size.blocks, "n_head": heads}
    return {
        **common, "hidden_size": size.hidden, "intermediate_size": size.intermediate,
        "num_hidden_layers": size.blocks, "num_attention_heads": heads, "num_key_value_heads": heads,
        "max_position_embeddings": 1024,
    }  # fmt: skip


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("model*.safetensors"))
