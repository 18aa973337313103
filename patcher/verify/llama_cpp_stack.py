"""How llama.cpp is run."""

from __future__ import annotations

import os
from pathlib import Path

from patcher.stacks.environments import Environment
from patcher.verify.stack_jobs import Process, clean_variables
from patcher.verify.watched import watched_command

RUNNER = Path(__file__).with_name("programs") / "llama_cpp_run.py"


def llama_cpp_process(environment: Environment) -> Process:
    """Its own converter makes an fp32 GGUF of every folder; a server of it, or a binding, runs that on the CPU."""
    threads = int(os.environ.get("OMP_NUM_THREADS") or 0) or os.cpu_count() or 1
    extra = {
        "converter": str(environment.converter),
        "server": None if environment.server is None else str(environment.server),
        "binding": environment.version.split()[0].replace("llama-cpp-python", "llama_cpp"),
        "threads": threads,
    }
    return Process(watched_command(environment.python, RUNNER), extra, clean_variables(environment))
