"""What writing the steered copy costs, beside `cp -r` and beside load + modify + save_pretrained.

    python tests/benchmarks/write_memory.py [--gigabytes 2] [--folder DIR] [--repeat 3]

Makes a Llama-shaped bf16 checkpoint of four shards, does each job in a process of its own, and prints wall time (the
best of the repeats), bytes that went to the disk, and peak resident memory (VmHWM), all without and with an fsync.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SHARDS = 4
LAYER = 3
GIB, MIB = 1 << 30, 1 << 20


def shapes(config: dict[str, Any]) -> Iterator[tuple[str, list[int]]]:
    """Every tensor of an untied Llama without biases."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    keys = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    yield "model.embed_tokens.weight", [config["vocab_size"], hidden]
    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}."
        for name, rows in (("q", hidden), ("k", keys), ("v", keys), ("o", hidden)):
            yield f"{block}self_attn.{name}_proj.weight", [rows, hidden]
        yield f"{block}mlp.gate_proj.weight", [inner, hidden]
        yield f"{block}mlp.up_proj.weight", [inner, hidden]
        yield f"{block}mlp.down_proj.weight", [hidden, inner]
        yield f"{block}input_layernorm.weight", [hidden]
        yield f"{block}post_attention_layernorm.weight", [hidden]
    yield "model.norm.weight", [hidden]
    yield "lm_head.weight", [config["vocab_size"], hidden]


