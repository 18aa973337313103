"""How much of our time is arithmetic that nobody can leave out."""

from __future__ import annotations

from typing import Any

from capture_parts.contenders import OURS, Contest
from capture_parts.setting import Setting
from capture_parts.tables import Table, seconds
from capture_parts.worker_process import WorkerProcess

ENOUGH = 0.6
"""The share of the floor below which the table says where the time goes."""


def tables(found: Contest, ours: WorkerProcess, setting: Setting, record: dict[str, Any]) -> list[Table]:
    work = ours.ask("count", pairs=str(found.pairs), layer=setting.layer)
    runs = found.runs[OURS.name]
    operations = work["linear"] + work["attention"]
    floors = {clock: operations / found.gemm.most(f"{clock}_rate") for clock in ("wall", "cpu")}
    shares = {clock: floors[clock] / runs.best(clock) for clock in ("wall", "cpu")}
    record["floor"] = {"work": work, "seconds": floors, "share": shares}
    fastest = runs.fastest
    rows = [
        ["matrix products, best rate (GFLOP/s)"]
        + [f"{found.gemm.most(f'{clock}_rate') / 1e9:,.1f}" for clock in ("wall", "cpu")],
        ["the floor (s)", *(seconds(floors[clock]) for clock in ("wall", "cpu"))],
        ["ours, best (s)", *(seconds(runs.best(clock)) for clock in ("wall", "cpu"))],
        ["the floor's share of ours", *(f"{shares[clock]:.0%}" for clock in ("wall", "cpu"))],
    ]
    floor = Table(
        "The floor: the arithmetic alone, at the rate of matrix products",
        ("", "wall time", "CPU time"),
        rows,
        [
            f"Prompts have {work['whole']:,} tokens, {work['distinct']:,} where what they begin with alike is counted "
            f"once; {fastest['tokens']:,} were run, with what fills up rows and the prompt that is checked alone. "
            f"Blocks 0 to {setting.layer}: {work['linear'] / 1e9:,.1f} GFLOP in matrix products with weights, "
            f"{work['attention'] / 1e9:,.1f} in attention. The rate is that of a block's own products at "
            f"{setting.gemm_tokens:,} tokens, measured in our process before each turn.",
        ],
    )
    stages = dict(sorted(fastest["stages"].items(), key=lambda item: -item[1]))
    stages["the rest"] = max(0.0, fastest["wall"] - sum(stages.values()))
    parts = Table(
        "Our best turn, by what was done",
        ("", "wall s", "share"),
        [[name, seconds(spent), f"{spent / fastest['wall']:.0%}"] for name, spent in stages.items()],
    )
    if shares["wall"] >= ENOUGH:
        return [floor, parts]
    return [floor, parts, _operators(found, ours, setting)]


def _operators(found: Contest, ours: WorkerProcess, setting: Setting) -> Table:
    profiled = ours.ask("profile", pairs=str(found.pairs), layer=setting.layer, top=12)
    return Table(
        "Where the time goes (torch.profiler, time in the operator itself)",
        ("", "calls", "CPU s", "share"),
        [
            [
                f"`{operator['name']}`",
                f"{operator['calls']:,}",
                seconds(operator["seconds"]),
                f"{operator['seconds'] / profiled['total']:.0%}",
            ]
            for operator in profiled["operators"]
        ],
    )
