"""The write phase of a build, stopped at its n-th step on the disk. Run by test_kill.py as a process of its own.

One line of JSON on stdin is one run in a forked child, one line on stdout its result. Steps are what Python's audit
hooks see (open, mkdir, rename, chmod, remove ...), every piece that is copied, and every fsync.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file

from patcher.checkpoint.prepare import prepared_base
from patcher.checkpoint.source import Source
from patcher.checkpoint.staging import staged_folder
from patcher.checkpoint.steering_files import MANIFEST
from patcher.checkpoint.writer import write_copy
from patcher.errors import PatchModelError

EVENTS = ("open", "os.", "shutil.")
PIECE = 8192


class Steps:
    """Counts steps, and stops the process at one of them."""

    def __init__(self, stop_at: int, how: str) -> None:
        self.count, self.stop_at, self.how = 0, stop_at, how
        self.counting = False

    def step(self) -> None:
        if not self.counting:
            return
        self.count += 1
        if self.count == self.stop_at:
            signal.raise_signal(signal.SIGKILL if self.how == "kill" else signal.SIGINT)

    def audit(self, event: str, _arguments: tuple[Any, ...]) -> None:
        if event.startswith(EVENTS):
            self.step()


def write(job: dict[str, Any], steps: Steps) -> None:
    copy_file_range = os.copy_file_range

    def in_pieces(source: int, target: int, count: int, **where: int) -> int:
        steps.step()
        return copy_file_range(source, target, min(count, PIECE), **where)

    def not_waiting(_descriptor: int) -> None:
        steps.step()

    def no_library(*_arguments: object, **_keys: object) -> None:
        raise OSError

    os.copy_file_range, os.fsync = in_pieces, not_waiting  # type: ignore[assignment]
    if not job["exchange"]:
        ctypes.CDLL = no_library  # type: ignore[assignment,misc]
    sys.addaudithook(steps.audit)
    base, output = Path(job["base"]), Path(job["output"])
    recipe = SimpleNamespace(adapter=None, trust_remote_code=False)
    loaded: Any = SimpleNamespace(recipe=recipe, folder=base.parent)
    say: Callable[[str], None] = len  # type: ignore[assignment]
    sizes = {"gate": 48, "up": 48, "down": 32}
    created = {
        f"model.layers.{layer}.mlp.{name}_proj.bias": torch.full((size,), float(job["version"]))
        for layer in range(2)
        for name, size in sizes.items()
    }
    steps.counting = True
    with prepared_base(Source("base", False, None, base), loaded, output, say) as prepared:
        assert base.joinpath("pytorch_model.bin").exists() == (prepared.reference_folder != prepared.checkpoint.path)
        with staged_folder(output, force=job["force"]) as stage:
            write_copy(prepared.checkpoint, stage, created=created, replaced={}, config_changes={"mlp_bias": True})
            save_file({"vector": torch.ones(32)}, stage / "steering.safetensors")
            (stage / MANIFEST).write_text(json.dumps({"version": job["version"]}))
    steps.counting = False


def run(job: dict[str, Any]) -> dict[str, Any]:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        steps = Steps(job["step"], job["how"])
        code = 1
        try:
            write(job, steps)
            code = 0
        except KeyboardInterrupt:
            code = 130
        except PatchModelError as error:
            code = error.exit_code
        except Exception:
            traceback.print_exc()
        finally:
            steps.counting = False
            os.write(writer, str(steps.count).encode())
            os._exit(code)
    os.close(writer)
    _pid, status = os.waitpid(child, 0)
    counted = os.read(reader, 100)
    os.close(reader)
    return {"code": os.waitstatus_to_exitcode(status), "steps": int(counted or 0)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)
