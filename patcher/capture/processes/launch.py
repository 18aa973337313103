"""Several processes on one build, as torchrun starts them: who is who. Nothing heavy is imported."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

from patcher.errors import InputError

_VARIABLES = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_NAME",
    "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
)  # fmt: skip


@dataclass(frozen=True)
class World:
    """This process among those of one build.

    Attributes:
        rank: 0 is the one that builds.
        size: how many there are.
        local_rank: the same on this machine; the index of the device it uses.
        local_size: how many there are on this machine.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int

    @property
    def several(self) -> bool:
        return self.size > 1

    @property
    def name(self) -> str:
        """For errors: which process, and where."""
        return f"process {self.rank} of {self.size}, on {socket.gethostname()}"


def world() -> World:
    """What torchrun (or another launcher that sets its variables) says; one process where it says nothing.

    Raises:
        InputError: the variables contradict each other.
    """
    found = {name: os.environ.get(name, "") for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")}
    if found["WORLD_SIZE"] in ("", "0", "1"):
        return World(0, 1, 0, 1)
    numbers = {name: int(value) if value.isascii() and value.isdigit() else None for name, value in found.items()}
    size, rank, local_rank = numbers["WORLD_SIZE"], numbers["RANK"], numbers["LOCAL_RANK"]
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if size is None or rank is None or local_rank is None or rank >= size or missing:
        shown = ", ".join(f"{name}={value!r}" for name, value in found.items())
        raise InputError(
            "WORLD_SIZE asks for several processes, but the other variables of such a launch are missing or wrong",
            where="environment",
            found=shown + (f"; no {', '.join(missing)}" if missing else ""),
            remedy="start with torchrun --nproc-per-node N -m patcher RECIPE, or unset WORLD_SIZE",
        )
    return World(rank, size, local_rank, numbers["LOCAL_WORLD_SIZE"] or size)


def forget_launch() -> None:
    """Take the launcher's variables out of the environment: from now on this process and its children are alone."""
    for name in list(os.environ):
        if name in _VARIABLES or name.startswith("TORCHELASTIC_"):
            del os.environ[name]
