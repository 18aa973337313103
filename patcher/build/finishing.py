"""The end of every build: the manifest, the proof, what people read, and the publication."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from patcher.build.job import Job
from patcher.build.manifest import Copied, build_manifest
from patcher.build.texts import prepare_texts, write_texts
from patcher.checkpoint.staging import scratch_folder
from patcher.patched.schema import Manifest
from patcher.progress.stage import doing
from patcher.publish.contents import OnHub
from patcher.publish.hub import push_folder


def finish(job: Job, copied: Copied, prove: Callable[[Manifest], Manifest]) -> tuple[Manifest, int]:
    """Prove a copy that is written, and write what it says of itself.

    Args:
        prove: verifies the copy and gives the manifest back, with what was found; raises if the copy is wrong.

    Returns:
        The manifest, and how many bytes were written.

    Raises:
        InputError: the files do not hold what the plan says.
        CheckFailed, OutsideError: those of ``prove``.
    """
    with job.clock.time("card"), scratch_folder(job.output) as scratch, ThreadPoolExecutor(1, "card") as beside:
        manifest = build_manifest(copied, job.loaded)
        prepared = beside.submit(prepare_texts, scratch, manifest)
        manifest = prove(manifest)
        with doing(job.say, "writing the card"):
            pictures = prepared.result()
            return manifest, write_texts(copied.stage, manifest, copied.source, copied.responses, pictures)


def push(job: Job, folder: Path, on_hub: Mapping[str, OnHub] | None = None) -> dict[str, Any]:
    """Publish a finished copy where the recipe says; ``push`` of a build's JSON.

    Args:
        on_hub: see :func:`patcher.publish.hub.push_folder`.

    Raises:
        InputError, OutsideError: see there.
    """
    assert job.recipe.push is not None
    where = job.recipe.push.model_dump()
    with job.clock.time("push"):
        return asdict(push_folder(folder, **where, token=job.token, progress=job.say, on_hub=on_hub))
