"""Streaming: one pass over the weights gives what the model in memory gives, and reads no more than it needs."""

from __future__ import annotations

import errno
import json
import math
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.old_transformers import skip_if_too_old
from support.tiny_models import CONFIGS, OF_EACH_FORWARD_PASS, VOCABULARY, default_checkpoint, tiny_checkpoint
from transformers import AutoConfig, AutoModelForCausalLM

from patcher.architectures.analysis import Architecture
from patcher.architectures.model_class import quiet_transformers
from patcher.capture.batches import Batch, make_batches, padded, shared_rows
from patcher.capture.forward import read_blocks
from patcher.capture.logits import LoadedModel, LogitsJob
from patcher.capture.streaming.model import StreamedModel
from patcher.capture.streaming.stand_ins import OnDisk
from patcher.capture.streaming.stored_tensors import StoredTensors
from patcher.checkpoint.folder import CheckpointFolder
from patcher.checkpoint.safetensors_file import read_tensor
from patcher.checkpoint.safetensors_writer import write_tensors
from patcher.errors import InputError, OutsideError

DEFAULT = [
    "mixtral",
    "qwen3_moe",
    "deepseek_v3",
    "gemma2",
    "gemma3_text",
    "gemma3n_text",
    "gpt_neo",
    "xglm",
    "mamba",
    "jamba",
    "zamba2",
    "rwkv",
    "recurrent_gemma",
    "olmo2",
    "cohere",
    "glm4",
    "diffllama",
    "biogpt",
    "hrm_text",
]
LLAMA = "meta-llama--Llama-3.1-8B-Instruct"
TOLERANCE = 1e-6
"""Relative. Most classes give the same bits; where a weight lies in memory decides how some kernels add up."""

Found = dict[tuple[int, int], torch.Tensor]


def checkpoint(folder: Path, name: str, **options: Any) -> Path:
    skip_if_too_old(name)
    if (CONFIGS / f"{name}.json").exists():
        options.update({"quantization_config": None} if "gpt-oss" in name else {})
        tiny_checkpoint(folder, name, tokenizer=False, **options)
    else:
        default_checkpoint(folder, name, tokenizer=False, **options)
    return folder


def batches() -> list[Batch]:
    """Three of different widths; the longest row of the first has no padding."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for lengths in ((7, 5, 7), (12, 9), (4,)):
        ids = [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
        made.append(Batch(padded(ids, "right", 0)[0], ()))
    return made


def loaded(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[torch.nn.Module, str, int]:
    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    architecture = Architecture(model.config)
    return model, architecture.blocks, architecture.block_count


def in_memory(folder: Path, layers: Sequence[int], given: Sequence[Batch], dtype: torch.dtype = torch.float32) -> Found:
    model, blocks, _ = loaded(folder, dtype)
    found: Found = {}
    for index, batch in enumerate(given):

        def keep(layer: int, hidden: torch.Tensor, index: int = index) -> None:
            found[layer, index] = hidden.clone()

        read_blocks(model, blocks, layers, batch.inputs_in(dtype), keep)
    return found


def stream(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> StreamedModel:
    with quiet_transformers():
        config = AutoConfig.from_pretrained(folder)
    blocks = options.pop("blocks", None) or Architecture(config).blocks
    options = {"memory": 1 << 30, "scratch": folder.parent / "scratch", **options}
    return StreamedModel(CheckpointFolder(folder), config, blocks, dtype=dtype, **options)


def streamed(model: StreamedModel, layers: Sequence[int], given: Sequence[Batch]) -> Found:
    found: Found = {}
    model.run(given, layers, lambda layer, index, hidden: found.__setitem__((layer, index), hidden.clone()))
    return found


def distance(found: dict[Any, torch.Tensor], wanted: dict[Any, torch.Tensor]) -> float:
    """The largest, relative to the wanted tensor's norm."""
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert found[key].shape == tensor.shape and found[key].dtype == tensor.dtype
    return max(float((found[key] - wanted[key]).norm() / wanted[key].norm()) for key in wanted)


def sizes(folder: Path) -> dict[str, int]:
    return {name: info.end - info.start for name, info in CheckpointFolder(folder).tensors.items()}


def without(folder: Path, name: str, **replaced: torch.Tensor) -> None:
    """Write the single file again without a tensor."""
    kept = {key: read_tensor(info) for key, info in CheckpointFolder(folder).tensors.items() if key != name}
    (folder / "model.safetensors").unlink()
    write_tensors(folder / "model.safetensors", {**kept, **replaced})


