"""What a launch of several processes is made of, piece by piece, in one process."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from support.building import build_recipe
from support.tiny_models import default_checkpoint, tiny_checkpoint, write_recipe
from transformers import AutoConfig, AutoModelForCausalLM

from patcher.architectures.analysis import Architecture
from patcher.architectures.model_class import quiet_transformers
from patcher.capture.batches import Batch, Place
from patcher.capture.processes import messages as of_processes
from patcher.capture.processes import reader as sharded_reader
from patcher.capture.processes.launch import World, forget_launch, world
from patcher.capture.processes.model import Sharding, own_device
from patcher.capture.processes.proof import Proof, make_stand_in, prove
from patcher.capture.processes.reader import device_kind, modes
from patcher.capture.processes.runner import _as_tensors, _enough, _from_tensors, assist
from patcher.cli import main
from patcher.cli.build_command import build as build_command
from patcher.errors import InputError


def test_a_launch_is_read_from_its_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert world() == World(0, 1, 0, 1) and not world().several
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    assert not world().several
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(InputError, match="missing or wrong"):
        world()
    for name, value in {"RANK": "3", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "a"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="MASTER_PORT"):
        world()
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert world() == World(3, 4, 1, 2)
    assert world().name.startswith("process 3 of 4, on ")
    forget_launch()
    assert world() == World(0, 1, 0, 1) and "TORCHELASTIC_RUN_ID" not in os.environ


def test_other_commands_run_in_the_first_process_only(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    launched = {"WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    for rank, shown in (("1", False), ("0", True)):
        for name, value in {**launched, "RANK": rank}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit) as ended:
            main(["schema"])
        assert not ended.value.code
        assert ("patch-model recipe" in capsys.readouterr().out) is shown
    assert "WORLD_SIZE" not in os.environ


def test_modes_and_devices_that_do_not_go_together_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert modes("auto", quantised=False) == ["fsdp", "tp", "replicate"]
    assert modes("tp", quantised=False) == ["tp"] and modes("auto", quantised=True) == ["replicate"]
    with pytest.raises(InputError, match="quantised base cannot be shared out"):
        modes("fsdp", quantised=True)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    assert device_kind("auto", "fsdp") == "cuda" and device_kind("cpu", "replicate") == "cpu"
    with pytest.raises(InputError, match="a device of its own"):
        device_kind("cuda:1", "fsdp")
    with pytest.raises(InputError, match="CUDA_VISIBLE_DEVICES"):
        device_kind("cpu", "fsdp")
    with pytest.raises(InputError, match="2 processes, 1 device"):
        own_device("cuda", World(1, 2, 1, 2))
    assert own_device("cuda", World(2, 4, 0, 2)) == torch.device("cuda", 0)


def test_copies_that_do_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharded_reader, "available_memory", lambda: 10 << 30)
    here = World(0, 4, 0, 4)
    sharded_reader._require_room(here, "cpu", 2 << 30, [])
    with pytest.raises(InputError, match=r"fsdp: no; 3\.0 GiB a copy, 2\.5 GiB free"):
        sharded_reader._require_room(here, "cpu", 3 << 30, ["fsdp: no"])


def test_personas_need_one_process(tmp_path: Path) -> None:
    layer = tiny_checkpoint(tmp_path / "base", "openai-community--gpt2")
    persona = {
        "method": "persona",
        "pairs": None,
        "questions": ["How are you?", "Why?"],
        "personas": {"positive": ["You are kind."], "negative": ["You are rude."]},
        "chat_template": False,
    }
    path = write_recipe(tmp_path / "recipe.yaml", tmp_path / "base", layer, tmp_path / "out", vector=persona)
    several: Any = type("Several", (), {"world": World(0, 2, 0, 2)})()
    with pytest.raises(InputError, match="in one process"):
        build_recipe(path, tmp_path / "out", processes=several)


def test_a_batch_survives_the_way_to_another_process() -> None:
    inputs = {"input_ids": torch.arange(12).view(3, 4), "attention_mask": torch.ones(3, 1, 4, 4, dtype=torch.bool)}
    places = (Place(7, 0, (1, 2), (1, 2, 3)), Place(2, 2, (3,), ()), Place(5, 2, (0,), (1,)))
    batch, layers = _from_tensors(_as_tensors(Batch(inputs, places), [3, -1]))
    assert layers == [3, -1]
    assert [place.prompt for place in batch.places] == [0, 1, 2]
    assert [(p.row, p.columns, p.counted) for p in batch.places] == [(p.row, p.columns, p.counted) for p in places]
    assert all(torch.equal(batch.inputs[name], value) for name, value in inputs.items())


def test_too_few_batches_are_halved() -> None:
    def batch(rows: int) -> Batch:
        return Batch({"input_ids": torch.zeros(rows, 3)}, tuple(Place(row, row, (0,), (0,)) for row in range(rows)))

    jobs = _enough([(0, batch(4)), (1, batch(1))], 4)
    assert [(number, one.shape[0]) for number, one in jobs] == [(0, 1), (0, 1), (0, 2), (1, 1)]
    assert [place.prompt for _number, one in jobs for place in one.places] == [0, 1, 2, 3, 0]
    assert len(_enough([(0, batch(2))], 4)) == 2


def test_processes_that_are_never_needed_are_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    said: dict[str, str] = {}
    first = object.__new__(of_processes.Processes)
    monkeypatch.setattr(first, "world", World(0, 2, 0, 2), raising=False)
    monkeypatch.setattr(first, "_opened", 0, raising=False)
    monkeypatch.setattr(first, "say", said.__setitem__)
    with of_processes.one_voice(first):
        pass
    other: Any = type("Other", (), {"hear": staticmethod(said.__getitem__)})()
    handler = signal.getsignal(signal.SIGTERM)
    try:
        assist(other)
    finally:
        signal.signal(signal.SIGTERM, handler)


def test_the_first_that_fails_speaks_and_the_others_are_silent() -> None:
    class Stub:
        def __init__(self, rank: int, speaks: bool) -> None:
            self.world, self.may_speak = World(rank, 2, rank, 2), lambda: speaks

    with pytest.raises(InputError) as said, of_processes.one_voice(Stub(1, True)):  # type: ignore[arg-type]
        raise InputError("wrong", where="here")
    assert "here (process 1 of 2" in str(said.value)
    with pytest.raises(SystemExit) as silent, of_processes.one_voice(Stub(0, False)):  # type: ignore[arg-type]
        raise InputError("wrong")
    assert silent.value.code == 2
    with pytest.raises(SystemExit) as silent, of_processes.one_voice(Stub(1, False)):  # type: ignore[arg-type]
        raise RuntimeError("Connection closed by peer [127.0.0.1]:5")
    assert silent.value.code == 1


def proved(folder: Path, model_type: str, spoilt: float = 1.0) -> Proof:
    """What the proof says in one process that keeps all, the stand-in's numbers multiplied by ``spoilt``."""
    default_checkpoint(folder, model_type, tokenizer=False)
    with quiet_transformers():
        blocks = Architecture(AutoConfig.from_pretrained(folder)).blocks
    sharding = Sharding(str(folder), None, None, "replicate", "float32", "cpu", blocks, 1, False)
    made = make_stand_in(sharding)
    assert made is not None
    wanted = {layer: states * (spoilt if layer == 1 else 1.0) for layer, states in made.wanted.items()}
    alone: Any = type("One", (), {"world": World(0, 1, 0, 1), "total": staticmethod(lambda *numbers: list(numbers))})()
    return prove(sharding, replace(made, wanted=wanted), alone)


