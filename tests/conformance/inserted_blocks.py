"""Inserted blocks in models whose blocks are of several types, in vLLM and llama.cpp, against the hook.

Run by hand: ``python tests/conformance/inserted_blocks.py [--stack llama.cpp] [--only gemma2,olmo3]``. Every model is
steered at its first block, in the middle and at the last. What the registry says of a stack (``patterns``) is what was
run here. A copy with one block too many must fail in a stack that computes a block's type from its index.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.llama_cpp_converter import with_tiny_tokenizers
from support.stack_models import HEADS_OF_32, Pair, complete_for_stacks, patched_pair, sized_checkpoint
from support.stack_runs import Ran, environment

from patcher.errors import PatchModelError
from patcher.stacks.names import LLAMA_CPP, TRANSFORMERS, VLLM
from patcher.verify.all_stacks import PROCESSES
from patcher.verify.stack_jobs import run_jobs


@dataclass(frozen=True)
class Family:
    """A tiny model whose blocks are of several types.

    Attributes:
        model_type: of transformers.
        blocks: how many it has; three times the pattern and one shows what a shift would do.
        changes: of the config; a window of a few tokens, so that it counts.
        stacks: those that it is run in.
    """

    model_type: str
    blocks: int
    changes: Mapping[str, Any] = field(default_factory=dict)
    stacks: tuple[str, ...] = (VLLM, LLAMA_CPP)


WINDOW = {**HEADS_OF_32, "sliding_window": 6}
WIDE_HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": False}
TIED = {**WIDE_HEADS, "tie_word_embeddings": True}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 160}
LINEAR = {
    **HEADS_OF_32, "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 32,
    "linear_value_head_dim": 32, "moe_intermediate_size": 160, "shared_expert_intermediate_size": 160,
    "num_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip
SSSF = [*(["sliding_attention"] * 3 + ["full_attention"]) * 2, "sliding_attention"]
LFM = ["conv", "conv", "full_attention", "conv", "full_attention", "conv"]
NEMOTRON = ["mamba", "mlp", "mamba", "attention", "mlp", "mamba", "mlp"]
MAMBA = {"mamba_num_heads": 4, "mamba_head_dim": 32, "ssm_state_size": 16, "n_groups": 1, "chunk_size": 16}
GRANITE = {
    "layer_types": ["mamba", "mamba", "attention", "mamba", "attention"], "mamba_n_heads": 4, "mamba_d_head": 32,
    "mamba_d_state": 16, "mamba_chunk_size": 16, "num_local_experts": 0, "num_experts_per_tok": 0,
    "shared_intermediate_size": 160,
}  # fmt: skip
FAMILIES: dict[str, Family] = {
    "gemma2": Family("gemma2", 5, {**WINDOW, "query_pre_attn_scalar": 32}),
    "gemma3": Family("gemma3_text", 13, {**WINDOW, "query_pre_attn_scalar": 32}),
    "smollm3": Family("smollm3", 9, {**HEADS_OF_32, "tie_word_embeddings": False}),
    "olmo3": Family("olmo3", 9, {**WIDE_HEADS, "sliding_window": 6}),
    "cohere2": Family("cohere2", 9, {**TIED, "sliding_window": 64}),
    "exaone4": Family("exaone4", 5, {**WIDE_HEADS, "sliding_window": None, "layer_types": ["full_attention"] * 5}),
    "qwen3_next": Family("qwen3_next", 9, LINEAR),
    "nemotron_h": Family("nemotron_h", 7, {**HEADS_OF_32, **MAMBA, "layers_block_type": NEMOTRON}),
    "lfm2": Family("lfm2", 6, {**WIDE_HEADS, "layer_types": LFM, "block_auto_adjust_ff_dim": False}),
    "lfm2_moe": Family("lfm2_moe", 6, {**TIED, **EXPERTS, "num_dense_layers": 1, "layer_types": LFM}),
    "qwen3_5": Family("qwen3_5_text", 9, LINEAR),
    "granite4": Family("granitemoehybrid", 5, {**WIDE_HEADS, **GRANITE}),
    "granite_swa": Family("granite_swa", 9, {**WIDE_HEADS, "sliding_window": 6}),
    "mellum": Family("mellum", 9, {**HEADS_OF_32, **EXPERTS, "sliding_window": 6, "layer_types": SSSF}),
    "afmoe": Family("afmoe", 9, {**HEADS_OF_32, **EXPERTS, "sliding_window": 6, "num_dense_layers": 1}),
    "cohere2_moe": Family("cohere2_moe", 9, {**TIED, **EXPERTS, "sliding_window": 6}),
    "exaone_moe": Family("exaone_moe", 9, {**HEADS_OF_32, **EXPERTS, "sliding_window": 6}),
    "llama4": Family("llama4_text", 9, {**HEADS_OF_32, "num_local_experts": 4, "intermediate_size_mlp": 160}),
}


def pairs_of(name: str, place: Path, layers: list[int], **options: Any) -> dict[str, Pair]:
    family = FAMILIES[name]
    base = place / name / "base"
    sized_checkpoint(base, family.model_type, num_hidden_layers=family.blocks, **family.changes)
    complete_for_stacks(base)
    return {
        f"{name}@{layer}": patched_pair(f"{name}@{layer}", base, place / name / f"copy{layer}", layer, **options)
        for layer in layers
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stack", default=f"{LLAMA_CPP},{VLLM}")
    parser.add_argument("--only", default=",".join(FAMILIES))
    parser.add_argument("--plain", action="store_true", help="insert one block, whatever a stack needs")
    asked = parser.parse_args()
    stacks = asked.stack.split(",")
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        pairs: dict[str, Pair] = {}
        for name in asked.only.split(","):
            family = FAMILIES[name]
            read = [stack for stack in stacks if stack in family.stacks and not asked.plain]
            try:
                pairs |= pairs_of(
                    name, place, sorted({0, family.blocks // 2, family.blocks - 1}), targets=[TRANSFORMERS, *read],
                    route="carrier",
                )  # fmt: skip
            except Exception as error:
                # One family that is not made should not hide the others.
                why = error.problems[0].found if isinstance(error, PatchModelError) else repr(error)
                print(f"{name:22} not made: {why}", flush=True)
        return max(run_in(stack, pairs, place) for stack in stacks)


def run_in(stack: str, pairs: Mapping[str, Pair], place: Path) -> int:
    """Run them in one process of the stack, and print a line each; 1 where one is not as the plan says."""
    found = environment(stack)
    found = with_tiny_tokenizers(found, place) if stack == LLAMA_CPP else found
    bases = {name.partition("@")[0]: pair for name, pair in reversed(pairs.items())}
    jobs = [pair.job(pair.base, "base") for pair in bases.values()]
    jobs += [pair.job(pair.copy, "copy") for pair in pairs.values()]
    runs = run_jobs(PROCESSES[stack](found), jobs, place / f"runs-{stack}")
    failed = 0
    for name, pair in pairs.items():
        base = runs[f"{bases[name.partition('@')[0]].name}-base"]
        ran = Ran(dict(pairs), {f"{name}-base": base, f"{name}-copy": runs[f"{name}-copy"]})
        said = f"{stack:10} {name:16} {pair.plan.stacks[stack]:8}"
        if error := base.error or runs[f"{name}-copy"].error:
            print(f"{said}ERROR {'of the base: ' if base.error else ''}{error[-400:]}", flush=True)
            failed = 1
            continue
        result = ran.compared(name)
        wrong = [check.name for check in result.checks if check.passed is False]
        exact = result.passed and not result.blind
        failed |= exact != (pair.plan.stacks[stack] != "no")
        print(
            f"{said}{'exact' if exact else 'not: ' + (result.blind or ', '.join(wrong))}: off by "
            f"{result.max_abs_logprob_diff:.2g} of {result.steering_effect:.2g}, the base by {result.own_error:.2g}; "
            f"{pair.plan.cost}",
            flush=True,
        )
    return failed


if __name__ == "__main__":
    sys.exit(main())
