"""Is there a parameter, of any name, whose content reaches the residual stream as a constant? All of them, tried.

For every class whose default route pays a layer, is fitted or is none: every parameter of a block that is as wide as
the residual stream, under the default config and with each of its switches turned.
``python tests/conformance/slot_search.py`` prints what it finds.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from relabel_search import FAILURES, LAYER, sources
from support.default_configs import default_config

from patcher.architectures.analysis import Architecture
from patcher.architectures.model_class import quiet_transformers, submodule
from patcher.architectures.shrink import shrink_config
from patcher.architectures.stand_in import RandomStandIn, apart, run_on

CLOSE = 1e-3


def constants_of(model_type: str) -> Iterator[tuple[str, str]]:
    """(parameter, under which change of the config) for each that shifts the residual stream alike at every token."""
    plain = default_config(model_type)
    seen: set[str] = set()
    for changes in _changes(plain):
        config = default_config(model_type)
        for name, value in changes.items():
            setattr(config, name, value)
        try:
            tiny, layer = shrink_config(config, LAYER)
            stand_in = RandomStandIn.of(tiny, trust_remote_code=False)
            block = submodule(stand_in.model, f"{Architecture(tiny).blocks}.{layer}")
            for name, parameter in block.named_parameters():
                wide = parameter.shape[-1] == tiny.hidden_size and (parameter.ndim == 1 or len(parameter) <= 8)
                if name in seen or parameter.ndim > 2 or not wide:
                    continue
                if not changes:
                    seen.add(name)
                if _is_constant(stand_in, block, parameter):
                    yield name, ", ".join(f"{key}: {value}" for key, value in changes.items())
        except FAILURES:
            continue


def _changes(config: Any) -> Iterator[dict[str, Any]]:
    yield {}
    for name, value in vars(config).items():
        if value is False and not name.startswith("_") and name not in ("is_encoder_decoder", "tie_word_embeddings"):
            yield {name: True}


def _is_constant(stand_in: RandomStandIn, block: Any, parameter: torch.nn.Parameter) -> bool:
    kept = parameter.detach().clone()
    vector = torch.randn(parameter.shape[-1], generator=torch.Generator().manual_seed(3))
    with torch.no_grad(), quiet_transformers():
        try:
            still, _ = run_on(stand_in.model, block, stand_in.ids)
            parameter.copy_(kept + vector)
            shifted, logits = run_on(stand_in.model, block, stand_in.ids)
            gain = shifted - still
            constant = gain.flatten(0, -2).mean(0)
            if not float(constant.norm()) > 1e-3 * float(vector.norm()):
                return False
            if not float((gain - constant).abs().max()) < CLOSE * float(constant.abs().max()):
                return False
            parameter.copy_(kept)
            _, hooked = run_on(stand_in.model, block, stand_in.ids, add=constant)
            return apart(logits, hooked) < CLOSE
        finally:
            parameter.copy_(kept)


def _look(name: str) -> tuple[str, list[tuple[str, str]]]:
    torch.set_num_threads(1)
    try:
        return name, list(constants_of(name))
    except FAILURES as error:
        return name, [("", f"failed: {error}")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="TYPE")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers", "patcher.architectures.analysis"])
    with context.Pool(options.processes) as pool:
        for name, found in pool.imap_unordered(_look, options.only or sources()):
            for parameter, changes in found:
                print(f"{name}: {parameter} ({changes or 'as it is'})", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
