"""This package, doing what a build does once its model is loaded; and what the other tables need of it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from patcher.architectures.analysis import Architecture
from patcher.capture import reader as reader_module
from patcher.capture.batches import Batch, common_prefix
from patcher.capture.forward import forward
from patcher.capture.model import load_causal_lm
from patcher.capture.products import available, product
from patcher.capture.reader import ResidualReader, reader_in_memory
from patcher.capture.residuals import Runner
from patcher.recipe.file import LoadedRecipe
from patcher.recipe.schema import Recipe
from patcher.vectors.finding import find_vectors, prepare_vectors
from patcher.vectors.prepared import PreparedVector

Json = dict[str, Any]


class Stages:
    """Seconds of wall time by the name of what was done."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


class Watched:
    """A runner whose batches are kept and whose time is taken; it can leave out the computing."""

    def __init__(self, runner: Runner, stages: Stages, *, computes: bool = True) -> None:
        self.runner, self.stages, self.computes = runner, stages, computes
        self.hidden, self.dtype = runner.hidden, runner.dtype
        self.batches: list[Batch] = []

    def run(self, batches: Sequence[Batch], layers: Sequence[int], collect: Any, progress: Any = None) -> None:
        self.batches += batches
        if self.computes:
            with self.stages.time("the blocks"):
                self.runner.run(batches, layers, collect, progress)

    @property
    def tokens(self) -> int:
        """Tokens that were run, what fills up rows included."""
        return sum(batch.shape[0] * batch.shape[1] for batch in self.batches)