@pytest.mark.parametrize("name", OF_EACH_FORWARD_PASS + DEFAULT)
def test_streamed_equals_in_memory(tmp_path: Path, name: str) -> None:
    folder = checkpoint(tmp_path / "m", name)
    _, _, count = loaded(folder)
    layers = [-1, 0, count - 1]
    wanted = in_memory(folder, layers, batches())
    assert distance(streamed(stream(folder), layers, batches()), wanted) <= TOLERANCE
    assert distance({0: wanted[0, 0]}, {0: wanted[count - 1, 0]}) > 1e-2
    assert distance({0: wanted[0, 0][0]}, {0: wanted[0, 0][2]}) > 1e-2


@pytest.mark.slow_but("0-meta-llama--*", "0-openai-*", "6000-openai-*")
@pytest.mark.parametrize("name", [LLAMA, "openai-community--gpt2", "gemma3n_text", "zamba2", "deepseek_v3"])
@pytest.mark.parametrize("memory", [0, 6_000])
def test_activations_beyond_the_budget_go_to_the_disk_and_come_back(tmp_path: Path, name: str, memory: int) -> None:
    folder = checkpoint(tmp_path / "m", name)
    _, _, count = loaded(folder)
    layers = list(range(-1, count))
    wanted = in_memory(folder, layers, batches())
    assert distance(streamed(stream(folder, memory=memory), layers, batches()), wanted) <= TOLERANCE
    assert list((tmp_path / "scratch").iterdir()) == []


