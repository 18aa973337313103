"""How often a sweep recommends a cell where the pairs mean nothing: at most 5 % of sweeps may.

    python tests/benchmarks/sweep_noise.py [--sweeps 100] [--pairs 120] [--first 0] [--json FILE]

The model is the quickstart's. Every other sweep is over its questions with the matching answer drawn by lot, the others
are over pairs whose two sides are drawn from one pool of texts. Each has a seed of its own, and is a whole sweep, from
the recipe to the recommendation, in this process.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patcher.build.job import Job, silent
from patcher.demo import demo_folder
from patcher.recipe.file import load_recipe
from patcher.sweep.pipeline import sweep

KINDS = ("questions", "texts")
MOST = 0.05


@dataclass(frozen=True)
class Outcome:
    """Of one sweep over noise.

    Attributes:
        kind: of the pairs.
        chosen, recommended: layer and coefficient, or None.
        default: of the best fixed default that is named as confirmed, or None.
        reason: in the sweep's words.
    """

    kind: str
    chosen: dict[str, Any] | None
    recommended: dict[str, Any] | None
    default: dict[str, Any] | None
    reason: str


def questions_by_lot(count: int, lot: random.Random) -> list[dict[str, str]]:
    """The quickstart's questions; which of the two answers is the matching one is drawn."""
    rows = [json.loads(line) for line in (demo_folder() / "pairs.jsonl").read_text().splitlines()]
    matching, other = "answer_matching_behavior", "answer_not_matching_behavior"
    turned = [{**row, matching: row[other], other: row[matching]} if lot.random() < 0.5 else row for row in rows]
    return lot.sample(turned, min(count, len(turned)))


def texts_of_one_pool(count: int, lot: random.Random) -> list[dict[str, str]]:
    """Pairs of texts that the model knows the words of; both sides are drawn from the same ones."""
    rows = [json.loads(line) for line in (demo_folder() / "pairs.jsonl").read_text().splitlines()]
    answers = [row[key] for row in rows for key in ("answer_matching_behavior", "answer_not_matching_behavior")]
    neutral = (demo_folder() / "neutral.txt").read_text().split(".")
    pool = {f"{part.strip()}. I called it{lot.choice(answers)}." for part in neutral if part.strip()}
    pool |= {row["question"].partition("?")[0] + f"?{lot.choice(answers)}." for row in rows}
    texts = lot.sample(sorted(pool), min(2 * count, len(pool) // 2 * 2))
    return [{"positive": one, "negative": other} for one, other in zip(texts[0::2], texts[1::2], strict=True)]


def sweep_of_noise(kind: str, pairs: int, seed: int, folder: Path, *overrides: str) -> Outcome:
    """One sweep.

    Args:
        kind: one of ``KINDS``.
        pairs: how many there are at most.
        seed: of the drawing, and of the recipe.
        folder: empty, or not there; for the recipe and the results.
    """
    lot = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    rows = questions_by_lot(pairs, lot) if kind == "questions" else texts_of_one_pool(pairs, lot)
    (folder / "pairs.json").write_text(json.dumps(rows))
    vector = {"pairs": "pairs.json", "layer": "auto", "coefficient": "auto", "scale": 7}
    if kind == "questions":
        vector |= {"format": "ab", "position": "answer"}
    evaluate = {"neutral": str(demo_folder() / "neutral.txt"), "prompts": [], "generate_tokens": 0}
    recipe = {"model": str(demo_folder() / "model"), "seed": seed, "vectors": [vector], "evaluate": evaluate}
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    found = sweep(Job(load_recipe(folder / "recipe.yaml", overrides), folder / "out", silent, cache=False)).data
    default = found["best_default"]
    named = default if default is not None and default["confirmed"] else None
    return Outcome(kind, found["chosen"], found["recommended"], named, found["reason"])


def outcomes(numbers: Sequence[int], pairs: int) -> Iterator[Outcome]:
    """One sweep for each number."""
    with tempfile.TemporaryDirectory() as folder:
        for number in numbers:
            yield sweep_of_noise(KINDS[number % len(KINDS)], pairs, number, Path(folder) / str(number))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweeps", type=int, default=100)
    parser.add_argument("--pairs", type=int, default=120, help="of each sweep; a fifth is chosen on, a fifth kept back")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every outcome")
    options = parser.parse_args()
    found = []
    for number, outcome in enumerate(outcomes(range(options.first, options.first + options.sweeps), options.pairs), 1):
        found.append(outcome)
        told = "recommended" if outcome.recommended else "nothing recommended"
        print(f"{number:4} {outcome.kind:10} {told}: {outcome.reason}", flush=True)
    if options.json:
        options.json.write_text(json.dumps([vars(outcome) for outcome in found], indent=1) + "\n")
    for kind in KINDS:
        of_kind = [outcome for outcome in found if outcome.kind == kind]
        told = [outcome.recommended for outcome in of_kind if outcome.recommended]
        chosen = sum(outcome.chosen is not None for outcome in of_kind)
        named = [outcome.default for outcome in of_kind if outcome.default]
        print(
            f"{kind}: {len(told)} of {len(of_kind)} recommended {told}; {chosen} chosen on the choosing items;", end=" "
        )
        print(f"{len(named)} with a default that is confirmed {[(one['name']) for one in named]}")
    share = sum(outcome.recommended is not None for outcome in found) / len(found)
    print(f"recommended out of noise: {share:.1%} of {len(found)} sweeps (at most {MOST:.0%} may be)")
    raise SystemExit(share > MOST)


if __name__ == "__main__":
    main()