class Contender:
    def __init__(self, folder: Path, dtype: str) -> None:
        self.folder = folder
        self.model, self.tokenizer = load_causal_lm(folder, dtype=getattr(torch, dtype))
        self.blocks = Architecture(self.model.config).blocks
        self.proof: Callable[..., Any] = reader_module.exactness

    def capture(self, pairs: str, layer: int | list[int], method: str = "mean_difference") -> Json:
        """From the file of pairs to the vector, [layers, hidden] where there are several."""
        stages = Stages()
        with stages.time("the architecture"):
            architecture = Architecture(self.model.config)
        with stages.time("reading and tokenising the pairs"):
            prepared = self.prepared(pairs, layer, method, architecture)
        runner, reader = self.reader(architecture, stages)
        vectors = find_vectors(prepared, reader, neutral=[])
        values = torch.stack([vector.values for vector in vectors])
        found = values if isinstance(layer, list) else values[0]
        return {"vector": found, "stages": stages.seconds, "tokens": runner.tokens, "batches": len(runner.batches)}

    def count(self, pairs: str, layer: int) -> Json:
        """How much work there is; nothing is computed.

        Returns:
            ``whole``: tokens of all prompts; ``distinct``: those that are left when what prompts begin with alike is
            counted once; ``linear`` and ``attention``: floating-point operations of blocks 0 to ``layer`` for those.
        """
        architecture = Architecture(self.model.config)
        (entry,) = self.prepared(pairs, layer, "mean_difference", architecture)
        prompts = sorted(tuple(side.ids) for pair in entry.pairs for side in (pair.positive, pair.negative))
        starts = [0, *(common_prefix(one, other) for one, other in itertools.pairwise(prompts))]
        depths = [depth for start, ids in zip(starts, prompts, strict=True) for depth in range(start, len(ids))]
        config: Any = self.model.config
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        seen = sum(depth + 1 for depth in depths)
        return {
            "whole": sum(map(len, prompts)),
            "distinct": len(depths),
            "linear": 2 * len(depths) * self.weights(layer),
            # Two products with everything that a token sees: of its query with the keys, and of the values.
            "attention": 4 * seen * config.num_attention_heads * head * (layer + 1),
        }

    def gemm(self, tokens: int, seconds: float) -> Json:
        """The best rate of a block's matrix products, in operations a second: of wall time, and of CPU time.

        Torch's linear layers and, where we use it, oneDNN in turn: the rate is that of the faster one.
        """
        (list_of_blocks,) = (self.model.get_submodule(self.blocks),)
        wall_rate = cpu_rate = 0.0
        began, number = time.perf_counter(), 0
        with torch.no_grad():
            # Block after block, so that the weights come from where they come from in a forward pass.
            while number < 5 or time.perf_counter() - began < seconds:
                block = list_of_blocks[number % len(list_of_blocks)]  # type: ignore[index]
                products = [
                    (torch.randn(tokens, module.in_features, dtype=module.weight.dtype), module)
                    for module in block.modules()
                    if isinstance(module, torch.nn.Linear)
                ]
                fast = available() and number % 2 == 1
                wall, cpu = time.perf_counter(), time.process_time()
                for inputs, module in products:
                    product(module, inputs) if fast else module(inputs)
                wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
                work = 2 * tokens * sum(module.weight.numel() for _inputs, module in products)
                wall_rate, cpu_rate = max(wall_rate, work / wall), max(cpu_rate, work / cpu)
                number += 1
        return {"wall_rate": wall_rate, "cpu_rate": cpu_rate}

    def batch(self, pairs: str, layer: int) -> Json:
        """Make the batches in which the pairs are read, for :meth:`stock_forward`."""
        architecture = Architecture(self.model.config)
        runner, reader = self.reader(architecture, Stages(), computes=False)
        (entry,) = self.prepared(pairs, layer, "mean_difference", architecture)
        sides = [side for pair in entry.pairs for side in (pair.positive, pair.negative)]
        reader.read([(sides, [layer])])
        self.batches = runner.batches
        return {"tokens": runner.tokens, "batches": len(runner.batches)}

    def stock_forward(self) -> Json:
        """The whole model, logits of one token a row, over those batches."""
        for batch in self.batches:
            forward(self.model, batch.inputs_in(self.model.dtype))
        return {}

    def profile(self, pairs: str, layer: int, top: int) -> Json:
        """The operators that take most of the CPU time themselves."""
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            self.capture(pairs, layer)
        events = sorted(profiled.key_averages(), key=lambda event: -event.self_cpu_time_total)
        total = sum(event.self_cpu_time_total for event in events)
        return {
            "operators": [
                {"name": event.key, "calls": event.count, "seconds": event.self_cpu_time_total / 1e6}
                for event in events[:top]
            ],
            "total": total / 1e6,
        }

    def weights(self, layer: int) -> int:
        """How many weights the matrix products of blocks 0 to ``layer`` have."""
        blocks: Any = self.model.get_submodule(self.blocks)
        return sum(weight.numel() for block in blocks[: layer + 1] for weight in block.parameters() if weight.ndim == 2)

    def prepared(
        self, pairs: str, layer: int | list[int], method: str, architecture: Architecture
    ) -> list[PreparedVector]:
        """What a build makes of a recipe before it runs the model."""
        vector: Json = {"name": "benchmark", "pairs": Path(pairs).name, "format": "ab", "layer": layer}
        vector |= {"method": "pca", "center": True} if method == "pca" else {"method": method}
        recipe = Recipe.model_validate({"model": str(self.folder), "vectors": [vector], "evaluate": {"enabled": False}})
        loaded = LoadedRecipe(recipe, "", Path(pairs).with_name("recipe.yaml"))
        return prepare_vectors(loaded, self.tokenizer, architecture.block_count)

    def reader(
        self, architecture: Architecture, stages: Stages, *, computes: bool = True
    ) -> tuple[Watched, ResidualReader]:
        """The reader of a build, watched."""

        def timed_proof(*arguments: Any) -> Any:
            with stages.time("proof that prompts may share tokens"):
                return self.proof(*arguments)

        reader_module.exactness = timed_proof
        made = reader_in_memory(self.model, architecture)
        runner = Watched(made.runner, stages, computes=computes)
        return runner, replace(made, runner=runner)
