"""What is kept between runs: captured activations, and hashes of files. Whatever is damaged is as good as nothing."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from support.fuzz.registry import reader
from support.fuzz.seeds import tensor
from support.fuzz.watch import Case

from patcher.capture.cache.store import CaptureCache, CaptureKey
from patcher.capture.residuals import Residuals
from patcher.checkpoint import hashes

KEY = CaptureKey("0" * 64, (-1, 3), 4)
CAPTURE = f"{KEY.digest}.safetensors"


def _residuals() -> dict[int, Residuals]:
    found = {}
    for layer in KEY.layers:
        counts = torch.arange(KEY.prompts) + 1
        found[layer] = Residuals(tensor(KEY.prompts, 7, seed=layer + 1), tensor(KEY.prompts).double(), counts)
    return found


def _captures() -> list[Case]:
    with tempfile.TemporaryDirectory() as name:
        cache = CaptureCache(Path(name))
        assert cache.put(KEY, _residuals()) is None
        return [{CAPTURE: (Path(name) / CAPTURE).read_bytes()}]


def _same_capture(_folder: Path, found: dict[int, Residuals] | None) -> None:
    for layer, kept in _residuals().items() if found is not None else ():
        for field in fields(Residuals):
            assert torch.equal(getattr(found[layer], field.name), getattr(kept, field.name))


@reader("capture cache", _captures, _same_capture)
def _capture(folder: Path, out: Path) -> Any:
    place = out / CAPTURE
    if (folder / CAPTURE).is_file():
        shutil.copyfile(folder / CAPTURE, place)
        place.chmod(0o600)
    return CaptureCache(out).get(KEY)


def _hashes() -> list[Case]:
    return [{"entry.json": json.dumps({"sha256": "@SUM@"}).encode(), "weights": b"some content"}]


def _same_hash(folder: Path, found: str | None) -> None:
    assert found is None or (len(found) == 64 and set(found) <= set("0123456789abcdef"))


@reader("hash cache", _hashes, _same_hash)
def _hash(folder: Path, out: Path) -> Any:
    """An entry for a file as it is; the place of the file and its identity are filled in, or nothing would be read."""
    with mock.patch.dict(os.environ, {"PATCH_MODEL_CACHE": str(out)}):
        weights = out / "weights"
        weights.write_bytes((folder / "weights").read_bytes() if (folder / "weights").is_file() else b"")
        there = weights.stat()
        entry = (folder / "entry.json").read_bytes() if (folder / "entry.json").is_file() else b""
        sound = {"path": str(weights.resolve()), "key": hashes._key(there)}
        filled = entry.replace(b"@SUM@", hashlib.sha256(weights.read_bytes()).hexdigest().encode())
        with contextlib.suppress(ValueError, TypeError, RecursionError):
            filled = json.dumps({**sound, **json.loads(filled)}).encode()
        place = hashes._place(weights)
        place.parent.mkdir(parents=True)
        place.write_bytes(filled)
        return hashes._kept(weights, there)
