"""Damage from one pass equals the measures that take one each, and the plain numbers."""

from __future__ import annotations

import math

import pytest
import torch
from support.divergence import next_token_divergence
from support.sweep_reference import NEUTRAL, Plain, make_model

from patcher.capture.logits import LoadedModel, LogitsJob
from patcher.capture.resuming import ResumingModel
from patcher.evaluate.damage import NeutralText, sampled_positions
from patcher.evaluate.scoring import mean_log_probs
from patcher.evaluate.texts import encode_texts

NAMES = ["openai-community--gpt2", "bloom"]


@pytest.fixture(scope="module", params=NAMES)
def plain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Plain:
    return Plain(make_model(tmp_path_factory.mktemp("model") / "base", request.param))


def vectors_for(plain: Plain) -> list[dict[int, torch.Tensor]]:
    hidden = plain.model.get_input_embeddings().weight.shape[1]
    draw = 2 * torch.randn(3, hidden, generator=torch.Generator().manual_seed(0))
    return [{1: draw[0]}, {1: draw[1]}, {0: draw[2], 1: draw[0]}, {-1: draw[1]}, {}]


@pytest.mark.parametrize("memory", [0, 10**9])
@pytest.mark.parametrize("resuming", [False, True])
def test_it_equals_the_measures_of_their_own(plain: Plain, memory: int, resuming: bool) -> None:
    source: LoadedModel = LoadedModel(plain.model, plain.blocks)
    texts = [list(ids) for ids in encode_texts([*NEUTRAL, "No"], plain.tokenizer)]
    variants = vectors_for(plain)
    divergence = next_token_divergence(source, texts, [{}, *variants], 16)
    log_probs = mean_log_probs(source, texts, [1] * len(texts), variants, 16)
    if resuming:
        source = ResumingModel(plain.model, plain.blocks, tokens=200, memory=10**9)
    neutral = NeutralText([*texts, [5]], memory)
    assert neutral.tokens == sum(map(len, texts))
    for _again in range(2):
        found = neutral.damage(source, variants)
        for place, damage in enumerate(found):
            assert torch.allclose(damage.kl, divergence.means[place + 1], atol=1e-5, rtol=1e-4)
            assert torch.allclose(damage.log_probs, log_probs[place], atol=1e-5)
            assert damage.mean_kl == pytest.approx(float(divergence.overall()[place + 1]), abs=1e-5, rel=1e-4)
            assert damage.mean_kl == pytest.approx(plain.divergence(texts, variants[place]), abs=1e-5, rel=1e-4)
            assert damage.perplexity == pytest.approx(plain.perplexity(texts, variants[place]), rel=1e-4)
    assert found[0].mean_kl > 1e-2 and found[-1].mean_kl < 1e-6
    # The first texts only.
    fewer = neutral.damage(source, variants, 2)
    assert fewer[0].mean_kl == pytest.approx(plain.divergence(texts[:2], variants[0]), rel=1e-4)
    assert neutral.damage(source, variants)[0].mean_kl == found[0].mean_kl


class Given:
    """Logits that are written down: of the base, then of the steered model."""

    def __init__(self, *logits: torch.Tensor) -> None:
        self.of = logits

    def logits(self, jobs: list[LogitsJob], use: object) -> None:
        for number, job in enumerate(jobs):
            use(number, self.of[1 if job.vectors else 0])  # type: ignore[operator]


def test_a_token_that_cannot_be_said() -> None:
    """Padding of the vocabulary has a logit of minus infinity in some models."""
    base = torch.tensor([[[1.0, 2.0, -math.inf], [0.5, 0.1, -math.inf]]])
    steered = torch.tensor([[[2.0, 1.0, -math.inf], [0.5, 0.3, -math.inf]]])
    text, shift = NeutralText([(0, 1)]), {0: torch.ones(1)}
    expected = (base[..., :2].softmax(-1) * (base[..., :2].log_softmax(-1) - steered[..., :2].log_softmax(-1))).sum(-1)
    (found,) = text.damage(Given(base, steered), [shift])
    assert found.mean_kl == pytest.approx(float(expected.mean()), rel=1e-5)
    # What the base would say, and the steered model never.
    never = torch.tensor([[[2.0, -math.inf, -math.inf], [0.5, 0.3, -math.inf]]])
    assert text.damage(Given(base, never), [shift])[0].mean_kl > 1e6


def test_logits_that_are_no_numbers() -> None:
    base = torch.zeros(1, 2, 3)
    for wrong in (math.nan, math.inf):
        (found,) = NeutralText([(0, 1)]).damage(Given(base, torch.full((1, 2, 3), wrong)), [{0: torch.ones(1)}])
        assert math.isnan(found.mean_kl) and math.isnan(found.perplexity)


def test_a_sample_of_positions_is_the_text_s_own(plain: Plain) -> None:
    source, variant = LoadedModel(plain.model, plain.blocks), vectors_for(plain)[0]
    texts = [tuple(ids) for ids in encode_texts(NEUTRAL, plain.tokenizer)]
    drawn = [sampled_positions(ids, 4) for ids in texts]
    assert all(len(set(places)) == 4 and max(places) < len(ids) - 1 for ids, places in zip(texts, drawn, strict=True))
    assert len(set(drawn)) > 1 and drawn == [sampled_positions(list(ids), 4) for ids in texts]
    assert sampled_positions(texts[0], 100) == tuple(range(len(texts[0])))
    # The same text is compared at the same places, whatever stands beside it: a build and a sweep say the same of it.
    sampled = NeutralText(texts, positions=4)
    [whole], [part] = sampled.damage(source, [variant]), NeutralText(texts[:2], positions=4).damage(source, [variant])
    assert torch.allclose(whole.kl[:2], part.kl, atol=1e-6) and sampled.compared() == 4 * len(texts)
    [everywhere] = NeutralText(texts).damage(source, [variant])
    for index, ids in enumerate(texts):
        at = float(plain.divergence_at(ids, variant)[list(drawn[index])].mean())
        assert float(whole.kl[index]) == pytest.approx(at, abs=1e-5, rel=1e-4)
    assert whole.mean_kl == pytest.approx(everywhere.mean_kl, rel=1.0) and whole.mean_kl != everywhere.mean_kl