@pytest.mark.parametrize("name", [LLAMA, "mixtral", "openai-community--gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_half_precision_checkpoint_is_computed_in_any_dtype(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    folder = checkpoint(tmp_path / "m", name, dtype=torch.bfloat16)
    wanted = in_memory(folder, [1], batches(), dtype)
    assert distance(streamed(stream(folder, dtype), [1], batches()), wanted) <= TOLERANCE


@pytest.mark.parametrize("ahead", [True, False])
def test_only_the_shards_of_what_is_needed_are_opened(tmp_path: Path, ahead: bool) -> None:
    folder = checkpoint(tmp_path / "m", LLAMA, sharded=True)
    config = json.loads((folder / "config.json").read_text())
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    model = stream(folder, ahead=ahead)
    assert not model.stored.opened
    wanted = in_memory(folder, [0, 1], batches())
    assert distance(streamed(model, [0, 1], batches()), wanted) <= TOLERANCE
    blocks = [name for name in weight_map if name.startswith(("model.layers.0.", "model.layers.1."))]
    needed = {weight_map[name] for name in [*blocks, "model.embed_tokens.weight"]}
    assert model.stored.opened == needed < set(weight_map.values())
    rows = len(torch.unique(torch.cat([batch.inputs["input_ids"].flatten() for batch in batches()])))
    assert rows < VOCABULARY / 4
    exactly = sum(sizes(folder)[name] for name in blocks) + rows * config["hidden_size"] * 4
    assert model.bytes_read == exactly < sum(sizes(folder).values()) / 2


def test_the_entrance_alone_reads_no_block(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "m", "facebook--opt-125m")
    model = stream(folder)
    found = streamed(model, [-1], batches())
    assert distance(found, in_memory(folder, [-1], batches())) == 0.0
    # OPT takes the positions from a table of its own.
    tables = {"model.decoder.embed_tokens.weight", "model.decoder.embed_positions.weight"}
    assert model.bytes_read < sum(sizes(folder)[name] for name in tables) / 2


def test_layer_by_layer_and_progress(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "m", LLAMA)
    seen, done = [], []
    stream(folder).run(batches(), [2, 0], lambda layer, index, _hidden: seen.append((layer, index)), done.append)
    assert seen == [(0, 0), (0, 1), (0, 2), (2, 0), (2, 1), (2, 2)] and done == [1, 2, 3]


def test_rows_that_share_prefixes(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "m", LLAMA)

    class Prompt:
        def __init__(self, *ids: int) -> None:
            self.ids, self.read = ids, (len(ids) - 1,)

    prompts = [Prompt(1, *range(20, 30), 5), Prompt(1, *range(20, 30), 6, 7), Prompt(1, 40)]
    rows = shared_rows(prompts, linear_tokens=1e9, longest=4096)
    given = list(make_batches(rows, prompts, token_budget=4096))
    assert given[0].inputs["attention_mask"].dtype == torch.bool
    assert distance(streamed(stream(folder, memory=0), [1], given), in_memory(folder, [1], given)) <= TOLERANCE


def test_one_block_is_in_memory_at_a_time(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "m", LLAMA)
    model = stream(folder)
    loaded_at: dict[int, set[str]] = {}

    def look(layer: int, _index: int, _hidden: torch.Tensor) -> None:
        here = {name for name, tensor in model.model.named_parameters() if not isinstance(tensor, OnDisk)}
        loaded_at[layer] = {".".join(name.split(".")[:3]) for name in here}

    model.run(batches(), [-1, 0, 1, 2, 3], look)
    assert loaded_at == {-1: set(), **{layer: {f"model.layers.{layer}"} for layer in range(4)}}
    assert all(isinstance(tensor, OnDisk) and tensor._whole is None for tensor in model.model.parameters())


def test_a_model_can_be_run_again(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "m", LLAMA)
    model, given = stream(folder), batches()
    first = streamed(model, [1], given)
    assert distance(streamed(model, [1], given), first) == 0.0
    assert distance(streamed(model, [0, 3], given[1:]), in_memory(folder, [0, 3], given[1:])) <= TOLERANCE


def test_the_next_block_is_read_while_one_computes_if_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint(tmp_path / "m", LLAMA)
    wanted = in_memory(folder, [3], batches())
    for room, elsewhere in ((1 << 40, [False, True, True, True]), (1 << 20, [False] * 4)):
        monkeypatch.setattr("patcher.capture.streaming.shell.available_memory", lambda room=room: room)
        model, seen = stream(folder), []

        def load(layer: int, load: Any = model._shell.load, seen: list[bool] = seen) -> dict[str, torch.Tensor]:
            seen.append(threading.current_thread() is not threading.main_thread())
            return load(layer)

        monkeypatch.setattr(model._shell, "load", load)
        assert distance(streamed(model, [3], batches()), wanted) <= TOLERANCE
        assert seen == elsewhere


def test_a_block_that_does_not_fit_beside_another_is_read_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint(tmp_path / "m", LLAMA)
    model = stream(folder)
    load = model._shell.load

    def only_alone(layer: int) -> dict[str, torch.Tensor]:
        if threading.current_thread() is not threading.main_thread():
            raise MemoryError
        return load(layer)

    monkeypatch.setattr(model._shell, "load", only_alone)
    assert distance(streamed(model, [3], batches()), in_memory(folder, [3], batches())) <= TOLERANCE


def test_no_memory_is_said_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = checkpoint(tmp_path / "m", LLAMA)

    def full(_layer: int) -> dict[str, torch.Tensor]:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes.")

    model = stream(folder)
    monkeypatch.setattr(model._shell, "load", full)
    with pytest.raises(OutsideError, match="do not fit in memory") as caught:
        streamed(model, [1], batches())
    assert caught.value.code == "memory"


def test_experts_that_are_stored_one_by_one(tmp_path: Path) -> None:
    """Twelve: as text, 10 sorts before 2."""
    folder = tmp_path / "m"
    config = AutoConfig.for_model(
        "mixtral", hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=VOCABULARY, num_local_experts=12,
    )  # fmt: skip
    torch.manual_seed(0)
    with quiet_transformers():
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    stored = [name for name in sizes(folder) if name.endswith("w1.weight") and ".layers.0." in name]
    assert len(stored) == 12
    wanted = in_memory(folder, [1], batches())
    assert distance(streamed(stream(folder), [1], batches()), wanted) <= TOLERANCE
    tensors = {name: read_tensor(info) for name, info in CheckpointFolder(folder).tensors.items()}
    other = stored[0].replace(".experts.0.", ".experts.10."), stored[0].replace(".experts.0.", ".experts.2.")
    tensors[other[0]], tensors[other[1]] = tensors[other[1]], tensors[other[0]]
    (folder / "model.safetensors").unlink()
    write_tensors(folder / "model.safetensors", tensors)
    assert distance(streamed(stream(folder), [1], batches()), wanted) > 1e-3


def test_a_checkpoint_of_the_bare_model(tmp_path: Path) -> None:
    """As GPT-2 was released: without the prefix, with the mask as a stored buffer."""
    folder = checkpoint(tmp_path / "m", "openai-community--gpt2")
    wanted = in_memory(folder, [0, 2], batches())
    tensors = {name: read_tensor(info) for name, info in CheckpointFolder(folder).tensors.items()}
    renamed = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    assert renamed.keys() != tensors.keys()
    (folder / "model.safetensors").unlink()
    write_tensors(folder / "model.safetensors", {**renamed, "h.0.attn.bias": torch.ones(1, 1, 8, 8)})
    assert distance(streamed(stream(folder), [0, 2], batches()), wanted) <= TOLERANCE


def test_without_transformers_rules_the_names_of_the_class_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint(tmp_path / "m", LLAMA)
    wanted = in_memory(folder, [1], batches())
    import transformers.core_model_loading as loading

    monkeypatch.delattr(loading, "rename_source_key")
    assert distance(streamed(stream(folder), [1], batches()), wanted) <= TOLERANCE


@pytest.mark.parametrize("name", [LLAMA, "openai-community--gpt2", "mixtral", "cohere", "gemma2", "bart"])
@pytest.mark.parametrize("memory", [1 << 30, 0])
def test_logits_under_vectors(tmp_path: Path, name: str, memory: int) -> None:
    folder = checkpoint(tmp_path / "m", name)
    model, blocks, count = loaded(folder)
    generator = torch.Generator().manual_seed(1)
    vectors = [torch.randn(model.config.hidden_size, generator=generator) for _ in range(3)]
    variants = [{}, {1: vectors[0]}, {-1: vectors[1], count - 1: vectors[2]}]
    jobs = [
        LogitsJob(batch.inputs, variant, torch.tensor([batch.shape[1] - 1, 1]))
        for batch in batches()
        for variant in variants
    ]
    wanted: dict[int, torch.Tensor] = {}
    found: dict[int, torch.Tensor] = {}
    LoadedModel(model, blocks).logits(jobs, lambda index, logits: wanted.__setitem__(index, logits.clone()))
    stream(folder, memory=memory).logits(jobs, lambda index, logits: found.__setitem__(index, logits.clone()))
    assert distance(found, wanted) <= TOLERANCE
    assert distance({0: wanted[1]}, {0: wanted[0]}) > 1e-2 and distance({0: wanted[2]}, {0: wanted[0]}) > 1e-2


def test_logits_read_every_weight_once(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "m", LLAMA)
    model = stream(folder)
    jobs = [LogitsJob(batch.inputs, {}, torch.tensor([0])) for batch in batches()]
    model.logits(jobs, lambda _index, _logits: None)
    whole = sum(sizes(folder).values())
    embedding = sizes(folder)["model.embed_tokens.weight"]
    assert whole - embedding < model.bytes_read <= whole


@pytest.mark.parametrize(
    ("name", "gone"),
    [
        (LLAMA, "model.layers.1.mlp.down_proj.weight"),
        (LLAMA, "model.embed_tokens.weight"),
        ("mixtral", "model.layers.1.block_sparse_moe.experts.2.w2.weight"),
    ],
)
def test_a_missing_tensor_is_an_error_and_never_random(tmp_path: Path, name: str, gone: str) -> None:
    folder = checkpoint(tmp_path / "m", name, **({"tie_word_embeddings": False} if name == LLAMA else {}))
    assert gone in sizes(folder)
    without(folder, gone)
    with pytest.raises(InputError) as caught:
        streamed(stream(folder), [1], batches())
    assert caught.value.code in ("checkpoint", "stream")
    assert gone.split("experts")[0].rpartition("block_sparse_moe")[0] in str(caught.value)


def test_a_tensor_of_another_shape_is_an_error(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "m", LLAMA)
    name = "model.layers.1.mlp.down_proj.weight"
    without(folder, name, **{name: torch.zeros(3, 5)})
    with pytest.raises(InputError, match="another shape") as caught:
        streamed(stream(folder), [1], batches())
    assert "(3, 5) instead of" in str(caught.value) and caught.value.code == "checkpoint"


def test_a_file_that_became_shorter_is_an_error(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "m", LLAMA)
    model = stream(folder)
    weights = folder / "model.safetensors"
    with weights.open("r+b") as file:
        file.truncate(weights.stat().st_size // 3)
    with pytest.raises(InputError, match="truncated"):
        streamed(model, [3], batches())


def test_an_index_that_names_the_wrong_shard_is_an_error(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "m", LLAMA, sharded=True)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    name = "model.layers.0.mlp.up_proj.weight"
    others = set(content["weight_map"].values()) - {content["weight_map"][name]}
    content["weight_map"][name] = min(others)
    index.write_text(json.dumps(content))
    with pytest.raises(InputError, match="which it does not"):
        streamed(stream(folder), [0], batches())


@pytest.mark.parametrize(("name", "why"), [("xlm", "between its blocks"), ("reformer", "ReformerOutput")])
def test_a_class_that_cannot_be_streamed_is_refused(tmp_path: Path, name: str, why: str) -> None:
    folder = checkpoint(tmp_path / "m", name)
    with pytest.raises(InputError, match=why) as caught:
        streamed(stream(folder), [1], batches())
    assert caught.value.code == "stream" and "capture.mode: memory" in str(caught.value)


def test_a_class_that_runs_its_blocks_again_gives_residuals_but_no_logits(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "m", "hrm_text")
    job = LogitsJob(batches()[0].inputs, {}, torch.tensor([0]))
    with pytest.raises(InputError, match="after the last one"):
        stream(folder).logits([job], lambda _index, _logits: None)


def test_blocks_that_are_not_called_are_refused(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "m", LLAMA)
    model = stream(folder)
    model._shell.blocks = torch.nn.ModuleList([torch.nn.Identity()])
    with pytest.raises(InputError, match="does not call the blocks"):
        streamed(model, [0], batches())


def test_quantised_and_pickled_checkpoints_are_refused(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "m", LLAMA)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(InputError, match="quantised") as caught:
        stream(folder)
    assert caught.value.code == "stream"
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="only a safetensors") as caught:
        StoredTensors(CheckpointFolder(folder))
    assert caught.value.code == "stream"


def test_what_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "m", LLAMA)
    model = stream(folder, memory=0)

    def fail(layer: int, _index: int, _hidden: torch.Tensor) -> None:
        if layer == 1:
            raise KeyError("a fault")

    with pytest.raises(KeyError):
        model.run(batches(), [0, 1, 2], fail)
    assert list((tmp_path / "scratch").iterdir()) == []
    assert distance(streamed(model, [1], batches()), in_memory(folder, [1], batches())) <= TOLERANCE


def test_a_full_disk_is_said_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_arguments: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    folder = checkpoint(tmp_path / "m", LLAMA)
    model = stream(folder, memory=0)
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OutsideError, match="do not fit on the disk") as caught:
        streamed(model, [1], batches())
    assert caught.value.code == "disk"


