"""The line about seconds adds up."""

from __future__ import annotations

import random
import re

from patcher.cli.seconds import seconds_line


def test_parts_stand_in_brackets_where_they_matter() -> None:
    timings = {"start": 0.31, "plan": 0.04, "verify": 4.26, "card": 0.4, "other": 0.02, "total": 5.03}
    parts = {"verify": {"start": 0.06, "base": 2.0, "copy": 2.2}, "card": {"pictures": 0.4}}
    assert seconds_line(timings, parts) == (
        "start 0.3 s, verify 4.3 s (start 0.1, base 2.0, copy 2.2), card 0.4 s, total 5.0 s"
    )


def test_what_is_shown_adds_up() -> None:
    rng = random.Random(0)
    for _ in range(200):
        stages = {name: round(rng.expovariate(1), 4) for name in "abcdefghij"}
        parts = {"a": {"x": stages["a"] / 3, "y": stages["a"] / 3, "z": stages["a"] / 3}}
        line = seconds_line({**stages, "total": sum(stages.values())}, parts)
        inside = re.search(r"a ([\d.]+) s \((.*?)\)", line)
        if inside:
            assert round(sum(float(word.split()[1]) for word in inside[2].split(", ")), 1) == float(inside[1])
        shown = [float(number) for number in re.findall(r"([\d.]+) s", line)]
        assert round(sum(shown[:-1]), 1) == shown[-1] and abs(shown[-1] - sum(stages.values())) <= 0.0501
