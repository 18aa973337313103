"""The page docs/performance.md."""

from __future__ import annotations

import datetime
from collections.abc import Sequence

from build_parts.contest import AGAIN, BY_HAND, LIBRARY, OURS, Task, Turns
from build_parts.whole_process import Cost
from capture_parts.tables import Table, mebibytes, seconds

INTRODUCTION = """\
Each builder is a whole process: from what one types to the prompt of the shell, imports included. They take turns:
ours, the script, the library, and again. All have the same base (a Qwen2 of random weights, in the file cache) and
read the same prompts. What they leave is removed, and the disk synced, before the next turn.

- **patch-model** is the default build, without any option. It reads {prompts} prompts, measures what the vector does
  (held-out questions, random vectors, neutral text, completions), writes the copy, hashes the base, verifies the copy
  against a hook in another process, and writes the card and the pictures. Its cache, which keeps proofs and
  activations, is empty. "Once more" is the same build with the cache that the first one left.
- **the script** ([by_hand.py](../tests/benchmarks/build_scripts/by_hand.py)) is what anyone writes in ten minutes. It
  loads the model in the checkpoint's dtype, reads one prompt at a time, puts a bias on the module and calls
  `save_pretrained`. It measures nothing and checks nothing. Nor is its copy steered: stock Qwen2 has no such bias,
  and drops the vector when the copy is loaded.
- **steering-vectors**
  ([with_steering_vectors.py](../tests/benchmarks/build_scripts/with_steering_vectors.py)) is the same with that
  library's `train_steering_vector`, in an environment of its own.

CPU seconds are user and system time of all processes. Memory is what was resident at most: in the largest process,
and in all at the same time; of what two processes map, a page counts twice there. The tokenizer is byte-level BPE
with {vocabulary} tokens, trained on Python's documentation and library and on the words of the questions. Other pages:
[reading activations](performance-capture.md), [writing a copy](performance-write.md),
[the sweep](performance-sweep.md), [running a copy](performance-serving.md).
"""


def page(
    facts: Sequence[tuple[str, str]],
    found: Sequence[tuple[Task, Turns]],
    quickstart: Sequence[Cost],
    vocabulary: int,
    command: str,
) -> str:
    """Markdown: ratios on top, then how to read them, then each task by stage."""
    today = datetime.datetime.now(datetime.timezone.utc).date()
    prompts = 2 * found[0][0].questions.pairs
    parts = [
        "# Performance: what a build costs",
        f"Measured on {today} by one run of",
        "```\ntests/published_environments.sh        # once: the environment of steering-vectors\n" + command + "\n```",
        "which writes this page.",
        ratios(found).markdown(),
        *([_quickstart(quickstart)] if quickstart else []),
        "## How it was measured",
        INTRODUCTION.format(prompts=prompts, vocabulary=f"{vocabulary:,}").strip(),
        "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in facts)]),
    ]
    for task, turns in found:
        parts += [f"## {task.title}", *(table.markdown() for table in tables(task, turns))]
    return "\n\n".join(parts) + "\n"


def ratios(found: Sequence[tuple[Task, Turns]]) -> Table:
    """Of each task, wall seconds and ours beside the others."""
    rows = []
    for task, turns in found:
        ours, walls = turns.best(OURS).wall, []
        for name in (BY_HAND, LIBRARY):
            walls.append(f"{turns.best(name).wall:.1f}" if name in turns.costs else "not run")
        beside = [f"{ours / turns.best(name).wall:.2f}" if name in turns.costs else "" for name in (BY_HAND, LIBRARY)]
        rows.append([task.title, f"{ours:.1f}", *walls, f"**{beside[0]}**", beside[1]])
    columns = ("", "patch-model, s", "script, s", "steering-vectors, s", "ours / script", "ours / steering-vectors")
    return Table("A whole build, beside a script that only makes the copy", columns, rows, ["Wall seconds, best turn."])


def tables(task: Task, turns: Turns) -> list[Table]:
    """What each builder cost, and where its time went."""
    ours = turns.best(OURS)
    rows = []
    for name in (OURS, AGAIN, BY_HAND, LIBRARY):
        if name not in turns.costs:
            rows += [[name, *["not run"] * 7]] if name == LIBRARY else []
            continue
        best, costs = turns.best(name), turns.costs[name]
        cpu = min(cost.cpu for cost in costs)
        memory = (max(cost.largest for cost in costs), max(cost.together for cost in costs))
        ratio = (best.wall / ours.wall, cpu / min(cost.cpu for cost in turns.costs[OURS]))
        rows.append([name, seconds(best.wall), seconds(turns.median(name)), seconds(cpu), *map(mebibytes, memory)])
        rows[-1] += [f"{each:.2f}" for each in ratio]
    columns = ("", "wall s, best", "median", "CPU s, best", "peak MiB, largest process", "all together")
    whole = Table(
        "The whole process",
        (*columns, "wall / ours", "CPU / ours"),
        rows,
        [
            f"{task.parameters / 1e6:,.0f} million parameters; {2 * task.questions.pairs} prompts of "
            f"{task.questions.tokens:.1f} tokens on average; layer {task.layer}; turns: {len(turns.costs[OURS])}.",
        ],
    )
    return [whole, *_stages(turns)]


def _stages(turns: Turns) -> list[Table]:
    """Ours by stage and part, and the others'."""
    stages, parts = turns.stages_of_best(OURS), turns.parts_of_best()
    total = sum(stages.values())
    rows = []
    for stage, taken in stages.items():
        rows.append([stage, seconds(taken), f"{taken / total:.0%}"])
        within = parts.get(stage, {}).items()
        rows += [[f"- {part}", seconds(spent), f"{spent / total:.0%}"] for part, spent in within]
    found = [Table("patch-model's best turn, by stage", ("", "wall s", "share"), rows)]
    others = {name: turns.stages_of_best(name) for name in (BY_HAND, LIBRARY) if name in turns.costs}
    if others:
        names = list(dict.fromkeys(stage for each in others.values() for stage in each))
        rows = [[stage, *(seconds(each[stage]) for each in others.values())] for stage in names]
        found.append(Table("The others' best turns, by stage, wall s", ("", *others), rows))
    return found


def _quickstart(costs: Sequence[Cost]) -> str:
    best = min(costs, key=lambda cost: cost.wall)
    return (
        f"The quickstart (`patch-model recipes/quickstart.yaml`), whole process, empty cache: "
        f"**{best.wall:.1f} s** wall, {best.cpu:.1f} s CPU (best of {len(costs)})."
    )