LIMITED = """
import resource, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from transformers import AutoConfig, AutoModelForCausalLM
import transformers.models.llama.modeling_llama
from patcher.capture.batches import Batch, padded
from patcher.capture.streaming.model import StreamedModel
from patcher.checkpoint.folder import CheckpointFolder

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))

folder, how, allowed, last = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
given = [Batch(padded([[5, 6, 7, 8] * 4], "right", 0)[0], ()) for _ in range(2)]
config = AutoConfig.from_pretrained(folder)
torch.nn.Linear(4, 4)(torch.ones(1, 4))
limit = status("VmSize") + allowed
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
before = status("VmSize")
if how == "memory":
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
else:
    model = StreamedModel(CheckpointFolder(folder), config, "model.layers", dtype=torch.float32,
                          memory=1 << 20, scratch=folder.parent)
    model.run(given, [last], lambda layer, index, hidden: None)
    print("read", model.bytes_read)
print("done", status("VmPeak") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc and RLIMIT_AS")
def test_a_model_that_is_larger_than_the_memory(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    with quiet_transformers():
        config = AutoConfig.for_model(
            "llama", hidden_size=512, intermediate_size=1408, num_hidden_layers=20, num_attention_heads=8,
            num_key_value_heads=8, vocab_size=20_000, tie_word_embeddings=False,
        )  # fmt: skip
        config.save_pretrained(folder)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    weights = {name: torch.full(tensor.shape, 0.01) for name, tensor in model.state_dict().items()}
    write_tensors(folder / "model.safetensors", weights)
    whole, block = sum(sizes(folder).values()), sum(n for k, n in sizes(folder).items() if ".layers.0." in k)
    allowed = 96 << 20
    assert whole > 3 * allowed and 4 * block < allowed

    def run(how: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", LIMITED, str(folder), how, str(allowed), "19"]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)

    done = run("stream")
    assert done.returncode == 0, done.stderr[-2000:]
    numbers = {words[0]: int(words[1]) for words in map(str.split, done.stdout.splitlines())}
    assert numbers["done"] <= allowed
    assert math.isclose(numbers["read"], 20 * block, rel_tol=0.01)
    failed = run("memory")
    assert failed.returncode != 0 and "done" not in failed.stdout, "the limit is none"
    assert "memory" in failed.stderr.splitlines()[-1]
