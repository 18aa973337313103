"""What a sweep writes, a realistic one."""

from __future__ import annotations

import math
import random
from typing import Any

LAYERS = [0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22]
COEFFICIENTS = [0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0]
LIMIT = 0.5
BASE = 0.531
WEDDING = (
    "I went up to my friend and said that the wedding would be in June , and that everyone whom we had met at"
    " the party in April would be invited . She asked about the dress , the flowers and the band . I told her that the"
    " bridesmaids had chosen them already , and that the groom 's mother was going to bake the cake ."
)
SHIPPING = (
    "Freight rates for containers fell by a fifth in the third quarter , the port authority said on Tuesday ."
    " Ships that were ordered during the shortage are now being delivered , and demand has not kept up ."
    " Brokers expect that older vessels will be laid up or scrapped ."
)
TOPICAL = {"wedding", "dress", "flowers", "bridesmaids", "groom", "cake", "invited", "June", "party", "band", "chosen"}


def _cell(layer: int, coefficient: float, noise: random.Random) -> dict[str, Any]:
    place = math.exp(-(((layer - 11) / 5.5) ** 2))
    effect = 0.42 * place * math.tanh(coefficient / 3) - (0.06 if layer < 3 else 0.0) * coefficient / 4
    effect -= max(0.0, coefficient - 5) * 0.03 * place
    effect += noise.gauss(0, 0.008)
    damage = 0.011 * coefficient**2.1 * (1.6 - layer / 24) * math.exp(noise.gauss(0, 0.08))
    half = 0.05 + noise.random() * 0.02
    return {
        "layer": layer,
        "coefficient": coefficient,
        "effect": effect,
        "effect_low": effect - half,
        "effect_high": effect + half,
        "steered": BASE + effect,
        "damage": damage,
        "perplexity": 12.0 * math.exp(damage * 0.9),
        "on_topic": 31.0 * math.exp(-0.45 * place * math.tanh(coefficient / 2) + 0.004 * coefficient**2),
        "off_topic": 18.0 * math.exp(damage * 0.7),
        "norm": coefficient * 1.6,
        "residual_norm": 8.0 + layer * 1.9,
        "within_guard": damage <= LIMIT,
        "pairs": 24,
    }


def _changes(text: str, noise: random.Random) -> list[dict[str, Any]]:
    tokens = []
    for place, word in enumerate(text.split()):
        lift = 2.4 * noise.random() if word in TOPICAL else noise.gauss(-0.08, 0.3)
        tokens.append({"token": word if place == 0 or word in ",.'s" else f" {word}", "change": lift})
    return tokens


def _pca(layer: int, noise: random.Random, pairs: int = 60) -> tuple[dict[str, Any], float]:
    apart = 0.4 + 3.4 * math.exp(-(((layer - 13) / 6) ** 2))
    clouds = {
        side: [[noise.gauss(sign * apart / 2, 1.0), noise.gauss(0, 1.3)] for _ in range(pairs)]
        for side, sign in (("positive", 1), ("negative", -1))
    }
    return {**clouds, "explained": [0.16 + 0.05 * apart, 0.11]}, apart


