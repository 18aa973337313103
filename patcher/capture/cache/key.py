"""What captured activations depend on, as a key: two captures of one key are the same numbers.

Take the key before the model is loaded. A file that changes afterwards has another key from then on, so what was
captured of either content is never given out for the other.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from patcher.capture import products
from patcher.capture.batches import Readable, image_in
from patcher.checkpoint.folder import CheckpointFolder
from patcher.checkpoint.source import Source
from patcher.disk.json_files import read_json_object

CAPTURE_VERSION = 1
"""Raise it when what a capture computes changes in a place other than this package, whose sources are in the key."""

_COMMIT = re.compile(r"[0-9a-f]{40}")
_PACKAGES = (
    "torch", "transformers", "accelerate", "safetensors", "numpy", "peft", "optimum", "gptqmodel",
    "compressed-tensors", "bitsandbytes", "kernels", "flash-attn", "triton", "causal-conv1d", "mamba-ssm", "pillow",
    "torchvision",
)  # fmt: skip
_TICK_NS = 50_000_000
_COARSE_TICK_NS = 2_000_000_000
_SECOND_NS = 1_000_000_000


@dataclass(frozen=True)
class CaptureKey:
    """Names one capture.

    Attributes:
        digest: SHA-256 of all that it depends on, 64 hexadecimal digits.
        layers: the layers that are read, ascending.
        prompts: how many prompts are read.
    """

    digest: str
    layers: tuple[int, ...]
    prompts: int


def capture_key(
    identity: Mapping[str, Any],
    *,
    dtype: torch.dtype,
    device: str,
    attention: str,
    blocks: str,
    prompts: Sequence[Readable],
    layers: Sequence[int],
    settings: Mapping[str, Any],
) -> CaptureKey:
    """The key of a capture.

    Args:
        identity: of the model, from :func:`model_identity`.
        dtype: that blocks compute in.
        device: where they do: ``cpu``, ``cuda:0``, ``auto`` ...
        attention: the implementation of attention (``config._attn_implementation``).
        blocks: path of the list of decoder blocks.
        prompts: their ids and read positions, in order.
        layers: that are read.
        settings: all else that says how the forward passes are made, as JSON: packing, streaming, batch sizes.

    Raises:
        ValueError, TypeError: ``settings`` are no JSON.
    """
    wanted = tuple(sorted(set(layers)))
    content = {
        "version": CAPTURE_VERSION,
        "code": _code(),
        "packages": _packages(),
        "machine": _machine(device),
        "model": dict(identity),
        "dtype": str(dtype),
        "device": device,
        "attention": attention,
        "blocks": blocks,
        "prompts": [_prompt(prompt) for prompt in prompts],
        "layers": wanted,
        "settings": dict(settings),
    }
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return CaptureKey(hashlib.sha256(text.encode("ascii")).hexdigest(), wanted, len(prompts))


def _prompt(prompt: Readable) -> list[Any]:
    image = image_in(prompt)
    return [list(map(int, prompt.ids)), list(map(int, prompt.read)), *([image.key] if image else [])]


def model_identity(
    source: Source, adapter: Path | None = None, *, trust_remote_code: bool = False
) -> dict[str, Any] | None:
    """Which weights and which code a model is, without reading the weights; None where that cannot be told.

    A Hub model is its name and commit. A local folder, or an adapter, is each file's resolved path, size, inode and
    times. The time of the last change of an inode moves with every write and cannot be set back. Two things cannot be
    told: code that lies in another repository is not pinned, and a file that was written within the last tick of its
    clock could be written again within the same.

    Args:
        source: the base, as it was given.
        adapter: the folder of the adapter that is merged into it.
        trust_remote_code: whether Python files of the model are run.

    Raises:
        InputError: the folder is no checkpoint.
    """
    config = read_json_object(source.folder / "config.json")
    if trust_remote_code and "--" in json.dumps(config.get("auto_map", "")):
        return None
    pinned = source.hub and source.revision is not None and _COMMIT.fullmatch(source.revision)
    files = [] if pinned else list(_model_files(source.folder, code=trust_remote_code))
    if adapter is not None:
        files += sorted(adapter.glob("adapter_*"))
    try:
        identities = [_file_identity(path) for path in files]
    except (OSError, RuntimeError):
        return None
    if any(identity is None for identity in identities):
        return None
    return {
        "hub": [source.name, source.revision] if pinned else None,
        "files": identities,
        "adapter": adapter is not None,
        "code": trust_remote_code,
    }


def _model_files(folder: Path, *, code: bool) -> Iterator[Path]:
    yield from (folder / name for name in CheckpointFolder(folder).weight_files)
    yield from sorted(folder.glob("*.json"))
    if code:
        yield from sorted(folder.rglob("*.py"))


def _file_identity(path: Path) -> list[str | int] | None:
    stat = path.stat()
    written = stat.st_ctime_ns if os.name == "posix" else max(stat.st_ctime_ns, stat.st_mtime_ns)
    # Some file systems count whole seconds.
    tick = _COARSE_TICK_NS if written % _SECOND_NS == 0 else _TICK_NS
    age = time.time_ns() - written
    if age < tick:
        if age < 0 or tick == _COARSE_TICK_NS:
            return None
        time.sleep((tick - age) / _SECOND_NS)
        if path.stat().st_ctime_ns != stat.st_ctime_ns:
            return None
    return [str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev]


@functools.cache
def _code() -> str:
    """A hash of the sources of this package: whoever changes how a capture is made changes every key."""
    digest = hashlib.sha256()
    folder = Path(__file__).parents[1]
    for path in sorted(folder.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(folder).as_posix()} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


@functools.cache
def _packages() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch build": str(torch.__version__)}
    for name in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _machine(device: str) -> dict[str, Any]:
    """What the last bits of a sum depend on."""
    found: dict[str, Any] = {
        "machine": platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "onednn": products.available(),
        "threads": torch.get_num_threads(),
        "matmul": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
    if device != "cpu" and torch.cuda.is_available():
        found["devices"] = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        found["cuda"] = torch.version.cuda
    return found
