"""How vLLM is run."""

from __future__ import annotations

from pathlib import Path

from patcher.stacks.environments import Environment
from patcher.verify.stack_jobs import Process, clean_variables
from patcher.verify.watched import watched_command

RUNNER = Path(__file__).with_name("programs") / "vllm_run.py"


def vllm_process(environment: Environment) -> Process:
    """Its own Python runs every folder in fp32, on the GPU if that vLLM has one."""
    return Process(watched_command(environment.python, RUNNER), {}, clean_variables(environment))