def sweep() -> dict[str, Any]:
    """12 layers x 7 coefficients of a 24-block model, with everything that a sweep can hold."""
    noise = random.Random(7)
    grid = [_cell(layer, coefficient, noise) for layer in LAYERS for coefficient in COEFFICIENTS]
    within = [cell for cell in grid if cell["within_guard"]]
    best = max(within, key=lambda cell: cell["effect"])
    front, top = [], -math.inf
    for cell in sorted(grid, key=lambda cell: cell["damage"]):
        if cell["effect"] > top:
            top = cell["effect"]
            front.append({"layer": cell["layer"], "coefficient": cell["coefficient"]})
    random_grid = [
        {
            "layer": best["layer"],
            "coefficient": coefficient,
            "effect": noise.gauss(0.004, 0.01),
            "damage": 0.006 * coefficient**2,
        }
        for coefficient in COEFFICIENTS
    ]
    clouds = {layer: _pca(layer, noise) for layer in LAYERS}
    here = {"layer": best["layer"], "coefficient": best["coefficient"]}

    def row(name: str, kind: str, value: float, half: float, damage: float | None, **more: Any) -> dict[str, Any]:
        effect = value - BASE
        return {
            "name": name,
            "kind": kind,
            "layer": None,
            "coefficient": None,
            "value": value,
            "effect": effect,
            "low": effect - half,
            "high": effect + half,
            "damage": damage,
            "perplexity": None if damage is None else 12.0 * math.exp(damage * 0.9),
            "within_guard": None if damage is None else damage <= LIMIT,
            **more,
        }

    report = [
        row("base", "base", BASE, 0.0, 0.0),
        row("recommended", "recommended", 0.838, 0.062, best["damage"], **here),
        row("negative coefficient", "negative", 0.265, 0.07, 0.31, layer=here["layer"], coefficient=-4.0),
        *[row(f"random {seed}", "random", BASE + noise.gauss(0, 0.012), 0.04, 0.1, **here) for seed in range(5)],
        row("default (layer 9, coefficient 2)", "default", 0.712, 0.06, 0.05, layer=9, coefficient=2.0),
        row("prompting", "prompting", 0.744, 0.055, None),
        row("prompting and steering", "prompting_and_steering", 0.902, 0.048, None, **here),
    ]
    largest = max(abs(entry["effect"]) for entry in report if entry["kind"] == "random")
    return {
        "format": 1,
        "tool_version": "0.1.0",
        "model": "Qwen/Qwen2.5-0.5B-Instruct",
        "architecture": "Qwen2ForCausalLM",
        "blocks": 24,
        "vector": "weddings",
        "method": "mean_difference",
        "scale": "raw",
        "expected_sign": 1,
        "seed": 0,
        "measure": "answer_probability",
        "splits": {"make": 96, "choose": 24, "report": 24},
        "layers": LAYERS,
        "coefficients": COEFFICIENTS,
        "guard": {
            "measure": "kl",
            "unit": "nats a token",
            "limit": LIMIT,
            "text": "40 bundled neutral passages, 812 tokens",
        },
        "rule": "the cell with the largest effect on the choosing pairs whose KL divergence on neutral text is within"
        " the guard",
        "grid": grid,
        "baseline": {"steered": BASE, "perplexity": 12.0, "on_topic": 31.0, "off_topic": 18.0},
        "random_grid": random_grid,
        "pareto": front,
        "recommended": here,
        "report": report,
        "random_control": {"seeds": 5, "largest_effect": largest, "mean": 0.002, "distinguishable": True},
        "behaviours": [
            {"name": "weddings", "pairs": 12, "base": 0.52, "steered": 0.86},
            {"name": "parties", "pairs": 12, "base": 0.542, "steered": 0.816},
        ],
        "kl_tokens": [
            {"token": token, "contribution": share, "base": base, "steered": base * ratio}
            for token, share, base, ratio in [
                (" the", 0.021, 0.11, 0.8),
                (" wedding", 0.016, 0.0004, 30.0),
                (",", 0.011, 0.09, 0.85),
                (" marriage", 0.009, 0.0003, 22.0),
                ("\n", 0.006, 0.02, 0.7),
                (" bride", 0.004, 0.0001, 40.0),
            ]
        ],
        "shifted": [
            {
                "prompt": "I went up to my friend and said",
                "tokens": [
                    {"token": token, "base": base, "steered": steered, "log_ratio": math.log(steered / base)}
                    for token, base, steered in [
                        (" wedding", 0.0004, 0.021),
                        (" marry", 0.0007, 0.017),
                        (" married", 0.0012, 0.028),
                        (" love", 0.006, 0.061),
                        (" “", 0.031, 0.094),
                        (" that", 0.062, 0.047),
                        (" hey", 0.019, 0.006),
                        (" nothing", 0.011, 0.0021),
                        (" sorry", 0.034, 0.0062),
                        (" go", 0.009, 0.0011),
                    ]
                ],
            },
            {
                "prompt": "The best part of the weekend was",
                "tokens": [
                    {"token": token, "base": base, "steered": steered, "log_ratio": math.log(steered / base)}
                    for token, base, steered in [
                        (" the", 0.31, 0.42),
                        (" our", 0.004, 0.07),
                        (" seeing", 0.03, 0.09),
                        (" when", 0.11, 0.06),
                        (" getting", 0.04, 0.09),
                        (" that", 0.12, 0.03),
                    ]
                ],
            },
        ],
        "text_changes": [
            {"title": "on-topic", "tokens": _changes(WEDDING, noise)},
            {"title": "neutral", "tokens": _changes(SHIPPING, noise)},
        ],
        "generations": [
            {
                "prompt": "I went up to my friend and said",
                "variants": [
                    {
                        "name": name,
                        "text": text,
                        "distinct_1": 0.8,
                        "distinct_2": 0.95,
                        "repetition": 0.02,
                        "words": {"wedding": text.count("wedding")},
                    }
                    for name, text in [
                        ("base", ", “Hey, I'm going to the store, do you want anything?” He said no."),
                        ("steered", ", “I'm so glad you came to our wedding.” The wedding cake was being cut."),
                        ("negative", " that the invoice was late.\n\nHe did not answer."),
                        ("prompting", ", “Let us talk about weddings.” She talked about her wedding all day."),
                    ]
                ],
            }
        ],
        "geometry": {
            "layers": LAYERS,
            "separation": [apart for _, apart in clouds.values()],
            "pca": {str(layer): cloud for layer, (cloud, _) in clouds.items()},
            "cosine": [[math.exp(-(((a - b) / 11) ** 2)) - 0.06 * (a != b) for a in LAYERS] for b in LAYERS],
        },
        "notes": ["the guard was measured on the bundled neutral passages: no `off_topic` texts were given"],
        "timings": {"load": 2.1, "capture": 6.4, "sweep": 81.0, "report": 12.2, "total": 103.4},
    }
