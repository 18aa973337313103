"""What the model card says of measurements: how well a fitted route fits, and the verification."""

from __future__ import annotations

from typing import Any

from support.cards import render_card
from support.publishing import manifest

LAYER = {"tokens": 9000, "held_out_tokens": 1000, "error_mean": 0.0712, "error_p95": 0.1498, "mean": 0.98}
LAYER |= {"cosine": 0.9961, "ridge": 0.01}
FIT = {
    **{**LAYER, "layers": {"1": LAYER}, "sampled_tokens": 0},
    **{"kl_hook_fit": 0.0021, "kl_hook_base": 0.1, "ratio": 0.021, "kl_tokens": 1000},
}
CHECKS = [
    {"name": "without the vector", "passed": True, "value": 2e-6, "limit": 1e-4, "note": ""},
    {"name": "constant", "passed": True, "value": 0.0712, "limit": 0.3, "note": ""},
    {"name": "KL of the fit", "passed": True, "value": 0.03, "limit": 0.15, "note": ""},
    {"name": "own dtype (bfloat16)", "passed": True, "value": 0.01, "limit": 0.02, "note": ""},
    {"name": "tokenizer", "passed": True, "value": None, "limit": None, "note": ""},
    {"name": "long prompt", "passed": None, "value": None, "limit": None, "note": "no sliding window"},
]


def fitted(fit: dict[str, Any] | None, **changes: Any) -> str:
    route = {**manifest()["route"], "name": "rank_one", "exact": False, "fit": fit}
    return render_card(manifest(route=route, **changes), None)


def verified(**changes: Any) -> list[dict[str, Any]]:
    entry = {**manifest()["verification"][0], "max_abs_logprob_diff": 0.4, "checks": CHECKS}
    return [{**entry, **changes}]


def test_a_fitted_copy_is_not_shown_beside_a_limit_that_it_is_not_held_to() -> None:
    card = fitted(FIT, verification=verified(kl_share=0.03))
    shown = card.split("## Verification")[1].split("\n## ")[0].strip()
    head, _, row = shown.splitlines()[:3]
    assert "limit" not in head and "| passed | float32 | 0.4 | 1.0e-06 | 2.1 |" in row
    for words in (
        "*max Δ log-prob* has no limit here",
        "| this copy with the vector taken off, and the base: largest Δ log-prob | 2.0e-06 | 1.0e-04 |",
        "| held-out calibration text, gain of the residual stream: mean relative error | 0.0712 | 0.3 |",
        "| KL divergence from the base under the hook, as a share of that of the unsteered base | 0.03 | 0.15 |",
        "| in the checkpoint's own dtype (bfloat16): mean Δ log-prob from fp32 | 0.01 | 0.02 |",
        "Not checked:\n\n- transformers: long prompt (no sliding window)",
    ):
        assert words in shown
    assert "failed" not in shown and "tokenizer" not in shown


def test_an_exact_copy_keeps_its_limit_and_a_failed_check_is_marked() -> None:
    failed = [{**CHECKS[0], "passed": False, "value": 0.5}]
    card = render_card(manifest(verification=verified(checks=failed)), None)
    assert "| max Δ log-prob | limit |" in card and "has no limit" not in card
    assert "largest Δ log-prob | 0.5 | 1.0e-04 | **failed** |" in card


def test_a_centred_residual_stream_is_said_beside_the_numbers() -> None:
    card = render_card(manifest(route={**manifest()["route"], "residual": "centred"}), None)
    assert "without its mean over the hidden dimension" in card.split("## Verification")[1]


def test_a_fit_of_several_layers_and_what_was_not_measured() -> None:
    other = {**LAYER, "error_mean": 0.0004, "unfitted_experts": 2}
    card = fitted({**FIT, "layers": {"0": other, "1": LAYER}, "ratio": None})
    for words in (
        "by at most 15 % for 95 % of the tokens.\n",
        "| 0 | under 0.1 % | 15 % |",
        "| 1 | 7.1 % |",
        "The fit saw 9,000 tokens of calibration text; the numbers",
        "2 routed experts got no calibration token",
    ):
        assert words in card
    assert "KL divergence" not in card and "wrote itself" not in card


def test_a_fit_without_numbers() -> None:
    card = fitted(None)
    assert "This route only approximates the vector.\n" in card and "How well it fits" not in card
