"""What a run of the benchmark is about, and its measurements."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from capture_parts.material import FULL, TINY, Shape
from capture_parts.worker_process import WorkerProcess, interpreter


@dataclass(frozen=True)
class Growing:
    """What grows: pairs, tokens of a prompt, the layer that is read.

    Each grows beside the least number of pairs and the middle one of the others.
    """

    pairs: tuple[int, ...]
    tokens: tuple[int, ...]
    layers: tuple[int, ...]


@dataclass(frozen=True)
class Setting:
    """What is measured.

    Attributes:
        scratch: a temporary folder.
        peers: the folder of the other libraries' environments.
        shape: of the model.
        layer: the block that is read.
        pairs: how many contrast pairs.
        tokens: the least and the greatest length of a prompt.
        repeats: how often everything is run.
        growing: of the table about growth.
        gemm_tokens: rows of the matrix products whose rate is measured.
        gemm_seconds: how long, each time.
        seed: of weights and pairs.
    """

    scratch: Path
    peers: Path
    shape: Shape
    layer: int
    pairs: int
    tokens: tuple[int, int]
    repeats: int
    growing: Growing
    gemm_tokens: int = 1024
    gemm_seconds: float = 1.5
    seed: int = 0

    def start(self, contender: str, folder: Path, dtype: str, environment: str = "ours") -> WorkerProcess:
        """A contender's process.

        Raises:
            FileNotFoundError: there is no such environment.
        """
        python = interpreter(environment, self.peers)
        if python is None:
            raise FileNotFoundError(f"{self.peers / environment}: run tests/published_environments.sh {self.peers}")
        return WorkerProcess(contender, python=python, folder=folder, dtype=dtype, scratch=self.scratch)


def setting(*, tiny: bool, scratch: Path, peers: Path, pairs: int | None, repeats: int) -> Setting:
    """The full size, or one that is only good to see that everything works."""
    if tiny:
        growing = Growing((2, 4, 8), (30, 60, 120), (0, 1, 3))
        return Setting(scratch, peers, TINY, 1, pairs or 4, (40, 80), repeats, growing, 128, 0.05)
    growing = Growing((4, 8, 16), (60, 120, 240), (5, 11, 23))
    return Setting(scratch, peers, FULL, 11, pairs or 16, (60, 200), repeats, growing)


@dataclass
class Runs:
    """What the repeats of one thing cost."""

    answers: list[Mapping[str, Any]] = field(default_factory=list)

    def best(self, what: str) -> float:
        return min(float(answer[what]) for answer in self.answers)

    def most(self, what: str) -> float:
        return max(float(answer[what]) for answer in self.answers)

    def median(self, what: str) -> float:
        return statistics.median(float(answer[what]) for answer in self.answers)

    @property
    def fastest(self) -> Mapping[str, Any]:
        return min(self.answers, key=lambda answer: float(answer["wall"]))

    def memory(self, what: str = "peak") -> int | None:
        """The greatest ``peak`` or ``rise`` of memory, None where it is not known."""
        peaks = [answer[what] for answer in self.answers]
        return None if None in peaks else max(peaks)


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
