"""Convert checkpoint folders with llama.cpp's own converter and run them in llama.cpp, in a process of its own.

It is started as ``python -I llama_cpp_run.py request.json`` by the Python that has llama.cpp, and imports nothing of
this package; see :mod:`patcher.verify.stack_jobs` for the request and the results. The request also has ``converter``,
``server`` (a ``llama-server``, or null for this Python's binding), ``binding`` and ``threads``.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.modules["patcher"] = None  # type: ignore[assignment]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

START_SECONDS = 1800
LEAST = -80.0
LOAD_SIGNS = ("error loading model", "done_getting_tensors", "llama_model_load", "GGML_ASSERT", "unknown model arch")


def main(request_path: str) -> None:
    request = json.loads(Path(request_path).read_text(encoding="utf-8"))
    results = Path(request["results"])
    (results / "process.json").write_text(json.dumps(version(request)), encoding="utf-8")
    for job in request["jobs"]:
        (results / "running").write_text(job["name"], encoding="utf-8")
        started = time.monotonic()
        tensors: dict[str, torch.Tensor] = {}
        report: dict[str, Any] = {"error": None}
        gguf = results / f"{job['name']}.gguf"
        try:
            convert(request, job, gguf)
            report["gguf_bytes"] = gguf.stat().st_size
            with engine(request, job, gguf) as llama:
                report.update(run(llama, job, tensors))
        except (RuntimeError, OSError, ValueError, KeyError) as error:
            report["error"] = str(error)[:800]
        finally:
            gguf.unlink(missing_ok=True)
        report["seconds"] = time.monotonic() - started
        save_file(tensors, results / f"{job['name']}.safetensors")
        (results / f"{job['name']}.json").write_text(json.dumps(report), encoding="utf-8")
        (results / "running").unlink()


def version(request: dict[str, Any]) -> dict[str, str]:
    """The build where it is known, and what runs it."""
    from importlib.metadata import version as of

    if request["server"]:
        shown = subprocess.run([request["server"], "--version"], capture_output=True, text=True, check=False)
        line = next((line for line in (shown.stderr + shown.stdout).splitlines() if "version" in line), "unknown")
        number = line.partition(":")[2].strip() or line
        return {"version": f"b{number}" if number[:1].isdigit() else number, "detail": "llama-server"}
    if request["binding"] == "xllamacpp":
        import xllamacpp

        number = of("xllamacpp")
        known = int(xllamacpp.BUILD_INFO["build_number"])
        # Its releases carry llama.cpp's build as the last part of their number.
        build = known or int(number.rpartition(".")[2])
        return {"version": f"b{build}", "detail": f"xllamacpp {number}"}
    number = of("llama-cpp-python")
    return {"version": f"llama-cpp-python {number}", "detail": "llama-cpp-python"}


def convert(request: dict[str, Any], job: dict[str, Any], gguf: Path) -> None:
    """What a user types: ``python convert_hf_to_gguf.py FOLDER --outtype f32 --outfile FILE``."""
    command = [sys.executable, request["converter"], job["folder"], "--outtype", "f32", "--outfile", str(gguf)]
    finished = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if finished.returncode == 0 and gguf.is_file():
        return
    lines = [line.strip() for line in finished.stderr.splitlines() if line.strip()]
    raise RuntimeError(f"the converter failed: {lines[-1] if lines else f'exit {finished.returncode}'}")


def run(llama: Any, job: dict[str, Any], tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Log-probabilities of every position, a greedy continuation, and the ids that its own tokenizer gives."""
    for number, ids in enumerate(job["ids"]):
        keep(tensors, f"{number}", llama.every_position(ids, job["top"]))
    greedy = llama.greedy(job["greedy_ids"], job["greedy_tokens"])
    return {"class": llama.name, "greedy": greedy, "tokenised": [llama.tokenise(text) for text in job["texts"]]}


def keep(tensors: dict[str, torch.Tensor], name: str, rows: list[list[tuple[float, int]]]) -> None:
    """``tokens/NAME`` int32 and ``logprobs/NAME`` fp32, both [positions, top], likeliest first; -1 fills up a row."""
    width = max(len(row) for row in rows)
    tokens = [[token for _, token in row] + [-1] * (width - len(row)) for row in rows]
    values = [[value for value, _ in row] + [0.0] * (width - len(row)) for row in rows]
    tensors[f"tokens/{name}"] = torch.tensor(tokens, dtype=torch.int32)
    tensors[f"logprobs/{name}"] = torch.tensor(values, dtype=torch.float32)


class Http:
    """llama.cpp's server, wherever it runs."""

    name = "llama.cpp's server"

    def __init__(self, url: str) -> None:
        self.url = url
        self.letter = self.tokenise("a")[-1]

    def post(self, path: str, body: dict[str, Any]) -> Any:
        data = json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=START_SECONDS) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"{path}: {error.read().decode(errors='replace')[:300]}") from None

    def after(self, ids: list[int], top: int) -> list[tuple[float, int]]:
        """The distribution behind a prompt."""
        body = {
            "prompt": ids,
            "n_predict": 1,
            "n_probs": top,
            "temperature": 0,
            # A sampled token that is no whole character is not reported, so the sampler is told to take a letter. The
            # log-probabilities are those of the logits, which that does not touch.
            "logit_bias": [[self.letter, 1e6]],
            # With a sliding window, a server that keeps the prompt before computes something else (b11549, gpt-oss).
            "cache_prompt": False,
        }
        (step,) = self.post("/completion", body)["completion_probabilities"]
        return likeliest(step)

    def every_position(self, ids: list[int], top: int) -> list[list[tuple[float, int]]]:
        # The server tells the distribution of what it generates only, so each prefix is a prompt.
        return [self.after(ids[: end + 1], top) for end in range(len(ids))]

    def greedy(self, ids: list[int], count: int) -> list[int]:
        body = {"prompt": ids, "n_predict": count, "temperature": 0, "return_tokens": True, "cache_prompt": False}
        return [int(token) for token in self.post("/completion", body)["tokens"]]

    def tokenise(self, text: str) -> list[int]:
        return [int(token) for token in self.post("/tokenize", {"content": text, "add_special": True})["tokens"]]


