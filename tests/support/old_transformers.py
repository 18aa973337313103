"""What older releases of transformers that pyproject.toml allows cannot do yet; each entry was read in their source."""

from __future__ import annotations

import re

import pytest
import transformers

INSTALLED = tuple(int(part) for part in re.findall(r"\d+", transformers.__version__)[:2])

# A fixture or a model type -> the first release that computes it, and what an older one does.
FIXED_IN = {
    "openbmb--MiniCPM3-4B": ((5, 21), "demands a `factor` in its rope, which the released config has not"),
    "doge": ((5, 18), "drops its causal mask where nothing is padded"),
    "zamba2 with two shared transformers": ((5, 17), "ties other blocks than its adapters are made for"),
}


def is_too_old(name: str) -> bool:
    return name in FIXED_IN and FIXED_IN[name][0] > INSTALLED


def skip_if_too_old(name: str) -> None:
    if is_too_old(name):
        pytest.skip(f"{name}: transformers {transformers.__version__} {FIXED_IN[name][1]}")
