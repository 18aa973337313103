"""The same vector by every contender, in turns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from capture_parts.material import make_pairs
from capture_parts.setting import Runs, Setting, progress
from capture_parts.tables import Table, mebibytes, seconds
from capture_parts.worker_process import WorkerProcess, interpreter


@dataclass(frozen=True)
class Contender:
    """A row of the table.

    Attributes:
        name: what the table calls it.
        worker: its file in ``capture_workers``.
        environment: where it runs: ``ours``, or a folder of the peers' environments.
        options: of its ``capture``.
        method: our method that makes the same vector.
    """

    name: str
    worker: str
    environment: str = "ours"
    options: Mapping[str, Any] = field(default_factory=dict)
    method: str = "mean_difference"


OURS = Contender("patch-model", "ours")
CONTENDERS = (
    OURS,
    Contender("the way of nrimsky/CAA", "caa"),
    Contender("steering-vectors, batch 1 (default)", "steering_vectors", "steering-vectors", {"batch_size": 1}),
    Contender("steering-vectors, batch 8", "steering_vectors", "steering-vectors", {"batch_size": 8}),
    Contender("repeng, batch 32 (default)", "repeng", "repeng", method="pca"),
)


@dataclass
class Contest:
    """What came of it.

    Attributes:
        pairs: the file of pairs.
        runs: of each contender.
        gemm: of the matrix products that were run in between, in our process.
        cosines: of each contender's vector with ours.
        control: our vector of as many other pairs with ours.
        versions: of each environment.
        threads: that each contender has.
        missing: contenders whose environment is not there.
    """

    pairs: Path
    runs: dict[str, Runs] = field(default_factory=dict)
    gemm: Runs = field(default_factory=Runs)
    cosines: dict[str, float] = field(default_factory=dict)
    control: float = 0.0
    versions: dict[str, Mapping[str, str]] = field(default_factory=dict)
    threads: set[int] = field(default_factory=set)
    missing: list[str] = field(default_factory=list)


@contextmanager
def contest(setting: Setting, folder: Path, dtype: str) -> Iterator[tuple[Contest, WorkerProcess]]:
    """Let all of them make the vector; our process stays, for what is measured next."""
    pairs = make_pairs(setting.scratch / "pairs.json", setting.pairs, setting.tokens, setting.seed)
    two = make_pairs(setting.scratch / "two.json", 2, setting.tokens, setting.seed + 1)
    other_words = make_pairs(setting.scratch / "other.json", setting.pairs, setting.tokens, setting.seed + 2)
    found = Contest(pairs)
    with ExitStack() as ours_stays, ExitStack() as others:
        workers: dict[str, WorkerProcess] = {}
        there = []
        for contender in CONTENDERS:
            if interpreter(contender.environment, setting.peers) is None:
                found.missing.append(contender.name)
                continue
            there.append(contender)
            if contender.worker not in workers:
                stack = ours_stays if contender is OURS else others
                started = setting.start(contender.worker, folder, dtype, contender.environment)
                workers[contender.worker] = stack.enter_context(started)
        for contender in there:
            worker = workers[contender.worker]
            found.versions[contender.environment] = worker.ready["versions"]
            found.threads.add(worker.ready["threads"])
            worker.ask("capture", pairs=str(two), layer=setting.layer, **contender.options)
        ours = workers[OURS.worker]
        ours.ask("capture", pairs=str(pairs), layer=setting.layer, method="pca")
        reference = {"pca": ours.vector()}
        ours.ask("capture", pairs=str(other_words), layer=setting.layer)
        control = ours.vector()
        for turn in range(setting.repeats):
            gemm = ours.ask("gemm", tokens=setting.gemm_tokens, seconds=setting.gemm_seconds)
            found.gemm.answers.append(gemm)
            for contender in there:
                worker = workers[contender.worker]
                answer = worker.ask("capture", pairs=str(pairs), layer=setting.layer, **contender.options)
                found.runs.setdefault(contender.name, Runs()).answers.append(answer)
                progress(f"{dtype}, turn {turn + 1} of {setting.repeats}: {contender.name}: {answer['wall']:.2f} s")
                if contender is OURS:
                    reference["mean_difference"] = worker.vector()
                found.cosines[contender.name] = cosine(worker.vector(), reference[contender.method])
        found.control = cosine(control, reference[OURS.method])
        others.close()
        yield found, ours


def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    """Its size: of a principal component, the sign is a rule of its own."""
    return abs(float(torch.nn.functional.cosine_similarity(one.double(), other.double(), dim=0)))


def table(found: Contest, setting: Setting) -> Table:
    ours = found.runs[OURS.name]
    rows = []
    for name, runs in found.runs.items():
        rows.append(
            [
                name,
                seconds(runs.best("wall")),
                seconds(runs.median("wall")),
                seconds(runs.best("cpu")),
                mebibytes(runs.memory()),
                f"{runs.best('wall') / ours.best('wall'):.2f}",
                f"{runs.best('cpu') / ours.best('cpu'):.2f}",
                f"{found.cosines[name]:.6f}",
            ]
        )
    rows += [[name, *["not run"] * 7] for name in found.missing]
    return Table(
        f"From {setting.pairs} pairs to the vector at layer {setting.layer}",
        ("", "wall s, best", "median", "CPU s, best", "peak MiB", "wall / ours", "CPU / ours", "cosine with ours"),
        rows,
        [
            f"{setting.shape}; prompts of {setting.tokens[0]} to {setting.tokens[1]} tokens; "
            f"turns: {setting.repeats}; threads of each: {', '.join(map(str, sorted(found.threads)))}.",
            "repeng finds a centred principal component at the same token; it is compared with ours, and its sign, "
            "which is a rule of its own, is left out.",
            f"Of as many pairs with the same letters and other words, our vector has a cosine of {found.control:.6f}.",
        ],
    )
