"""Where stacks are looked for, and what is said of one that is not whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from patcher.disk.cache_folder import cache_folder
from patcher.errors import InputError, OutsideError
from patcher.stacks import installing
from patcher.stacks.environments import Environment, Missing, all_found, find, stack_folder
from patcher.stacks.installing import keep_torchvision

VARIABLES = ("PATCH_MODEL_VLLM", "PATCH_MODEL_LLAMA_CPP")


@pytest.fixture(autouse=True)
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No stack but transformers is found unless a test makes one."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATCH_MODEL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))


def fake_venv(folder: Path, **packages: str) -> Path:
    """A folder with a Python that claims these packages."""
    python = folder / "bin" / "python"
    python.parent.mkdir(parents=True)
    answer = json.dumps({"python": "3.11", "found": packages})
    python.write_text(f"#!/bin/sh\necho '{answer}'\n")
    python.chmod(0o755)
    return folder


NEEDED = {"torch": "2", "transformers": "4", "safetensors": "1"}


def found(stack: str, given: Path | None = None) -> Environment:
    result = find(stack, given)
    assert isinstance(result, Environment), result
    return result


def test_transformers_is_here() -> None:
    assert found("transformers").python == Path(sys.executable)


def test_what_is_not_installed_says_how_to_have_it() -> None:
    for stack, variable in zip(("vllm", "llama.cpp"), VARIABLES, strict=True):
        result = find(stack)
        assert isinstance(result, Missing)
        assert f"patch-model stacks install {stack}" in result.remedy and variable in result.remedy


def test_vllm_in_a_given_environment_in_its_variable_and_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = fake_venv(tmp_path / "mine", vllm="0.32.0")
    assert found("vllm", place).version == "0.32.0"
    assert found("vllm", place / "bin" / "python").python == place / "bin" / "python"
    assert stack_folder("vllm") == cache_folder() / "stacks" / "vllm"
    fake_venv(stack_folder("vllm"), vllm="0.31.0")
    assert found("vllm").version == "0.31.0"
    monkeypatch.setenv("PATCH_MODEL_VLLM", str(place))
    assert (found("vllm").version, found("vllm").source) == ("0.32.0", "PATCH_MODEL_VLLM")


def test_llama_cpp_needs_its_converter_and_what_that_needs(tmp_path: Path) -> None:
    place = fake_venv(tmp_path / "mine", xllamacpp="2026.10.11549", **NEEDED)
    with pytest.raises(InputError, match=r"no convert_hf_to_gguf\.py"):
        find("llama.cpp", place)
    converter = place / "llama.cpp" / "convert_hf_to_gguf.py"
    converter.parent.mkdir()
    converter.touch()
    result = found("llama.cpp", place)
    assert (result.converter, result.version, result.server) == (converter, "xllamacpp 2026.10.11549", None)
    bare = fake_venv(tmp_path / "bare", xllamacpp="1")
    with pytest.raises(InputError, match="lacks torch, transformers, safetensors"):
        find("llama.cpp", bare)


def test_a_llama_cpp_folder_with_a_build(tmp_path: Path) -> None:
    folder = tmp_path / "llama.cpp"
    (folder / "build" / "bin").mkdir(parents=True)
    (folder / "convert_hf_to_gguf.py").touch()
    with pytest.raises(InputError, match="no build/bin/llama-server"):
        find("llama.cpp", folder)
    server = folder / "build" / "bin" / "llama-server"
    server.touch()
    server.chmod(0o755)
    result = found("llama.cpp", folder)
    assert result.server == server and result.python == Path(sys.executable)


def test_llama_cpp_on_the_path(tmp_path: Path) -> None:
    place = Path(os.environ["PATH"])
    place.mkdir()
    for name in ("llama-server", "convert_hf_to_gguf.py"):
        (place / name).write_text("#!/bin/sh\n")
        (place / name).chmod(0o755)
    assert found("llama.cpp").source == "the PATH"


@pytest.mark.parametrize("content", [None, "file", "empty folder", "broken", "other"])
def test_a_given_path_without_the_stack_is_the_users_mistake(tmp_path: Path, content: str | None) -> None:
    place = tmp_path / "place"
    if content == "file":
        place.touch()
        place.chmod(0o755)
    elif content == "empty folder":
        place.mkdir()
    elif content == "broken":
        fake_venv(place)
        (place / "bin" / "python").write_text("#!/bin/sh\nexit 1\n")
    elif content == "other":
        fake_venv(place, torch="2")
    with pytest.raises(InputError) as caught:
        find("vllm", place)
    assert caught.value.exit_code == 2 and str(place) in str(caught.value)


def test_the_list_survives_a_variable_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATCH_MODEL_VLLM", "/nowhere")
    listed = {item.stack: item for item in all_found()}
    assert isinstance(listed["vllm"], Missing) and "/nowhere" in listed["vllm"].why


def test_what_was_not_made_here_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(InputError, match="not made by this command"):
        installing.install("vllm", tmp_path / "mine", say=lambda _line: None)
    assert (tmp_path / "mine" / "thesis.txt").exists()


@pytest.mark.slow
def test_an_install_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installing, "TORCH", "no-such-package-of-patch-model==1")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(OutsideError) as caught:
        installing.install("vllm", tmp_path / "new", gpu=False, say=lambda _line: None)
    assert caught.value.exit_code == 3 and "no-such-package-of-patch-model" in str(caught.value)
    assert not (tmp_path / "new").exists()


def test_only_the_converter_is_unpacked(tmp_path: Path) -> None:
    root = tmp_path / "llama_cpp_python-1"
    wanted = {"convert_hf_to_gguf.py", "conversion/base.py", "gguf-py/gguf/gguf.py", "LICENSE"}
    for name in (*wanted, "src/llama.cpp", "convert_lora_to_gguf.py"):
        path = root / "vendor" / "llama.cpp" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    archive = tmp_path / "source.tar.gz"
    with tarfile.open(archive, "w:gz") as file:
        file.add(root, arcname=root.name)
    out = tmp_path / "out"
    installing.unpack_converter(archive, out)
    assert {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()} == wanted
    with tarfile.open(archive, "w:gz") as file:
        file.add(root / "vendor" / "llama.cpp" / "src", arcname="llama_cpp_python-1/vendor/llama.cpp/src")
    with pytest.raises(OutsideError, match=r"no convert_hf_to_gguf\.py"):
        installing.unpack_converter(archive, tmp_path / "other")


def test_the_command_lists_them_without_torch(tmp_path: Path) -> None:
    import subprocess

    script = (
        "import sys, json, io, contextlib\n"
        "from patcher.cli import cli\n"
        "out = io.StringIO()\n"
        "with contextlib.redirect_stdout(out):\n"
        "    cli.main(args=['stacks', '--json'], standalone_mode=False)\n"
        "assert 'torch' not in sys.modules\n"
        "print(out.getvalue())\n"
    )
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    listed: list[dict[str, Any]] = json.loads(shown)["stacks"]
    assert [(row["stack"], row["installed"]) for row in listed] == [
        ("transformers", True), ("vllm", False), ("llama.cpp", False)
    ]  # fmt: skip


def test_torchvision_is_kept_without_operators_of_another_torch(tmp_path: Path) -> None:
    """As it fails beside a torch for the CPU: what describes the operators to torch raises, the rest is Python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path)], check=True)
    (site,) = tmp_path.glob("lib/python*/site-packages")
    package = site / "torchvision"
    (package / "transforms" / "v2").mkdir(parents=True)
    for name in ("transforms/__init__.py", "transforms/v2/__init__.py"):
        (package / name).write_text("", encoding="utf-8")
    (package / "__init__.py").write_text("from torchvision import _meta_registrations\n", encoding="utf-8")
    described = "raise RuntimeError('operator torchvision::nms does not exist')\n"
    (package / "_meta_registrations.py").write_text(described, encoding="utf-8")
    said: list[str] = []
    for _time in range(2):
        keep_torchvision(tmp_path / "bin" / "python", said.append)
    assert len(said) == 1 and "transforms are kept" in said[0]
    (package / "_meta_registrations.py").unlink()
    (package / "__init__.py").write_text("from torchvision import extension\n", encoding="utf-8")
    with pytest.raises(OutsideError, match="pip uninstall"):
        keep_torchvision(tmp_path / "bin" / "python", said.append)