class Binding:
    """llama-cpp-python: all logits of a prompt in one pass."""

    name = "llama-cpp-python"

    def __init__(self, gguf: Path, context: int, threads: int) -> None:
        import llama_cpp

        self.model = llama_cpp.Llama(
            str(gguf),
            n_ctx=context,
            logits_all=True,
            n_gpu_layers=0,
            n_threads=threads,
            n_threads_batch=threads,
            type_k=llama_cpp.GGML_TYPE_F32,
            type_v=llama_cpp.GGML_TYPE_F32,
            flash_attn=False,
            verbose=True,
        )

    def scores(self, ids: list[int]) -> torch.Tensor:
        self.model.reset()
        self.model.eval(ids)
        return torch.log_softmax(torch.from_numpy(self.model.scores[: len(ids)].copy()).float(), dim=-1)

    def every_position(self, ids: list[int], top: int) -> list[list[tuple[float, int]]]:
        return [best(row, top) for row in self.scores(ids)]

    def greedy(self, ids: list[int], count: int) -> list[int]:
        tokens = [int(self.scores(ids)[-1].argmax())]
        while len(tokens) < count and tokens[-1] != self.model.token_eos():
            self.model.eval(tokens[-1:])
            tokens.append(int(self.model.scores[self.model.n_tokens - 1].argmax()))
        return tokens

    def tokenise(self, text: str) -> list[int]:
        return list(self.model.tokenize(text.encode(), add_bos=True, special=False))


def likeliest(step: dict[str, Any]) -> list[tuple[float, int]]:
    """(log-probability, token), likeliest first, without what is too unlikely for the server to tell."""
    nan = float("nan")
    found = [(nan if row["logprob"] is None else row["logprob"], int(row["id"])) for row in step["top_logprobs"]]
    # It computes probabilities in fp32; what is next to nothing becomes zero, and its logarithm no number.
    return sorted((row for row in found if not row[0] <= LEAST), reverse=True)


def best(row: torch.Tensor, top: int) -> list[tuple[float, int]]:
    values, tokens = row.topk(min(top, len(row)))
    return list(zip(values.tolist(), tokens.tolist(), strict=True))


@contextlib.contextmanager
def engine(request: dict[str, Any], job: dict[str, Any], gguf: Path) -> Iterator[Any]:
    """The loaded file: fp32 weights and cache, no flash attention, on the CPU."""
    longest = max(len(ids) for ids in [*job["ids"], job["greedy_ids"]]) + job["greedy_tokens"] + 8
    log = gguf.with_suffix(".log")
    threads = int(request["threads"])
    if request["server"]:
        with served(request["server"], gguf, longest, threads, log) as url:
            yield Http(url)
        return
    with told_on_failure(log):
        if request["binding"] == "xllamacpp":
            server = in_process(gguf, longest, threads)
            if not hasattr(server, "listening_address"):
                raise RuntimeError("this xllamacpp has no server to talk to; install 2026.4 or later")
            llama: Any = Http(server.listening_address)
        else:
            server, llama = None, Binding(gguf, longest, threads)
    try:
        yield llama
    finally:
        del server, llama
        gc.collect()


def in_process(gguf: Path, context: int, threads: int) -> Any:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(gguf)
    params.n_ctx, params.n_parallel, params.n_gpu_layers, params.warmup = context, 1, 0, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    return xllamacpp.Server(params)


@contextlib.contextmanager
def served(server: str, gguf: Path, context: int, threads: int, log: Path) -> Iterator[str]:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = f"--host 127.0.0.1 --port {port} -c {context} -np 1 -ngl 0 -t {threads} --no-warmup".split()
    exact = ["--flash-attn", "off", "--cache-type-k", "f32", "--cache-type-v", "f32"]
    with log.open("w") as file:
        process = subprocess.Popen([server, "-m", str(gguf), *options, *exact], stdout=file, stderr=file)
        try:
            wait_until_ready(process, f"http://127.0.0.1:{port}", log)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait()


def wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(reason(log) or f"llama-server ended (exit {process.returncode})")
        try:
            with urllib.request.urlopen(url + "/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise RuntimeError("llama-server did not become ready")


@contextlib.contextmanager
def told_on_failure(log: Path) -> Iterator[None]:
    """llama.cpp says on stderr why a file does not load; its bindings only say that it does not."""
    sys.stderr.flush()
    kept = os.dup(2)
    with log.open("w") as file:
        os.dup2(file.fileno(), 2)
    try:
        yield
    except Exception as error:
        raise RuntimeError(reason(log) or f"{type(error).__name__}: {error}") from None
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def reason(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    telling = [line.strip() for line in lines if any(sign in line for sign in LOAD_SIGNS)]
    return f"llama.cpp does not load it: {telling[0]}" if telling else ""


if __name__ == "__main__":
    main(sys.argv[1])
    sys.stdout.flush()
    os._exit(0)
