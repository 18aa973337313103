"""The stock stacks by name, and what a stack may do with a copy. Nothing heavy is imported: the recipe needs it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final, Literal, get_args

Stack = Literal["transformers", "vllm", "llama.cpp"]
STACKS: tuple[Stack, ...] = get_args(Stack)
TRANSFORMERS: Final = "transformers"
VLLM: Final = "vllm"
LLAMA_CPP: Final = "llama.cpp"

LABELS: Mapping[Stack, str] = {TRANSFORMERS: "transformers", VLLM: "vLLM", LLAMA_CPP: "llama.cpp"}
"""What people call them."""

Support = Literal["native", "backend", "no"]
"""How a stack reads a copy: by its own class, through its backend for transformers' classes, or not at all."""

UNREAD: Mapping[str, Support] = dict.fromkeys(STACKS, "no")
TRANSFORMERS_ALONE: Mapping[str, Support] = {**UNREAD, TRANSFORMERS: "native"}
"""What is known of a class that nobody has tried in another stack."""


def demanded_stacks(targets: Iterable[str] | Literal["auto"]) -> tuple[str, ...]:
    """The stacks that must read a route, of the recipe's ``targets``."""
    return (TRANSFORMERS,) if targets == "auto" else tuple(targets)
