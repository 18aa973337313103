"""The clock: every second belongs to one stage."""

from __future__ import annotations

import subprocess
import sys
import threading
from contextlib import contextmanager

import pytest

from patcher.progress.clock import Clock, process_began


class Hands:
    """A time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def hands() -> Hands:
    return Hands()


def test_a_stage_inside_another_one_is_not_counted_twice(hands: Hands) -> None:
    clock = Clock(now=hands)
    with clock.time("capture"):
        hands.wait(1)
        with clock.time("load"):
            hands.wait(2)
            with clock.time("capture"):
                hands.wait(4)
        hands.wait(8)
    hands.wait(16)
    assert clock.timings(("load", "capture", "verify")) == {
        "load": 2.0, "capture": 13.0, "verify": 0.0, "other": 16.0, "total": 31.0,
    }  # fmt: skip


def test_parts_are_in_their_stage(hands: Hands) -> None:
    clock = Clock(began=90.0, now=hands)
    with clock.time("verify"):
        hands.wait(1)
        for part, seconds in (("verify.start", 2), ("verify.base", 4), ("verify.base", 8)):
            with clock.time(part):
                hands.wait(seconds)
    assert clock.timings() == {"start": 10.0, "verify": 15.0, "other": 0.0, "total": 25.0}
    assert clock.parts() == {"verify": {"start": 2.0, "base": 12.0, "other": 1.0}}


def test_time_that_another_process_measured_is_taken_from_the_running_stage(hands: Hands) -> None:
    clock = Clock(now=hands)
    with clock.time("verify"):
        hands.wait(8)
        clock.give("verify.base", 3)
        clock.give("verify.copy", 4)
        clock.give("verify.long", 100)
        hands.wait(2)
    assert clock.timings() == {"verify": 10.0, "other": 0.0, "total": 10.0}
    assert clock.parts() == {"verify": {"base": 3.0, "copy": 4.0, "long": 1.0, "other": 2.0}}


def test_the_shown_sum_is_the_shown_total(hands: Hands) -> None:
    clock = Clock(now=hands)
    for stage in "abcdefgh":
        with clock.time(stage):
            hands.wait(0.00004)
    timings = clock.timings()
    assert timings.pop("total") == sum(timings.values())


def test_a_stage_that_fails_ends(hands: Hands) -> None:
    clock = Clock(now=hands)
    with pytest.raises(ValueError, match="no"), clock.time("load"), clock.time("capture"):
        hands.wait(1)
        raise ValueError("no")
    hands.wait(2)
    assert clock.timings() == {"capture": 1.0, "load": 0.0, "other": 2.0, "total": 3.0}


def test_what_is_opened_is_timed_until_it_is_open(hands: Hands) -> None:
    @contextmanager
    def slow():
        hands.wait(1)
        yield "open"
        hands.wait(2)

    clock = Clock(now=hands)
    with clock.opening("load", slow()) as opened:
        hands.wait(4)
    assert opened == "open" and clock.timings() == {"load": 1.0, "other": 6.0, "total": 7.0}


def test_another_thread_claims_nothing(hands: Hands) -> None:
    clock = Clock(now=hands)

    def beside() -> None:
        with clock.time("hash"):
            hands.wait(1)

    with clock.time("write"):
        thread = threading.Thread(target=beside)
        thread.start()
        thread.join()
    assert clock.timings() == {"write": 1.0, "other": 0.0, "total": 1.0}


def test_the_start_of_the_process_is_before_its_first_line() -> None:
    program = (
        "import time; first = time.perf_counter(); from patcher.progress.clock import process_began; "
        "print(process_began() - first)"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert float(answer.stdout) <= 0.01  # the tick of /proc
    assert process_began() == pytest.approx(process_began(), abs=0.02)
