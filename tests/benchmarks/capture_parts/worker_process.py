"""A contender's process, as the benchmark sees it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors.torch import load_file

WORKERS = Path(__file__).parents[1] / "capture_workers"
REPOSITORY = Path(__file__).parents[3]
_OF_PEERS = ("steering_vectors", "repeng")
_OF_OURS = ("patcher",)


class WorkerProcess:
    """A contender that has loaded its model and waits for actions.

    Args:
        contender: the name of its file in ``capture_workers``.
        python: the interpreter of its environment.
        folder: the checkpoint.
        dtype: what it computes in.
        scratch: a folder for its log and its vectors.
    """

    def __init__(self, contender: str, *, python: Path, folder: Path, dtype: str, scratch: Path) -> None:
        self.contender = contender
        self._saved = scratch / f"{contender}-{os.urandom(4).hex()}.safetensors"
        self._log = self._saved.with_suffix(".log")
        self._ready: dict[str, Any] | None = None
        ours = contender in ("ours", "from_disk")
        command = [python, "-I", WORKERS / "serve.py", WORKERS / f"{contender}.py", folder, dtype]
        command += ["--path", REPOSITORY] if ours else []
        for module in _OF_PEERS if ours else _OF_OURS:
            command += ["--forbid", module]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [str(part) for part in command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                encoding="utf-8",
                env={
                    **os.environ,
                    "HF_HUB_OFFLINE": "1",
                    "CUDA_VISIBLE_DEVICES": "",
                    "TOKENIZERS_PARALLELISM": "false",
                },
            )

    @property
    def ready(self) -> dict[str, Any]:
        """What it said once it had loaded the model: ``loaded`` (bytes), ``threads``, ``versions``."""
        if self._ready is None:
            self._ready = self._receive()
        return self._ready

    def ask(self, action: str, **arguments: Any) -> dict[str, Any]:
        """Let it do something: what that cost and gave (``wall``, ``cpu``, ``peak``, ...).

        Raises:
            RuntimeError: it failed.
        """
        assert self.ready and self._process.stdin
        request = {"do": action, "with": arguments, "save": str(self._saved)}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        found = self._receive()
        if "error" in found:
            raise RuntimeError(f"{self.contender}: {action} failed\n{found['error']}")
        return found

    def vector(self) -> torch.Tensor:
        """The vector that its last capture made, fp32."""
        return load_file(self._saved)["vector"]

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            said = self._log.read_text(encoding="utf-8", errors="replace")
            raise RuntimeError(f"{self.contender}: its process ended ({self._process.wait()})\n{said[-4000:]}")
        found: dict[str, Any] = json.loads(line)
        return found

    def __enter__(self) -> WorkerProcess:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        if self._process.stdin:
            self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout:
            self._process.stdout.close()


def interpreter(environment: str, peers: Path) -> Path | None:
    """The Python of ``ours`` (this one), or of a peer's environment; None where that is not there."""
    if environment == "ours":
        return Path(sys.executable)
    found = peers.absolute() / environment / "bin" / "python"
    return found if found.exists() else None