def make_checkpoint(folder: Path, size: int) -> Path:
    """A checkpoint of about ``size`` bytes, written piece by piece; the values are noise."""
    folder.mkdir(parents=True)
    wide = size >= GIB // 2
    hidden, inner, vocabulary = (2048, 5632, 32000) if wide else (512, 1408, 8000)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": 32 if wide else 8,
        "num_key_value_heads": 4,
        "vocab_size": vocabulary,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-05,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    a_layer = 2 * (hidden * (2 * hidden + 2 * (hidden // config["num_attention_heads"] * 4)) + 3 * hidden * inner)
    config["num_hidden_layers"] = max(LAYER + 1, (size - 4 * vocabulary * hidden) // a_layer)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    tensors = list(shapes(config))
    total = sum(2 * count(shape) for _, shape in tensors)
    noise = os.urandom(4 * MIB)
    weight_map: dict[str, str] = {}
    number, start = 0, 0
    while start < len(tensors):
        number += 1
        end, held = start, 0
        while end < len(tensors) and (held < total / SHARDS or number == SHARDS):
            held += 2 * count(tensors[end][1])
            end += 1
        name = f"model-{number:05d}-of-{SHARDS:05d}.safetensors"
        write_shard(folder / name, tensors[start:end], noise)
        weight_map.update(dict.fromkeys((key for key, _ in tensors[start:end]), name))
        start = end
    assert number == SHARDS
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def count(shape: list[int]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def write_shard(path: Path, tensors: list[tuple[str, list[int]]], noise: bytes) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name, shape in tensors:
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [place, place + 2 * count(shape)]}
        place += 2 * count(shape)
    raw = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        while place:
            place -= file.write(noise[: min(place, len(noise))])


# The jobs; each runs in a process of its own.


def ours(base: Path, target: Path, *, link: bool = False) -> None:
    """The write step of a build: routes/apply, write_copy, and the atomic folder (which syncs)."""
    import torch

    from patcher.checkpoint.folder import CheckpointFolder
    from patcher.checkpoint.staging import staged_folder
    from patcher.checkpoint.writer import write_copy
    from patcher.routes.apply import tensors_to_write

    started()
    checkpoint = CheckpointFolder(base)
    plan: Any = flag_plan(checkpoint.config)
    created, replaced = tensors_to_write(plan, {LAYER: torch.randn(checkpoint.config["hidden_size"])}, checkpoint)
    with staged_folder(target) as stage:
        changes = {"mlp_bias": True}
        write_copy(checkpoint, stage, created=created, replaced=replaced, config_changes=changes, link=link)


def linked(base: Path, target: Path) -> None:
    ours(base, target, link=True)


def flag_plan(config: dict[str, Any]) -> Any:
    from patcher.routes.plan import Plan, TensorWrite

    writes = []
    for layer in range(config["num_hidden_layers"]):
        for part, size in (("gate", "intermediate_size"), ("up", "intermediate_size"), ("down", "hidden_size")):
            name = f"model.layers.{layer}.mlp.{part}_proj.bias"
            carried = layer if (layer, part) == (LAYER, "down") else None
            dtype = "F32" if carried is not None else "BF16"
            writes.append(TensorWrite(name, name, "created", carried, 1.0, (config[size],), dtype))
    changes = {"mlp_bias": True}
    return Plan("flag", True, "none", "LlamaForCausalLM", "model.layers", {}, tuple(writes), changes, {}, "benchmark")


def cp(base: Path, target: Path) -> None:
    started()
    subprocess.run(["cp", "-r", str(base), str(target)], check=True)


def cp_sync(base: Path, target: Path) -> None:
    cp(base, target)
    for file in target.iterdir():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())


def stock(base: Path, target: Path) -> None:
    """What one would write by hand."""
    import torch
    from transformers import AutoModelForCausalLM

    started()
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, mlp_bias=True)
    with torch.no_grad():
        model.model.layers[LAYER].mlp.down_proj.bias.add_(torch.randn(model.config.hidden_size))
    largest = max(file.stat().st_size for file in base.glob("*.safetensors"))
    model.save_pretrained(target, max_shard_size=largest)


JOBS = {
    "cp -r": cp,
    "cp -r, fsync": cp_sync,
    "patch-model (fsync, rename)": ours,
    "patch-model --link": linked,
    "load + modify + save_pretrained": stock,
}

_start = 0.0
_imported = 0


def started() -> None:
    """The imports are done; from here on it is the job."""
    global _start, _imported
    _imported = status("VmHWM")
    _start = time.perf_counter()


def status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def written_bytes() -> int:
    own = int(Path("/proc/self/io").read_text().split("write_bytes:")[1].split()[0])
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_oublock * 512
    return max(own, children)


def run_job(name: str, base: Path, target: Path) -> dict[str, float]:
    before = written_bytes()
    JOBS[name](base, target)
    seconds = time.perf_counter() - _start
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    peak = children if name.startswith("cp") else status("VmHWM")
    return {"seconds": seconds, "written": written_bytes() - before, "peak": peak, "imported": _imported}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--folder", type=Path, help="where to work (default: the temporary folder)")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--job", nargs=3, metavar=("NAME", "BASE", "TARGET"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        sys.path.insert(0, str(ROOT))
        name, base, target = options.job
        print(json.dumps(run_job(name, Path(base), Path(target))))
        return
    with tempfile.TemporaryDirectory(prefix="write-memory-", dir=options.folder) as scratch:
        base = make_checkpoint(Path(scratch) / "base", int(options.gigabytes * GIB))
        size = sum(file.stat().st_size for file in base.iterdir())
        os.sync()
        results: dict[str, dict[str, float]] = {}
        order = [*JOBS]
        for _ in range(options.repeat):
            for name in order:
                result = one_run(name, base, Path(scratch) / "target")
                if name not in results or result["seconds"] < results[name]["seconds"]:
                    results[name] = result
            # Each comes first once: what a job leaves to the disk is paid for by the next.
            order.append(order.pop(0))
    print_table(results, size)


def one_run(name: str, base: Path, target: Path) -> dict[str, float]:
    warm(base)
    command = [sys.executable, __file__, "--job", name, str(base), str(target)]
    environment = {**os.environ, "TRANSFORMERS_VERBOSITY": "critical"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    shutil.rmtree(target)
    os.sync()
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def warm(base: Path) -> None:
    """Every job reads from the page cache."""
    for file in base.iterdir():
        with file.open("rb", buffering=0) as handle:
            while handle.read(16 * MIB):
                pass


def print_table(results: dict[str, dict[str, float]], size: int) -> None:
    print(f"\n{size / 1e9:.2f} GB, bf16, {SHARDS} shards; best of the repeats\n")
    print(f"{'':34}{'seconds':>9}{'x cp':>7}{'GB written':>12}{'peak MiB':>10}{'over imports':>14}")
    base = results["cp -r"]["seconds"]
    for name in JOBS:
        row = results[name]
        over = "-" if name.startswith("cp") else f"{(row['peak'] - row['imported']) / MIB:.1f}"
        print(
            f"{name:34}{row['seconds']:9.2f}{row['seconds'] / base:7.2f}{row['written'] / 1e9:12.2f}"
            f"{row['peak'] / MIB:10.0f}{over:>14}"
        )
    mine, theirs = results["patch-model (fsync, rename)"], results["load + modify + save_pretrained"]
    print(f"\nsave_pretrained / patch-model: {theirs['seconds'] / mine['seconds']:.1f} x the time,", end=" ")
    print(f"{theirs['peak'] / mine['peak']:.1f} x the memory")


if __name__ == "__main__":
    main()
