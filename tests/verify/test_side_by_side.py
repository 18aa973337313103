"""Passes side by side over a model on the disk give, bit by bit, what each gives alone over the model in memory."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.tiny_models import default_checkpoint, tiny_checkpoint

from patcher.architectures.model_class import quiet_transformers
from patcher.verify.transformers_stack import RUNNER

# The parts of the program find each other beside it.
sys.path.append(str(RUNNER.parent))
from disk_loading import values_left_on_disk
from shared_weights import OnDisk
from side_by_side import SideBySide, Work, changed, this_pass

KINDS = {"meta-llama--Llama-3.2-1B": "model.layers", "gpt2": "transformer.h", "gemma2": "model.layers"}
IDS = [torch.tensor([[5, 17, 3, 40, 21, 8]]), torch.tensor([[9, 2, 30, 4], [1, 1, 7, 7]])]


def loaded(folder: Path, dtype: Any, **options: Any) -> Any:
    with quiet_transformers(), values_left_on_disk():
        found = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)
    return found.eval()


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return found


def under_hook(model: Any, blocks: str) -> torch.Tensor:
    owner = this_pass()

    def add(_module: Any, _inputs: Any, output: Any) -> Any:
        if this_pass() is not owner:
            return None
        return output + 0.5 if isinstance(output, torch.Tensor) else (output[0] + 0.5, *output[1:])

    handle = model.get_submodule(f"{blocks}.1").register_forward_hook(add)
    try:
        return logits(model, IDS[0])
    finally:
        handle.remove()


def decoded(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.generate(
            IDS[0], attention_mask=torch.ones_like(IDS[0]), max_new_tokens=3, do_sample=False, pad_token_id=0
        )
    return found


@pytest.fixture(scope="module", params=list(KINDS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    place = tmp_path_factory.mktemp("side-by-side") / "base"
    if "--" in request.param:
        tiny_checkpoint(place, request.param, dtype=torch.bfloat16)
    else:
        default_checkpoint(place, request.param, dtype=torch.bfloat16)
    return place, KINDS[request.param]


@pytest.mark.parametrize("memory", [0, 1 << 30])
def test_it_gives_what_passes_give_alone(folder: tuple[Path, str], tmp_path: Path, memory: int) -> None:
    place, blocks = folder
    disk = {"device_map": {"": "disk"}, "offload_folder": str(tmp_path)}
    wide, own = loaded(place, torch.float32, **disk), loaded(place, "auto", **disk)
    whole, half = loaded(place, torch.float32), loaded(place, "auto")
    name = next(name for name, one in whole.named_parameters() if name.startswith(f"{blocks}.1.") and one.ndim == 2)
    found: dict[str, torch.Tensor] = {}

    def keep(key: str, work: Callable[[], torch.Tensor]) -> Work:
        return lambda: found.update({key: work()})

    def halved() -> torch.Tensor:
        with changed({name: lambda parameter: parameter.mul_(0.5)}):
            return logits(wide, IDS[0])

    def second() -> list[Work]:
        # What the first round found is there; decoding has gone on by one token at most.
        assert {"first", "own", "hook", "halved"} <= set(found) and "decoded" not in found
        return [keep("second", lambda: logits(wide, IDS[1]))]

    side = SideBySide([wide, own], blocks, memory)
    first = [
        keep("first", lambda: logits(wide, IDS[0])),
        keep("hook", lambda: under_hook(wide, blocks)),
        keep("halved", halved),
        keep("decoded", lambda: decoded(wide)),
        keep("own", lambda: logits(own, IDS[1])),
    ]
    side.run(lambda: first, second)
    assert torch.equal(found["first"], logits(whole, IDS[0]))
    assert torch.equal(found["second"], logits(whole, IDS[1]))
    assert torch.equal(found["hook"], under_hook(whole, blocks))
    assert not torch.equal(found["hook"], found["first"])
    assert torch.equal(found["decoded"], decoded(whole))
    assert torch.equal(found["own"], logits(half, IDS[1]))
    with torch.no_grad():
        whole.get_parameter(name).mul_(0.5)
    assert torch.equal(found["halved"], logits(whole, IDS[0]))
    # The three tokens were three readings, and nothing else was a reading of its own.
    assert set(side.on_disk.reads.values()) <= {1, 3} and max(side.on_disk.reads.values()) == 3
    assert not any(parameter.device.type != "meta" for parameter in wide.parameters())


def test_the_loader_reads_no_value_and_says_what_it_would_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import load_file, save_file
    from transformers import core_model_loading

    tiny_checkpoint(tmp_path / "base", "meta-llama--Llama-3.2-1B", dtype=torch.bfloat16)
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    del tensors["model.norm.weight"]
    tensors["model.layers.0.mlp.down_proj.bias"] = torch.zeros(4)
    save_file(tensors, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    copied: list[Any] = []
    honest = core_model_loading._materialize_copy
    monkeypatch.setattr(
        core_model_loading, "_materialize_copy", lambda *given: copied.append(given[0]) or honest(*given)
    )
    options = {"device_map": {"": "disk"}, "offload_folder": str(tmp_path), "output_loading_info": True}
    with quiet_transformers():
        _, said = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", **options)
        assert copied
        copied.clear()
        with values_left_on_disk():
            _, now = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", **options)
    assert now == said and now["missing_keys"] and now["unexpected_keys"]
    assert not copied


def test_what_a_pass_raises_is_raised_after_the_others_have_ended(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "base", "meta-llama--Llama-3.2-1B", dtype=torch.bfloat16)
    disk = {"device_map": {"": "disk"}, "offload_folder": str(tmp_path)}
    model = loaded(tmp_path / "base", torch.float32, **disk)
    ended: list[str] = []

    def bad() -> None:
        logits(model, torch.tensor([[10**9]]))

    def good() -> None:
        logits(model, IDS[0])
        ended.append("good")

    with pytest.raises(IndexError):
        SideBySide([model], "model.layers", 0).run(lambda: [bad, good])
    assert ended == ["good"]


def test_memory_is_taken_again_unless_something_refers_to_it() -> None:
    on_disk, stored = OnDisk(), torch.ones(4, 4, dtype=torch.bfloat16)
    weight = torch.zeros(4, 4)
    place, row = weight.data_ptr(), weight[1]
    on_disk.give_back([weight])
    other = on_disk.widened(stored, torch.float32)
    assert other.data_ptr() != place and not row.any()
    del row
    on_disk.give_back([weight])
    again = on_disk.widened(stored, torch.float32)
    assert again.data_ptr() == place and torch.equal(again, torch.ones(4, 4))
    # It is taken by one only.
    assert on_disk.widened(stored, torch.float32).data_ptr() != place
