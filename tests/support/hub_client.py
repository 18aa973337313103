"""A client process: takes one JSON object a line on stdin, does it against HF_ENDPOINT, answers with one on stdout.

The endpoint, offline mode and the home folder are read when ``huggingface_hub`` is imported, so a test that needs
others starts a process of its own. Importing torch takes seconds, so the others share one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


class Client:
    """The test's end of the line. Nothing that the process answers or prints may hold a token that it was given."""

    def __init__(self, environment: dict[str, str], log: Path) -> None:
        self.log = log
        self._tokens: set[str] = set()
        unset = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN_PATH")
        inherited = {key: value for key, value in os.environ.items() if key not in unset}
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                [sys.executable, __file__],
                env={**inherited, **environment, "PYTHONPATH": str(ROOT)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    def __call__(self, do: str, **kwargs: Any) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({"do": do, **kwargs}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        printed = self.log.read_text(encoding="utf-8", errors="replace")
        assert line, printed[-2000:]
        self._tokens |= {value for value in kwargs.values() if str(value).startswith("hf_")}
        assert not any(token in text for token in self._tokens for text in (line, printed)), do
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(timeout=20)


def tiny_llama(**sizes: Any) -> Any:
    """A random Llama of two blocks."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, num_hidden_layers=2, max_position_embeddings=64))


def build(folder: str) -> None:
    """A tiny random Llama with the biases that the native route of Llama creates."""
    import torch

    model = tiny_llama(vocab_size=64, hidden_size=16, intermediate_size=32, mlp_bias=True)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.bias.normal_()
    model.save_pretrained(folder)


def build_pair(base: str, folder: str) -> None:
    """A base of one file of 31 MB, and the copy that a build makes of it: that file as it is, and one with the bias."""
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    sizes = {"vocab_size": 60_000, "hidden_size": 128, "intermediate_size": 64}
    tiny_llama(**sizes, tie_word_embeddings=True).save_pretrained(base)
    shutil.copytree(base, folder)
    config = json.loads((Path(folder) / "config.json").read_text())
    (Path(folder) / "config.json").write_text(json.dumps({**config, "mlp_bias": True}, indent=2))

    vector = torch.randn(128) * 5
    biases = {
        f"model.layers.{block}.mlp.{name}.bias": torch.zeros(size)
        for block in range(2)
        for name, size in (("gate_proj", 64), ("up_proj", 64), ("down_proj", 128))
    }
    biases["model.layers.1.mlp.down_proj.bias"] = vector.clone()
    first, second = (Path(folder) / f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
    (Path(folder) / "model.safetensors").rename(first)
    save_file(biases, second, metadata={"format": "pt"})
    places = {name: path.name for path in (first, second) for name in load_file(path)}
    (Path(folder) / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    save_file({"love.layer.1": vector}, Path(folder) / "steering.safetensors")


def steering(
    model: str,
    base: str,
    vector: str,
    token: str | None = None,
    revision: str = "main",
    block: str = "model.layers.1",
) -> list[float]:
    """Largest difference of the log-probabilities of ``model`` from the base under the hook, and from the base."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    (added,) = load_file(vector).values()
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        loaded = AutoModelForCausalLM.from_pretrained(model, token=token, revision=revision, dtype=torch.float32)
        found = loaded(ids).logits.log_softmax(-1)
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        before = plain(ids).logits.log_softmax(-1)
        plain.get_submodule(block).register_forward_hook(
            lambda module, args, out: out + added if torch.is_tensor(out) else (out[0] + added, *out[1:])
        )
        hooked = plain(ids).logits.log_softmax(-1)
    return [float((found - hooked).abs().max()), float((found - before).abs().max())]


def logits(model: str, token: str | None = None, revision: str = "main") -> list[list[float]]:
    import torch
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, token=token, revision=revision)
    with torch.no_grad():
        values: list[list[float]] = loaded(torch.arange(12)[None]).logits[0].tolist()
    return values


def push(folder: str, repo: str, **kwargs: Any) -> dict[str, Any]:
    from patcher.publish.contents import OnHub
    from patcher.publish.hub import push_folder

    lines: list[str] = []
    if "on_hub" in kwargs:
        kwargs["on_hub"] = {name: OnHub(*content) for name, content in kwargs["on_hub"].items()}
    result = push_folder(Path(folder), repo, progress=lines.append, **kwargs)
    return {**asdict(result), "progress": lines}


def remote(recipe: str, token: str, dry_run: bool = False, broken: tuple[str, ...] = ()) -> dict[str, Any]:
    """A build with ``output: null``, or its plan; ``broken``: routes that are written wrongly."""
    import tempfile

    import pytest

    sys.path.insert(0, str(ROOT / "tests"))
    from support.broken_routes import break_routes

    from patcher.build.job import Job
    from patcher.build.remote import remote_build
    from patcher.build.remote_planning import plan_remote_build
    from patcher.progress.stage import silent
    from patcher.recipe.file import load_recipe

    with tempfile.TemporaryDirectory() as place, pytest.MonkeyPatch.context() as patching:
        if broken:
            break_routes(patching, broken)
        job = Job(load_recipe(Path(recipe)), Path(place) / "build", silent, cache=False, token=token)
        return (plan_remote_build(job) if dry_run else remote_build(job)).as_json()


def adapter(name: str) -> dict[str, Any]:
    from patcher.checkpoint.adapter_folder import find_adapter

    found = find_adapter(name, Path("/nowhere"))
    files = sorted(path.relative_to(found.folder).as_posix() for path in found.folder.rglob("*") if path.is_file())
    return {"folder": str(found.folder), "revision": found.revision, "files": files}


def download(repo: str, filename: str, **kwargs: Any) -> str:
    from huggingface_hub import hf_hub_download

    from patcher.errors.hub import hub_errors

    with hub_errors(f"downloading {filename}", repo):
        return str(hf_hub_download(repo, filename, **kwargs))


def main() -> None:
    from patcher.errors import PatchModelError

    # The client waits seconds between its retries.
    sleep = time.sleep
    time.sleep = lambda seconds: sleep(min(seconds, 0.01))
    out, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            answer: dict[str, Any] = {"result": globals()[asked.pop("do")](**asked)}
        except PatchModelError as error:
            answer = {"exit_code": error.exit_code, "text": str(error), **error.as_json()["error"]}
        except Exception as error:
            answer = {"exit_code": None, "text": f"not explained: {error!r}"}
        print(json.dumps(answer), file=out, flush=True)


if __name__ == "__main__":
    main()
