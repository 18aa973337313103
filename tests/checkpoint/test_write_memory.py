"""Writing a copy needs no memory for the weights. (Times are measured in tests/benchmarks/write.py.)"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from benchmarks.write_checkpoint import MIB, make_checkpoint

SIZE = 200 * MIB
SCRIPT = """
import sys
from pathlib import Path
import torch
from benchmarks.write_checkpoint import LAYER, flag_plan
from patcher.checkpoint.folder import CheckpointFolder
from patcher.checkpoint.safetensors_file import read_tensor
from patcher.checkpoint.staging import staged_folder
from patcher.checkpoint.writer import write_copy
from patcher.routes.apply import tensors_to_write

def peak():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) // 1024

base, target, what = sys.argv[1:]
checkpoint = CheckpointFolder(Path(base))
vector = torch.randn(checkpoint.config["hidden_size"])
imported = peak()
created, replaced = tensors_to_write(flag_plan(checkpoint.config), {LAYER: vector}, checkpoint)
if what == "replaced":
    created, replaced = {}, {"model.norm.weight": vector.bfloat16()}
if what == "widened":
    created, replaced = {}, {"model.norm.weight": vector}
renamed = {name: name.replace("layers", "blocks") for name in checkpoint.tensors} if what == "renamed" else {}
link = what == "linked"
with staged_folder(Path(target)) as stage:
    written = write_copy(
        checkpoint, stage, created=created, replaced=replaced, config_changes={}, renamed=renamed, link=link
    )
    assert bool(written.placed["files"].get("hard_link")) is link
    assert bool(written.placed["files"].get("rewritten")) is (what in ("renamed", "widened"))
print(imported, peak())
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = make_checkpoint(tmp_path_factory.mktemp("memory") / "base", SIZE)
    files = list(folder.glob("*.safetensors"))
    assert sum(file.stat().st_size for file in files) >= 0.9 * SIZE
    yield folder
    for file in files:
        file.unlink()


@pytest.mark.slow_but("created")
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
@pytest.mark.parametrize("what", ["created", "replaced", "widened", "renamed", "linked"])
def test_the_weights_do_not_pass_through_memory(base: Path, tmp_path: Path, what: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(base), str(tmp_path / "copy"), what],
        env={"PYTHONPATH": f"{Path(__file__).parents[2]}:{Path(__file__).parents[1]}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    imported, peak = map(int, done.stdout.split())
    for file in (tmp_path / "copy").glob("*.safetensors"):
        file.unlink()
    assert peak - imported < 100, f"{peak - imported} MiB for a checkpoint of {SIZE // MIB} MiB"
