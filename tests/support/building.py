"""Builds as tests make them: of a recipe's file, without a word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from patcher.build.job import Job
from patcher.build.local import build
from patcher.build.result import BuildResult
from patcher.progress.stage import silent
from patcher.recipe.file import load_recipe

_OF_JOBS = ("say", "note", "force", "cache", "token", "processes")


def job_of(recipe: Path, output: Path, *overrides: str, **options: Any) -> Job:
    """The job of a recipe's file."""
    return Job(load_recipe(recipe, overrides), output, **{"say": silent, **options})


def build_recipe(recipe: Path, output: Path, *overrides: str, **options: Any) -> BuildResult:
    """Build a recipe's file; ``options`` are the job's and the build's."""
    of_job = {name: options.pop(name) for name in _OF_JOBS if name in options}
    return build(job_of(recipe, output, *overrides, **of_job), **options)
