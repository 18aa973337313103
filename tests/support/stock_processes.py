"""Stock processes of the tests: forks of one that has imported torch and transformers, and nothing of this project.

A build runs the base and the copy in a new interpreter each, of whose time most goes into imports. Tests that are not
about those processes take a fork of a process that was started in the same way and has done the imports already.
Program and client are in this file; the program, which is started with ``python -I``, sees only the standard library,
torch and transformers.
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

_READ_BY_IMPORTS = ("CUDA", "HF_", "KMP_", "LD_", "MALLOC", "MKL_", "OMP_", "PYTHON", "TORCH_", "TRANSFORMERS_")
"""Beginnings of the variables that count when something is imported, or earlier."""


class StockProcesses:
    """Runs what :func:`patcher.verify.watched.run_watched` runs; the process to fork is started when first needed.

    Args:
        environment: runs that differ from it in what counts at an import get a new interpreter.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.forks = 0
        self._environment = dict(environment)
        self._server: subprocess.Popen[str] | None = None

    def __call__(
        self, command: Sequence[str], environment: Mapping[str, str], cwd: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        if _read_by_imports(environment) != _read_by_imports(self._environment):
            from patcher.verify.watched import run_watched

            return run_watched(command, environment, cwd)
        server = self._server = self._server or self._start()
        self.forks += 1
        program = command[4:]
        with tempfile.TemporaryDirectory() as folder:
            outputs = [str(Path(folder, name)) for name in ("stdout", "stderr")]
            job = {"program": program, "environment": dict(environment), "cwd": cwd and str(cwd), "outputs": outputs}
            assert server.stdin is not None and server.stdout is not None
            server.stdin.write(json.dumps(job) + "\n")
            server.stdin.flush()
            answer = server.stdout.readline()
            assert answer, "the process that is forked has ended"
            texts = [Path(output).read_text(encoding="utf-8", errors="replace") for output in outputs]
        return subprocess.CompletedProcess(list(command), int(answer), *texts)

    def _start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-I", "-B", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=self._environment,
            cwd=tempfile.gettempdir(),
        )

    def close(self) -> None:
        """End the process."""
        if self._server is not None:
            assert self._server.stdin is not None and self._server.stdout is not None
            self._server.stdin.close()
            self._server.wait(60)
            self._server.stdout.close()


def _read_by_imports(environment: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in environment.items() if key.startswith(_READ_BY_IMPORTS)}


def serve() -> None:
    """Fork for every line of stdin; a line of stdout is an exit status."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import safetensors.torch  # noqa: F401
    import torch  # noqa: F401
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel  # noqa: F401

    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if pid == 0:
            outputs = [os.open(name, os.O_WRONLY | os.O_CREAT) for name in job["outputs"]]
            become(job["program"], job["environment"], job["cwd"], [os.open(os.devnull, os.O_RDONLY), *outputs])
        _pid, status = os.waitpid(pid, 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()


def become(
    program: Sequence[str], environment: Mapping[str, str], cwd: str | Path | None, descriptors: Sequence[int]
) -> NoReturn:
    """In a fork: run a Python program as a new interpreter would, and end.

    Args:
        program: its path, and its arguments.
        descriptors: of its stdin, stdout and stderr; every other one is closed.
    """
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        for number, descriptor in enumerate(descriptors):
            os.dup2(descriptor, number)
        os.closerange(3, 4096)
        os.environ.clear()
        os.environ.update(environment)
        if cwd is not None:
            os.chdir(cwd)
        sys.argv = list(program)
        runpy.run_path(program[0], run_name="__main__")
        code = 0
    except SystemExit as done:
        code = int(done.code or 0) if not isinstance(done.code, str) else 1
    except BaseException:
        with contextlib.suppress(OSError):
            traceback.print_exc()
    finally:
        leave(code)


def leave(code: int) -> NoReturn:
    """End a fork, whatever else it holds; what it says may not fit where it is said."""
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


if __name__ == "__main__":
    serve()
