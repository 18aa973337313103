"""What a sweep costs beside the straightforward loop: one build and one evaluation for each cell, in one run.

    python tests/benchmarks/sweep.py [--tiny] [--cells 4] [--write docs/performance-sweep.md] [--json FILE]

The loop is measured on a few cells, spread over the grid, between two halves of nothing else, and multiplied by the
number of cells; the sweep is run whole, its report, controls and completions included. Both give the same numbers.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import random
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from capture_parts.material import FULL, TINY, WORDS, Shape, make_checkpoint, make_pairs
from transformers import AutoModelForCausalLM, AutoTokenizer

from patcher.architectures.model_class import quiet_transformers
from patcher.build.job import Job
from patcher.build.local import build
from patcher.evaluate.questions import build_question
from patcher.evaluate.texts import encode_texts
from patcher.progress.stage import silent
from patcher.recipe.file import load_recipe
from patcher.recipe.vector import VectorSpec
from patcher.sweep import materials
from patcher.sweep.pipeline import sweep
from patcher.vectors.finding import prepare_vectors

COEFFICIENTS = [-0.5, -0.25, 0.125, 0.25, 0.5, 0.75, 1.0]


@dataclass(frozen=True)
class Setting:
    """What is measured.

    Attributes:
        shape: of the model.
        pairs: how many contrast pairs; a fifth is chosen on and a fifth reported.
        tokens: least and greatest length of a prompt.
        passages: neutral passages for each of the two.
        layers: the grid's.
    """

    shape: Shape
    pairs: int
    tokens: tuple[int, int]
    passages: int
    layers: list[int]


def setting(tiny: bool) -> Setting:
    if tiny:
        return Setting(TINY, 20, (30, 60), 3, [0, 1, 3])
    return Setting(FULL, 40, (60, 100), 6, list(range(1, 24, 2)))


def write_recipe(folder: Path, model: Path, chosen: Setting) -> Path:
    draw = random.Random(0)
    # Of the words that the benchmark's tokenizer has as one token each: English would be cut into bytes by it.
    lines = [" ".join("".join(word) for word in draw.choices(WORDS, k=24)) for _ in range(2 * chosen.passages)]
    (folder / "neutral.txt").write_text("\n".join(lines), encoding="utf-8")
    recipe = {
        "model": str(model),
        "vectors": [
            {"name": "letters", "pairs": "pairs.json", "format": "ab", "layer": 1, "scale": "residual"},
        ],
        "evaluate": {"neutral": "neutral.txt", "neutral_limit": chosen.passages, "guard": {"kl": None}},
        "sweep": {"layers": chosen.layers, "coefficients": COEFFICIENTS, "search": "grid"},
        "dtype": "float32",
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe), encoding="utf-8")
    return path


class Loop:
    """The straightforward way: build the cell, load it with stock transformers, and run every text through it."""

    def __init__(self, path: Path, blocks: int) -> None:
        loaded = load_recipe(path)
        self.loaded, self.recipe, self.path, recipe = loaded, loaded.recipe, path, loaded.recipe
        tokenizer = AutoTokenizer.from_pretrained(recipe.model)
        prepared = prepare_vectors(loaded, tokenizer, blocks)
        parts = materials.split(prepared, 0, loaded, tokenizer)
        self.pairs = path.parent / "make.json"
        for file, pairs in ((self.pairs, parts.prepared[0].used), (path.parent / "choose.json", parts.choose)):
            rows = [
                {
                    "question": pair.prompt,
                    "answer_matching_behavior": pair.positive,
                    "answer_not_matching_behavior": pair.negative,
                }
                for pair in pairs
            ]
            file.write_text(json.dumps(rows), encoding="utf-8")
        spec: VectorSpec = recipe.vectors[0]
        self.questions = [build_question(pair, tokenizer, spec) for pair in parts.choose]
        lines = (path.parent / "neutral.txt").read_text(encoding="utf-8").splitlines()
        chosen = lines[0::2][: recipe.evaluate.neutral_limit]
        (path.parent / "choose.txt").write_text("\n".join(chosen), encoding="utf-8")
        self.neutral = encode_texts(chosen, tokenizer)
        self.base = self._outputs(Path(recipe.model))

    def cell(self, layer: int, coefficient: float) -> dict[str, float]:
        """Effect and KL divergence of one cell, and seconds.

        Those of a build that evaluates what it made, and those of a build that does not and of a stock evaluation.
        """
        start = time.perf_counter()
        # With what a build measures: base, steered, the negative, three random vectors, the guard; on the same items.
        spec = self.recipe.vectors[0].model_copy(
            update={"layer": layer, "coefficient": coefficient, "pairs": self.pairs.name}
        )
        own = {
            "pairs": "choose.json",
            "neutral": "choose.txt",
            "held_out": 0.0,
            "generate_tokens": 0,
            "pictures": False,
            "budget": "full",
        }
        evaluate = self.recipe.evaluate.model_copy(update=own)
        loaded = self.loaded.changed(vectors=[spec], evaluate=evaluate)
        with tempfile.TemporaryDirectory(dir=self.path.parent) as folder:
            made = build(Job(loaded, Path(folder) / "copy", silent), hash=False, link=True)
        full = time.perf_counter() - start
        start = time.perf_counter()
        bare = loaded.changed(evaluate=evaluate.model_copy(update={"enabled": False}))
        with tempfile.TemporaryDirectory(dir=self.path.parent) as folder:
            output = Path(folder) / "copy"
            build(Job(bare, output, silent), hash=False, link=True)
            built = time.perf_counter()
            answers, texts = self._outputs(output)
            end = time.perf_counter()
        shifts = [after - before for after, before in zip(answers, self.base[0], strict=True)]
        divergences = [
            float((before.exp() * (before - after)).sum(-1).sum())
            for after, before in zip(texts, self.base[1], strict=True)
        ]
        tokens = sum(map(len, self.neutral))
        return {
            "layer": layer,
            "coefficient": coefficient,
            "effect": sum(shifts) / len(shifts),
            "damage": sum(divergences) / tokens,
            "full": full,
            "build": built - start,
            "evaluate": end - built,
            "own_steered": made.manifest["evaluation"]["steered"],
            "own_damage": made.manifest["evaluation"]["guard"]["kl"],
        }

    def _outputs(self, folder: Path) -> tuple[list[float], list[torch.Tensor]]:
        with quiet_transformers(), torch.no_grad():
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
            answers = []
            for question in self.questions:
                ids = [option.ids for option in question.options]
                place = next(index for index in range(len(ids[0])) if len({each[index] for each in ids}) > 1)
                logits = model(torch.tensor([ids[0][:place]]), logits_to_keep=1).logits[0, -1]
                picked = logits[[each[place] for each in ids]].double()
                answers.append(float(torch.softmax(picked, dim=-1)[0]))
            texts = [
                torch.log_softmax(model(torch.tensor([list(ids)])).logits[0].float(), dim=-1) for ids in self.neutral
            ]
        return answers, texts


def spread(layers: Sequence[int], count: int) -> list[tuple[int, float]]:
    """Cells that are spread over both axes."""
    step = max(1, count - 1)
    return [
        (layers[round(index * (len(layers) - 1) / step)], COEFFICIENTS[(3 * index + 1) % len(COEFFICIENTS)])
        for index in range(count)
    ]


def run(chosen: Setting, cells: int, folder: Path) -> dict[str, Any]:
    model = make_checkpoint(folder / "models", chosen.shape, ["float32"], 0)["float32"]
    make_pairs(folder / "pairs.json", chosen.pairs, chosen.tokens, 0)
    path = write_recipe(folder, model, chosen)
    loop = Loop(path, chosen.shape.blocks)
    wanted = spread(chosen.layers, cells)
    measured = [loop.cell(*cell) for cell in wanted[: cells // 2]]
    del loop.base
    start = time.perf_counter()
    say = functools.partial(print, file=sys.stderr)
    swept = sweep(Job(load_recipe(path), folder / "sweep", say, cache=False))
    seconds = time.perf_counter() - start
    loop = Loop(path, chosen.shape.blocks)
    measured += [loop.cell(*cell) for cell in wanted[cells // 2 :]]
    grid = {(cell["layer"], cell["coefficient"]): cell for cell in swept.data["grid"]}
    differences = {
        key: max(abs(grid[cell["layer"], cell["coefficient"]][key] - cell[key]) for cell in measured)
        for key in ("effect", "damage")
    }
    differences["steered"] = max(
        abs(grid[cell["layer"], cell["coefficient"]]["steered"] - cell["own_steered"]) for cell in measured
    )
    differences["own damage"] = max(
        abs(grid[cell["layer"], cell["coefficient"]]["damage"] - cell["own_damage"]) for cell in measured
    )
    full = sum(cell["full"] for cell in measured) / len(measured)
    bare = sum(cell["build"] + cell["evaluate"] for cell in measured) / len(measured)
    return {
        "shape": str(chosen.shape),
        "grid": f"{len(chosen.layers)} layers x {len(COEFFICIENTS)} coefficients",
        "items": f"{swept.data['splits']['choose']} choosing pairs of {chosen.tokens[0]} to {chosen.tokens[1]} tokens "
        f"and {len(loop.neutral)} neutral passages of {len(loop.neutral[0])}",
        "cells": len(grid),
        "sweep_seconds": seconds,
        "timings": swept.data["timings"],
        "loop_cells": measured,
        "loop_seconds": full * len(grid),
        "bare_loop_seconds": bare * len(grid),
        "ratio": seconds / (full * len(grid)),
        "bare_ratio": (seconds - swept.data["timings"]["report"]) / (bare * len(grid)),
        "differences": differences,
        "largest_effect": max(abs(cell["effect"]) for cell in swept.data["grid"]),
        "largest_damage": max(cell["damage"] for cell in swept.data["grid"]),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
    }


def page(found: dict[str, Any], command: str) -> str:
    """The measurement in Markdown."""
    measured = found["loop_cells"]
    differences = found["differences"]
    report, cells = found["timings"]["report"], found["cells"]

    def row(what: str, seconds: float) -> str:
        return f"| {what} | {seconds / cells:.1f} | {seconds:.0f} s |"

    lines = [
        "# Performance of the sweep",
        "",
        f"`{command}`: {found['shape']}, random weights, fp32; {found['grid']} on {found['items']}.",
        f"{found['machine']}; {found['versions']}. Of the loops, {len(measured)} cells were measured, half before the",
        "sweep and half after it.",
        "",
        "| | a cell, s | all cells |",
        "| --- | --- | --- |",
        row(
            "a loop of `patch-model --link --no-hash`, as it evaluates: effect, controls, guard", found["loop_seconds"]
        ),
        row(
            "a loop of builds without evaluation, each folder evaluated in stock transformers",
            found["bare_loop_seconds"],
        ),
        row("`patch-model sweep`: report, controls and completions included", found["sweep_seconds"]),
        row("of it: everything but the report", found["sweep_seconds"] - report),
        "",
        f"The sweep takes 1/{1 / found['ratio']:.1f} of the first loop; without its report it takes "
        f"1/{1 / found['bare_ratio']:.1f} of the second, which has none.",
        "",
        "The numbers are the same. Beside the folders in stock transformers, effects differ by at most",
        f"{differences['effect']:.1e} (the largest is {found['largest_effect']:.2g}) and KL divergences by "
        f"{differences['damage']:.1e} (the largest is {found['largest_damage']:.2g}). Beside",
        f"the build's own evaluation, they differ by {differences['steered']:.1e} and {differences['own damage']:.1e}. "
        f"Peak memory of the process, loops included: {found['peak_bytes'] / 2**20:.0f} MiB.",
        "",
        "What is saved:",
        "",
        "- The model is loaded once, and nothing is written.",
        "- The activations of all layers are read in one pass.",
        "- What lies before the steered block is computed once for all coefficients, and carried on from layer to "
        "layer.",
        "- The head is computed only where it is read.",
        "- The base's distributions are kept.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="only to see that everything works")
    parser.add_argument("--cells", type=int, default=4, help="cells of the loop that are measured")
    parser.add_argument("--write", type=Path, help="a page")
    parser.add_argument("--json", type=Path, help="the record")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="patch-model-sweep-") as folder:
        found = run(setting(options.tiny), options.cells, Path(folder))
    text = page(found, "python tests/benchmarks/sweep.py" + (" --tiny" if options.tiny else ""))
    print(text)
    if options.write:
        options.write.write_text(text, encoding="utf-8")
    if options.json:
        options.json.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
