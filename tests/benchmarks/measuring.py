"""What a token costs to read and to measure: capture and evaluation of a recipe side by side.

    python tests/benchmarks/measuring.py RECIPE [--set KEY=VALUE ...]

Tokens are full-depth passes (tokens times blocks computed, over all blocks), counted as they are computed.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from patcher.build.base_run import BaseRun
from patcher.build.job import Job, silent
from patcher.build.planning import plan_build, with_weights
from patcher.capture.opened import OpenedBase
from patcher.capture.reader import ResidualReader
from patcher.checkpoint.prepare import prepared_base
from patcher.evaluate.of_build import evaluate_build
from patcher.recipe.file import load_recipe
from patcher.vectors.steering_vector import sum_by_layer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--set", action="append", default=[], dest="keys")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        job = Job(load_recipe(options.recipe, tuple(options.keys)), Path(scratch) / "out", say=silent, cache=False)
        planned = with_weights(job, plan_build(job, writes=False))
        stripped = planned.reading.stripped
        with prepared_base(planned.source, job.loaded, job.output, silent, planned.adapter, stripped) as base:
            run = BaseRun.of(job, planned, base)

            def work(opened: OpenedBase, reader: ResidualReader) -> list[tuple[str, float, float, float]]:
                meter, started, used = opened.logits.meter, time.perf_counter(), time.process_time()
                found = run.find_vectors(planned.prepared, reader, opened.tokenizer)
                rows = [("capture", meter.spent, time.perf_counter() - started, time.process_time() - used)]
                spent, started, used = meter.spent, time.perf_counter(), time.process_time()
                run.measure_in_half(opened)
                vectors = sum_by_layer(found)
                evaluation, _notes = evaluate_build(
                    job.loaded, planned.prepared, opened, found, vectors, vectors, silent, job.clock
                )
                taken = time.perf_counter() - started, time.process_time() - used
                rows.append(("evaluate", meter.spent - spent, *taken))
                print_evaluation(evaluation or {}, job.clock.parts().get("evaluate", {}))
                return rows

            for name, tokens, seconds, cpu in run.run(work):
                rate = f"{tokens / seconds:8.1f} tokens/s, {tokens / cpu:8.1f} tokens a CPU second"
                print(f"{name:10} {tokens:9,.0f} full-depth tokens {seconds:8.2f} s {cpu:8.2f} CPU s {rate}")


def print_evaluation(evaluation: dict[str, Any], parts: dict[str, float]) -> None:
    """The budget, and the seconds of each part."""
    print(evaluation.get("budget"), evaluation.get("dtype"))
    print({part: round(seconds, 2) for part, seconds in parts.items()})


if __name__ == "__main__":
    main()
