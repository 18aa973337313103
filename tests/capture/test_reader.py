"""Several requests in one pass over the weights: each is read as it is read alone, and nothing is read twice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_residuals import Prompt, contrast_prompts, load, prompts

from patcher.architectures.analysis import Architecture
from patcher.capture import residuals
from patcher.capture.batches import Batch
from patcher.capture.reader import Request, ResidualReader, reader_in_memory
from patcher.capture.residuals import InMemory, Residuals

LLAMA = "meta-llama--Llama-3.1-8B-Instruct"


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[list[Batch]]:
    """The batches of every pass."""
    passes: list[list[Batch]] = []
    original = InMemory.run

    def run(self: InMemory, batches: Sequence[Batch], *rest: Any) -> None:
        passes.append(list(batches))
        original(self, batches, *rest)

    monkeypatch.setattr(InMemory, "run", run)
    return passes


def both(folder: Path) -> tuple[ResidualReader, ResidualReader]:
    """One that reads request after request, and one that reads all in one pass."""
    model, architecture = load(folder, LLAMA)
    assert isinstance(architecture, Architecture)
    reader = reader_in_memory(model, architecture)
    return reader, replace(reader, one_pass=True)


def same(one: Residuals, other: Residuals) -> bool:
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("read", "norm_sums", "tokens"))


def requests() -> list[Request]:
    return [(contrast_prompts(), [1]), (contrast_prompts()[:3], [0]), ([], [0]), (prompts(), [0, 1])]


def shapes(batches: Sequence[Batch]) -> list[tuple[int, int]]:
    return [batch.shape for batch in batches]


def test_one_pass_reads_each_request_in_the_batches_that_it_has_alone(tmp_path: Path, ran: list[list[Batch]]) -> None:
    apart, at_once = both(tmp_path / "m")
    wanted = apart.read(requests())
    alone = [shape for batches in ran for shape in shapes(batches)]
    assert len(ran) == 3
    ran.clear()
    done: list[int] = []
    found = at_once.read(requests(), lambda now, _all: done.append(now))
    assert [shapes(batches) for batches in ran] == [alone]
    assert done == sorted(done) and done[-1] == sum(len(asked) for asked, _layers in requests())
    for one, other in zip(wanted, found, strict=True):
        assert set(one) == set(other) and all(same(one[layer], other[layer]) for layer in one)
    assert float((wanted[0][1].read[0] - wanted[0][1].read[1]).norm()) > 1e-3


def test_the_same_prompts_at_two_layers_are_run_once(tmp_path: Path, ran: list[list[Batch]]) -> None:
    apart, at_once = both(tmp_path / "m")
    [first], [second] = apart.read([(prompts(), [0])]), apart.read([(prompts(), [1])])
    alone = shapes(ran[0])
    ran.clear()
    low, high = at_once.read([(prompts(), [0]), (prompts(), [1])])
    assert [shapes(batches) for batches in ran] == [alone]
    assert set(low) == {0} and set(high) == {1} and same(low[0], first[0]) and same(high[1], second[1])


def test_only_what_shared_inexactly_is_read_again(
    tmp_path: Path, ran: list[list[Batch]], monkeypatch: pytest.MonkeyPatch
) -> None:
    apart, at_once = both(tmp_path / "m")
    asked: list[Request] = [(contrast_prompts(), [1]), ([Prompt(one.ids[::-1], one.read) for one in prompts()], [1])]
    [_shared, wanted] = apart.read(asked)
    ran.clear()
    monkeypatch.setattr(residuals, "relative_error", lambda _found, _wanted: float("nan"))
    whole, plain = at_once.read(asked)
    assert len(ran) == 2
    again = {place.prompt for batch in ran[1] for place in batch.places}
    assert again == set(range(len(contrast_prompts())))
    assert same(plain[1], wanted[1])
    [alone] = apart.read(asked[:1])
    assert same(whole[1], alone[1])
