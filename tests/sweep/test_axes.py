"""Which layers and coefficients are tried."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from patcher.errors import InputError
from patcher.recipe.schema import Recipe
from patcher.recipe.vector import VectorSpec
from patcher.sweep.axes import (
    FIXED_DEFAULTS,
    MOST_LAYERS,
    default_cells,
    grid_coefficients,
    grid_layers,
    may_be_chosen,
    shares_of,
    swept_vector,
)
from patcher.sweep.pipeline import _in_file
from patcher.vectors.files.asked import SteeredModel
from patcher.vectors.files.reading import VectorFile
from patcher.vectors.layers import resolve_layers

PAIRS = [{"positive": "a", "negative": "b"}]


def recipe(*vectors: dict[str, Any], **sweep: Any) -> Recipe:
    specs = [{"name": f"v{place}", "pairs": PAIRS, **vector} for place, vector in enumerate(vectors)]
    return Recipe.model_validate({"model": "m", "vectors": specs, "sweep": sweep})


def layers(found: Recipe, blocks: int = 32) -> list[int]:
    return grid_layers(found, found.vectors[swept_vector(found)], blocks, "here")


def test_which_vector_is_swept() -> None:
    assert swept_vector(recipe({"layer": 1}, {"layer": 2})) == 0
    assert swept_vector(recipe({"layer": 1}, {"layer": "auto"})) == 1
    assert swept_vector(recipe({"layer": 1}, {"layer": 2}, vector="v1")) == 1


@given(st.integers(1, 200))
def test_automatic_layers_are_spread_and_hold_the_usual_one(blocks: int) -> None:
    found = layers(recipe({"layer": "auto"}), blocks)
    assert found == sorted(set(found)) and found[0] >= 0 and found[-1] < blocks
    assert len(found) == min(MOST_LAYERS, blocks)
    usual = resolve_layers(VectorSpec(pairs=PAIRS, layer="40%"), blocks, "here")[0]
    assert usual in found
    gaps = [second - first for first, second in itertools.pairwise(found)]
    assert not gaps or max(gaps) <= 2 * math.ceil(blocks / MOST_LAYERS)


def test_layers_that_are_named() -> None:
    assert layers(recipe({"layer": 3}, layers=[9, "50%", 2])) == [2, 9, 16]
    assert layers(recipe({"layer": [5, 3], "coefficient": "auto"})) == [3, 5]
    assert layers(recipe({"before_layer": [4, 0], "coefficient": "auto"})) == [-1, 3]
    # Neither is open: then both are.
    assert len(layers(recipe({"layer": 3, "coefficient": 2}))) == MOST_LAYERS
    for wrong in ([40], [3, 3], ["10%", 3]):
        with pytest.raises(InputError):
            layers(recipe({"layer": 3}, layers=wrong))


def test_coefficients_that_are_named() -> None:
    found = recipe({"layer": "auto"}, coefficients=[2, -1, 0.5])
    assert grid_coefficients(found, found.vectors[0], [0.1]) == [-1.0, 0.5, 2.0]
    found = recipe({"layer": "auto", "coefficient": -3})
    assert grid_coefficients(found, found.vectors[0], [0.1]) == [-3.0]


@given(st.lists(st.floats(1e-4, 1e3), min_size=1, max_size=12))
def test_automatic_coefficients_go_up_to_the_residual_norm(shares: list[float]) -> None:
    found = recipe({"layer": "auto", "coefficient": "auto"})
    chosen = grid_coefficients(found, found.vectors[0], shares)
    assert chosen == sorted(set(chosen)) and 0 not in chosen and 5 <= len(chosen) <= 7
    typical = (
        sorted(shares)[len(shares) // 2] if len(shares) % 2 else sum(sorted(shares)[len(shares) // 2 - 1 :][:2]) / 2
    )
    assert 0.7 <= max(chosen) * typical <= 1.4 and min(chosen) < 0
    # As people write them: two digits, the second 0 or 5.
    for value in chosen:
        digit = 10.0 ** math.floor(math.log10(abs(value)))
        assert (2 * abs(value) / digit) == pytest.approx(round(2 * abs(value) / digit))


def test_a_known_coefficient_is_among_them() -> None:
    found = recipe({"layer": "auto", "coefficient": "auto"})
    chosen = grid_coefficients(found, found.vectors[0], [0.15])
    assert {1.0, 2.0} <= set(chosen)


@given(st.integers(1, 200))
def test_fixed_defaults_are_the_depths_of_a_recipe(blocks: int) -> None:
    cells = default_cells(blocks)
    for depth, coefficient in FIXED_DEFAULTS:
        layer = resolve_layers(VectorSpec(pairs=PAIRS, layer=depth), blocks, "here")[0]
        assert (layer, coefficient) in cells
    assert set(cells.values()) <= {f"{depth} depth, {value:+g}" for depth, value in FIXED_DEFAULTS}


def test_a_coefficient_of_the_other_sign_is_chosen_only_where_it_is_asked_for() -> None:
    def allowed(found: Recipe, value: float) -> bool:
        return may_be_chosen(found, found.vectors[0], value)

    open_, turned = recipe({"layer": "auto", "coefficient": "auto"}), recipe({"layer": 1, "coefficient": -2})
    assert allowed(open_, 2.0) and not allowed(open_, -2.0)
    assert allowed(turned, -3.0) and not allowed(turned, 3.0)
    assert allowed(recipe({"layer": "auto"}, coefficients=[-1, 1]), -1.0)
    # Of the recipe's own sign there are most, and the defaults are of it.
    grid = grid_coefficients(turned, turned.vectors[0], [0.1])
    assert grid == sorted(-value for value in grid_coefficients(open_, open_.vectors[0], [0.1]))
    assert {(layer, -value) for layer, value in default_cells(8)} == set(default_cells(8, -2.0))
    assert default_cells(8, -2.0)[3, -1.0] == "40% depth, -1"


def test_shares() -> None:
    vectors = {0: torch.tensor([3.0, 4.0]), 1: torch.tensor([1.0, 0.0])}
    assert shares_of(vectors, {0: 10.0, 1: None}) == [0.5]


def test_the_layers_that_a_vector_file_has(tmp_path: Path) -> None:
    """A grid of `auto` leaves the others out, with a note; one that was asked for is refused."""
    torch.save({layer: torch.ones(4) for layer in (1, 2, 5)}, tmp_path / "v.pt")
    file = VectorFile(tmp_path / "v.pt", SteeredModel(hidden=4, blocks=8))
    defaults = {(2, 1.0): "25% depth, +1", (3, 1.0): "40% depth, +1"}
    layers, left, notes = _in_file(file, [0, 1, 2, 5, 7], defaults, as_asked=False)
    assert layers == [1, 2, 5] and left == {(2, 1.0): "25% depth, +1"}
    assert notes == ["the file has no vector for layers 0, 7, which the grid leaves out"]
    assert _in_file(file, [1, 5], defaults, as_asked=True) == ([1, 5], left, [])
    for asked, as_asked in (([1, 3], True), ([0, 7], False)):
        with pytest.raises(InputError, match="no vector for layer"):
            _in_file(file, asked, defaults, as_asked=as_asked)
