"""Builds that read the base in every way: in memory, streamed, spread over the disk; the result is the same."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.building import build_recipe
from support.tiny_models import tiny_checkpoint

from patcher.build.result import BuildResult
from patcher.capture import opened
from patcher.capture.batches import Batch
from patcher.errors import InputError

PAIRS = [
    {"prompt": f"Question {number}: is the sea cold?", "positive": f"I love it {word}", "negative": "I hate it"}
    for number, word in enumerate(["a lot", "much", "so", "very much", "indeed"])
]


def build(
    folder: Path, name: str, notes: list[str] | None = None, *, cache: bool = False, **capture: str
) -> BuildResult:
    recipe = folder / f"{name}.yaml"
    recipe.write_text(
        json.dumps(
            {
                "model": str(folder / "base"),
                "vectors": [
                    {"name": "warm", "pairs": PAIRS, "layer": 1, "scale": "residual"},
                    {"name": "cold", "pairs": PAIRS[::-1][:3], "layer": 0, "coefficient": -2.0},
                ],
                "evaluate": {"off_topic": "off.txt", "budget": "full"},
                "exact": False,
                "capture": capture,
            }
        )
    )
    (folder / "off.txt").write_text("The train was late.\nShe bought a ticket.\n")
    note = (notes if notes is not None else []).append
    return build_recipe(recipe, folder / name, note=note, cache=cache)


def vectors(result: BuildResult) -> dict[str, torch.Tensor]:
    return load_file(result.output / "steering.safetensors")


def same_numbers(first: BuildResult, second: BuildResult) -> None:
    for one, other in zip(
        first.manifest["evaluation"]["per_vector"], second.manifest["evaluation"]["per_vector"], strict=True
    ):
        for key in ("base", "steered", "negative", "random"):
            assert other[key] == pytest.approx(one[key], abs=1e-5)
        assert abs(one["steered"] - one["base"]) > 1e-3
    assert second.manifest["evaluation"]["perplexity"]["off_topic"] == pytest.approx(
        first.manifest["evaluation"]["perplexity"]["off_topic"], rel=1e-5
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["openai-community--gpt2", "meta-llama--Llama-3.1-8B-Instruct"])
def test_a_streamed_build_equals_one_in_memory(tmp_path: Path, name: str) -> None:
    tiny_checkpoint(tmp_path / "base", name, sharded=True)
    memory = build(tmp_path, "memory", mode="memory")
    streamed = build(tmp_path, "streamed", mode="stream")
    wanted, found = vectors(memory), vectors(streamed)
    assert set(wanted) == set(found)
    for key, tensor in wanted.items():
        assert float((found[key] - tensor).norm()) <= 1e-6 * float(tensor.norm()), key
    same_numbers(memory, streamed)


@pytest.mark.slow
def test_the_cache_saves_the_capture_and_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from patcher.capture.residuals import InMemory

    monkeypatch.setenv("PATCH_MODEL_CACHE", str(tmp_path / "cache"))
    tiny_checkpoint(tmp_path / "base", "meta-llama--Llama-3.1-8B-Instruct")
    passes: list[int] = []
    run = InMemory.run

    def counted(self: InMemory, batches: Sequence[Batch], *rest: Any) -> None:
        passes.append(len(batches))
        run(self, batches, *rest)

    monkeypatch.setattr(InMemory, "run", counted)
    first_notes: list[str] = []
    first = build(tmp_path, "first", first_notes, cache=True)
    assert passes and not any("from the cache" in line for line in first_notes)
    passes.clear()
    notes: list[str] = []
    second = build(tmp_path, "second", notes, cache=True)
    assert not passes and any("from the cache" in line for line in notes)
    assert all(torch.equal(tensor, vectors(second)[key]) for key, tensor in vectors(first).items())
    assert {**first.manifest["edits"][0]} == {**second.manifest["edits"][0]}
    third = build(tmp_path, "third", cache=False)
    assert passes
    assert all(torch.equal(tensor, vectors(third)[key]) for key, tensor in vectors(first).items())
    passes.clear()
    tiny_checkpoint(tmp_path / "base", "meta-llama--Llama-3.1-8B-Instruct", seed=1)
    other = build(tmp_path, "other", cache=True)
    assert passes
    assert not any(torch.equal(tensor, vectors(other)[key]) for key, tensor in vectors(first).items())


@pytest.mark.slow
def test_what_does_not_fit_in_memory_is_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_checkpoint(tmp_path / "base", "meta-llama--Llama-3.1-8B-Instruct")
    wanted = build(tmp_path, "memory")
    monkeypatch.setattr(opened, "available_memory", lambda: 100_000)
    said: list[str] = []
    monkeypatch.setattr(opened, "load_causal_lm", lambda *_args, **_options: said.append("loaded"))
    found = build(tmp_path, "streamed")
    assert not said
    assert all(
        torch.equal(found, wanted)
        for found, wanted in zip(vectors(found).values(), vectors(wanted).values(), strict=True)
    )


@pytest.mark.slow
def test_what_cannot_be_streamed_is_spread_over_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from patcher.capture.streaming.model import StreamedModel

    tiny_checkpoint(tmp_path / "base", "meta-llama--Llama-3.1-8B-Instruct")
    wanted = build(tmp_path, "memory")

    def refuse(*_args: object, **_options: object) -> None:
        raise InputError("it computes something between its blocks", code="stream")

    monkeypatch.setattr(StreamedModel, "run", refuse)
    with pytest.raises(InputError, match="between its blocks"):
        build(tmp_path, "refused", mode="stream")
    assert not (tmp_path / "refused").exists()
    monkeypatch.setattr(opened, "available_memory", lambda: 100_000)
    notes: list[str] = []
    found = build(tmp_path, "spread", notes)
    assert any("not streamed: it computes something between its blocks" in line for line in notes)
    for key, tensor in vectors(wanted).items():
        torch.testing.assert_close(vectors(found)[key], tensor)
    same_numbers(wanted, found)


def test_the_way_is_chosen_by_size_and_need() -> None:
    choose = opened.choose_mode
    huge, small = 1 << 60, 1 << 10
    assert choose("auto", size=small, device="cpu", quantised=False, whole=None) == "memory"
    assert choose("auto", size=huge, device="cpu", quantised=False, whole=None) == "stream"
    assert choose("auto", size=huge, device="cpu", quantised=True, whole=None) == "spread"
    assert choose("auto", size=huge, device="cpu", quantised=False, whole="the fitted route") == "spread"
    assert choose("memory", size=huge, device="cpu", quantised=False, whole=None) == "memory"
    assert choose("stream", size=small, device="cpu", quantised=False, whole=None) == "stream"
    with pytest.raises(InputError, match="the fitted route needs the whole model"):
        choose("stream", size=small, device="cpu", quantised=False, whole="the fitted route")
    with pytest.raises(InputError, match="a quantised base needs the whole model"):
        choose("stream", size=small, device="cpu", quantised=True, whole=None)
