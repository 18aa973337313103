"""What must hold after a fault: a whole output or none, the base as it was, nothing left, a message that helps."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from harness_parts.builds import Build, Done, Shop
from safetensors.torch import load_file
from support.tiny_models import sharded_llama, write_recipe

from patcher.checkpoint.staging import scratch_folder
from patcher.checkpoint.steering_files import MANIFEST

STAGING = re.compile(r"\.out\.partial-\d+-[0-9a-f]{8}(-old)?")
LAYER, LAYERS = 1, 4
CHILD_SECONDS = 20.0
"""How long what a killed build has started may go on. (It takes milliseconds, and other work may delay it.)"""

State = Mapping[str, Any]


class FaultFound(AssertionError):  # noqa: N818 - it reads as the event it is
    """Something that must hold does not."""


def require(condition: object, text: str) -> None:
    if not condition:
        raise FaultFound(text)


def make_base(folder: Path, *, as_bin: bool = False) -> Path:
    """A tiny Llama whose files are large enough (25 MB, in shards) for a copy of it to take a moment."""
    sharded_llama(folder, "6MB", hidden_size=64, intermediate_size=8192, num_hidden_layers=LAYERS)
    if as_bin:
        tensors: dict[str, torch.Tensor] = {}
        for shard in sorted(folder.glob("*.safetensors")):
            tensors |= load_file(shard)
            shard.unlink()
        (folder / "model.safetensors.index.json").unlink()
        torch.save(tensors, folder / "pytorch_model.bin")
    return folder


def state(folder: Path) -> State:
    """Content and time of every file; a hash stands for the content."""
    return {
        str(item.relative_to(folder)): (hashlib.sha256(item.read_bytes()).hexdigest(), item.stat().st_mtime_ns)
        for item in sorted(folder.rglob("*"))
        if item.is_file()
    }


def content(folder: Path) -> Mapping[str, str]:
    return {name: digest for name, (digest, _time) in state(folder).items()}


@dataclass(frozen=True)
class Mode:
    """What is built: of safetensors or .bin, over an existing output or not, with or without --link."""

    name: str
    force: bool = False
    link: bool = False
    as_bin: bool = False

    @property
    def options(self) -> list[str]:
        return ["--force"] * self.force + ["--link"] * self.link


MODES = (
    Mode("new copy"),
    Mode("new link", link=True),
    Mode("replaced copy", force=True),
    Mode("replaced link", force=True, link=True),
    Mode("replaced, of .bin", force=True, as_bin=True),
)


class Bench:
    """Bases, a recipe for each, and what whole outputs of the two versions look like."""

    def __init__(self, folder: Path) -> None:
        self.shop = Shop(folder)
        folder.chmod(0o755)
        for item in (self.shop.place, self.shop.temporary, self.shop.cache):
            item.mkdir()
        self.bases = {as_bin: make_base(folder / ("bin" if as_bin else "base"), as_bin=as_bin) for as_bin in (0, 1)}
        self.recipes = {}
        for as_bin, base in self.bases.items():
            path = folder / f"recipe-{base.name}.yaml"
            self.recipes[as_bin] = write_recipe(path, base, LAYER, self.shop.output)
        self.bases_before = {as_bin: state(base) for as_bin, base in self.bases.items()}
        self.whole: dict[tuple[bool, str], Path] = {}

    def arguments(self, mode: Mode, version: str = "new") -> list[str | Path]:
        coefficient = {"old": 0.5, "new": 0.75}[version]
        return [self.recipes[mode.as_bin], *mode.options, "--set", f"vectors.0.coefficient={coefficient}"]

    def whole_output(self, as_bin: bool, version: str) -> Path:
        """A whole output of that version, which is only looked at; it is built once."""
        if (as_bin, version) not in self.whole:
            done = self.shop.run(self.arguments(Mode("", as_bin=as_bin), version))
            require(done.code == 0, f"a build that nothing disturbs fails:\n{done.said}")
            kept = self.shop.folder / f"whole-{version}-{as_bin:d}"
            self.shop.output.rename(kept)
            self.whole[as_bin, version] = kept
            if (as_bin, "old") in self.whole and (as_bin, "new") in self.whole:
                old, new = (content(self.whole[as_bin, name]) for name in ("old", "new"))
                require(old != new, "the two versions are the same, so a mixture of them could not be seen")
        return self.whole[as_bin, version]

    def reset(self, mode: Mode) -> None:
        """The place as a build of that mode finds it."""
        shutil.rmtree(self.shop.place)
        self.shop.place.mkdir()
        for item in self.shop.temporary.iterdir():
            shutil.rmtree(item) if item.is_dir() else item.unlink()
        for version in ("old", "new"):
            self.whole_output(mode.as_bin, version)
        if mode.force:
            shutil.copytree(self.whole_output(mode.as_bin, "old"), self.shop.output)

    def version(self, mode: Mode, folder: Path | None = None) -> str:
        """Which version lies at the output, whole: ``old``, ``new`` or ``absent``."""
        output = folder or self.shop.output
        if not os.path.lexists(output):
            return "absent"
        found = content(output)
        for version in ("old", "new"):
            if _told(found) == _told(content(self.whole_output(mode.as_bin, version))):
                self._require_manifest(output, mode, version)
                return version
        wanted = content(self.whole_output(mode.as_bin, "new"))
        wrong = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
        raise FaultFound(f"half an output, or a mixture: {', '.join(wrong)}")

    def _require_manifest(self, output: Path, mode: Mode, version: str) -> None:
        """It is JSON to its end, says that it was verified, and of which base; the card is the whole card."""
        first = self.whole_output(mode.as_bin, version)
        lacking = [name for name in (MANIFEST, "README.md") if not (output / name).is_file()]
        require(not lacking, f"half an output: it lacks {', '.join(lacking)}")
        try:
            manifest, wanted = (json.loads((folder / MANIFEST).read_text()) for folder in (output, first))
        except ValueError:
            raise FaultFound("half an output: its manifest is no JSON") from None
        require([entry["status"] for entry in manifest["verification"]] == ["passed"], "the output was not verified")
        for key in ("edits", "base", "recipe"):
            require(_same(manifest[key], wanted[key]), f"the manifest's `{key}` is not of this build")
        digests = {record["name"]: record["sha256"] for record in manifest["base"]["files"]}
        before = {name: digest for name, (digest, _time) in self.bases_before[mode.as_bin].items()}
        require(all(before[name] == digest for name, digest in digests.items()), "the base's hashes are not its own")
        lengths = [len((folder / "README.md").read_text().splitlines()) for folder in (output, first)]
        require(lengths[0] == lengths[1], "the card is not whole")

    def names(self) -> list[str]:
        return sorted(item.name for item in self.shop.place.iterdir())

    def require_base(self, mode: Mode) -> None:
        require(state(self.bases[mode.as_bin]) == self.bases_before[mode.as_bin], "the base was changed")

    def require_outputs(self, mode: Mode, allowed: Sequence[str]) -> str:
        version = self.version(mode)
        require(version in allowed, f"the output is {version}, which should be {' or '.join(allowed)}")
        return version

    def require_nothing_left(self) -> None:
        left = [name for name in self.names() if name != "out"]
        require(not left, f"left beside the output: {', '.join(left)}")
        temporary = [item.name for item in self.shop.temporary.iterdir()]
        require(not temporary, f"left in TMPDIR: {', '.join(temporary)}")

    def require_cleaned_by_the_next(self) -> None:
        """What is left is of the known kind, and the cleaning that every build begins with takes it away."""
        odd = [name for name in self.names() if name != "out" and not STAGING.fullmatch(name)]
        require(not odd, f"left, and no build would know it: {', '.join(odd)}")
        with scratch_folder(self.shop.output):
            pass
        self.require_nothing_left()


def require_ended(build: Build) -> float:
    """What the build has started ends by itself; after how many seconds."""
    start = time.monotonic()
    while left := build.running():
        if time.monotonic() - start > CHILD_SECONDS:
            build.end_group()
            raise FaultFound(f"{len(left)} processes of a killed build still ran after {CHILD_SECONDS:.0f} s")
        time.sleep(0.005)
    return time.monotonic() - start


def require_told(done: Done, code: int | Sequence[int]) -> None:
    """The exit status is right, the message says what to do, and no stack trace is shown."""
    codes = [code] if isinstance(code, int) else code
    require("Traceback" not in done.said, f"a stack trace:\n{done.said}")
    require(done.code in codes, f"exit {done.code} instead of {' or '.join(map(str, codes))}:\n{done.said}")
    if done.code == 130:
        require("interrupted" in done.said, f"it does not say that it was interrupted:\n{done.said}")
    elif done.code:
        require("remedy:" in done.said, f"it does not say what to do:\n{done.said}")


def _told(found: Mapping[str, str]) -> Mapping[str, str]:
    """Without the files that hold times and places; they are looked at by their meaning."""
    return {name: digest for name, digest in found.items() if name not in (MANIFEST, "README.md")}


def _same(first: Any, second: Any) -> bool:
    return json.dumps(first, sort_keys=True) == json.dumps(second, sort_keys=True)