def test_the_proof_sees_a_difference_of_a_thousandth(tmp_path: Path) -> None:
    assert proved(tmp_path / "a", "llama") == Proof(whole=False, refusal=None)
    assert "off by 0.001" in str(proved(tmp_path / "b", "llama", spoilt=1.001).refusal)
    assert "off by inf" in str(proved(tmp_path / "c", "llama", spoilt=float("nan")).refusal)
    assert proved(tmp_path / "d", "rwkv") == Proof(whole=True, refusal=None)


def test_the_stand_in_is_computed_by_the_stock_class(tmp_path: Path) -> None:
    default_checkpoint(tmp_path / "base", "llama", tokenizer=False)
    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    blocks = Architecture(model.config).blocks
    made = make_stand_in(Sharding(str(tmp_path / "base"), None, None, "fsdp", "float32", "cpu", blocks, 2, False))
    assert made is not None
    for name, content in made.files.items():
        (tmp_path / name).write_bytes(content.numpy().tobytes())
    with quiet_transformers(), torch.no_grad():
        states = AutoModelForCausalLM.from_pretrained(tmp_path).eval()(made.ids, output_hidden_states=True)
    torch.testing.assert_close(made.wanted[2], states.hidden_states[3])
    torch.testing.assert_close(made.wanted[-1], states.hidden_states[0])


def test_the_recipe_names_the_ways_that_there_are(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", tmp_path / "base", 1, tmp_path / "out")
    done = CliRunner().invoke(build_command, [str(recipe), "--set", "capture.parallel=pp", "--dry-run"])
    assert isinstance(done.exception, InputError) and "`fsdp` needs as little memory" in str(done.exception)
    done = CliRunner().invoke(build_command, [str(recipe), "--set", "capture.parallel=ddp", "--dry-run"])
    assert isinstance(done.exception, InputError) and "replicate" in str(done.exception)
