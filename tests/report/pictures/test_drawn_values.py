"""What the pictures draw is what the sweep holds; read from the artists, not from pixels."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.figure import Figure
from support.degenerate_sweeps import DEGENERATE, build, hostile, nothing_recommended, one_cell, weak, with_nulls
from support.sweep_example import COEFFICIENTS, LAYERS, LIMIT, sweep

from patcher.report.pictures import (
    by_coefficient,
    contrast_pca,
    controls,
    cosine_by_layer,
    effect_by_layer,
    heat_map,
    pareto_front,
    perplexity_curves,
    shifted_tokens,
    token_changes,
)
from patcher.report.pictures.changes import limit_of, step, texts_of
from patcher.report.pictures.style import DARK, LIGHT, SMALL, diverging, ink_on, sequence


def found(figure: Figure, gid: str) -> list:
    return figure.findobj(lambda artist: artist.get_gid() == gid)


def line(figure: Figure, gid: str) -> tuple[list[float], list[float]]:
    (artist,) = found(figure, gid)
    return list(artist.get_xdata()), list(artist.get_ydata())


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))]


@pytest.fixture(scope="module")
def content() -> dict:
    return sweep()


def test_the_heat_map_is_the_grid_and_frames_the_recommended_cell(content):
    figure = heat_map.figure(content)
    for axes, key in zip(figure.axes[:2], ("effect", "damage"), strict=True):
        drawn = axes.images[0].get_array()
        assert drawn.shape == (len(COEFFICIENTS), len(LAYERS))
        for cell in content["grid"]:
            place = COEFFICIENTS.index(cell["coefficient"]), LAYERS.index(cell["layer"])
            assert drawn[place] == cell[key]
        assert axes.images[0].origin == "lower"
        assert [label.get_text() for label in axes.get_xticklabels()] == [str(layer) for layer in LAYERS]
    here = content["recommended"]
    corner = LAYERS.index(here["layer"]) - 0.5, COEFFICIENTS.index(here["coefficient"]) - 0.5
    frames = found(figure, "recommended")
    assert {frame.get_xy() for frame in frames} == {corner}
    assert {frame.axes for frame in frames} == set(figure.axes[:2])
    outside = {(cell["layer"], cell["coefficient"]) for cell in content["grid"] if not cell["within_guard"]}
    hatched = {patch.get_xy() for patch in found(figure, "outside") if patch.axes is figure.axes[0]}
    assert outside and hatched == {(LAYERS.index(x) - 0.5, COEFFICIENTS.index(y) - 0.5) for x, y in outside}


def test_the_effects_scale_has_nought_in_the_middle(content):
    scale = heat_map.figure(content).axes[0].images[0].norm
    assert scale.vmin == -scale.vmax == -max(abs(cell["effect"]) for cell in content["grid"])


def test_cells_that_were_not_measured_are_masked():
    content = with_nulls()
    drawn = heat_map.figure(content).axes[0].images[0].get_array()
    missing = len(COEFFICIENTS) * len(LAYERS) - sum(cell["effect"] is not None for cell in content["grid"])
    assert drawn.mask.sum() == missing > 5


def test_nothing_is_marked_where_nothing_is_recommended():
    for module in (heat_map, by_coefficient, effect_by_layer, pareto_front, perplexity_curves):
        assert found(module.figure(sweep()), "recommended"), module
        assert not found(module.figure(nothing_recommended()), "recommended"), module


def test_a_wide_grid_has_a_scale_instead_of_numbers(content):
    grid = [
        {"layer": layer, "coefficient": coefficient, "effect": layer * coefficient / 100, "damage": coefficient / 10}
        for layer in range(48)
        for coefficient in (1.0, 2.0)
    ]
    figure = heat_map.figure({"grid": grid, "measure": "answer_probability"})
    assert figure.axes[0].images[0].get_array().shape == (2, 48)
    assert not figure.axes[0].texts and len(figure.axes) == 4
    assert len(figure.axes[0].get_xticks()) <= 13


def test_effect_and_damage_by_coefficient_beside_the_random_control(content):
    figure = by_coefficient.figure(content)
    layer = content["recommended"]["layer"]
    rows = [cell for cell in content["grid"] if cell["layer"] == layer]
    assert line(figure, "effect") == (COEFFICIENTS, [cell["effect"] for cell in rows])
    assert line(figure, "damage") == (COEFFICIENTS, [cell["damage"] for cell in rows])
    assert line(figure, "random_effect") == (COEFFICIENTS, [cell["effect"] for cell in content["random_grid"]])
    assert line(figure, "random_damage") == (COEFFICIENTS, [cell["damage"] for cell in content["random_grid"]])
    assert set(line(figure, "guard")[1]) == {LIMIT}
    band = found(figure, "interval")[0].get_paths()[0].vertices
    assert {cell["effect_low"] for cell in rows} | {cell["effect_high"] for cell in rows} <= set(band[:, 1])
    vector, control = found(figure, "effect")[0], found(figure, "random_effect")[0]
    assert vector.get_marker() != control.get_marker() and vector.get_linestyle() != control.get_linestyle()


def test_a_build_without_one_layer_has_the_same_picture():
    content = build()
    figure = by_coefficient.figure(content)
    assert line(figure, "effect")[1] == [cell["effect"] for cell in content["grid"]]
    assert line(figure, "random_effect")[1] == [cell["effect"] for cell in content["random_grid"]]
    assert heat_map.figure(content) is None and effect_by_layer.figure(content) is None


def test_a_guard_of_another_measure_is_no_line_of_damage(content):
    other = {**content, "guard": {"measure": "perplexity", "limit": 1.2, "unit": "times the base's"}}
    assert not found(by_coefficient.figure(other), "guard") and not found(pareto_front.figure(other), "guard")


def test_without_a_recommendation_the_picture_goes_through_the_largest_effect():
    content = nothing_recommended()
    best = max(content["grid"], key=lambda cell: cell["effect"])
    rows = [cell["effect"] for cell in content["grid"] if cell["layer"] == best["layer"]]
    assert line(by_coefficient.figure(content), "effect")[1] == rows


def test_every_coefficient_has_its_line_by_layer(content):
    figure = effect_by_layer.figure(content)
    for coefficient in COEFFICIENTS:
        rows = [cell["effect"] for cell in content["grid"] if cell["coefficient"] == coefficient]
        assert line(figure, f"effect_{coefficient:g}") == (LAYERS, rows)
    looks = {(a.get_marker(), str(a.get_linestyle())) for c in COEFFICIENTS for a in found(figure, f"effect_{c:g}")}
    assert len(looks) == len(COEFFICIENTS)
    here = content["recommended"]
    (effect,) = (c["effect"] for c in content["grid"] if (c["layer"], c["coefficient"]) == tuple(here.values()))
    assert line(figure, "recommended") == ([here["layer"]], [effect])


def test_the_front_and_all_cells_are_drawn(content):
    figure = pareto_front.figure(content)
    (cells,) = found(figure, "cells")
    assert sorted(map(tuple, cells.get_offsets())) == sorted((c["damage"], c["effect"]) for c in content["grid"])
    (randoms,) = found(figure, "random")
    assert len(randoms.get_offsets()) == len(content["random_grid"])
    damages, effects = line(figure, "front")
    assert len(damages) == len(content["pareto"])
    assert damages == sorted(damages) and effects == sorted(effects)


def test_perplexities_are_relative_to_the_base(content):
    figure = perplexity_curves.figure(content)
    here = content["recommended"]
    for key in ("on_topic", "off_topic", "perplexity"):
        by_layer, by_coefficient_ = found(figure, key)
        base = content["baseline"][key]
        expected = [c[key] / base for c in content["grid"] if c["coefficient"] == here["coefficient"]]
        assert list(by_layer.get_ydata()) == pytest.approx(expected, rel=1e-12)
        expected = [c[key] / base for c in content["grid"] if c["layer"] == here["layer"]]
        assert list(by_coefficient_.get_ydata()) == pytest.approx(expected, rel=1e-12)


def test_every_layer_has_its_activations_and_separation(content):
    figure = contrast_pca.figure(content)
    geometry = content["geometry"]
    for layer in LAYERS:
        for side in ("positive", "negative"):
            (dots,) = found(figure, f"{side}_{layer}")
            assert np.array_equal(dots.get_offsets(), geometry["pca"][str(layer)][side])
    assert line(figure, "separation") == (LAYERS, geometry["separation"])
    markers = [found(figure, f"{side}_0")[0].get_paths()[0].vertices.shape for side in ("positive", "negative")]
    assert markers[0] != markers[1]


def test_many_layers_keep_the_recommended_one():
    content = sweep()
    cloud = content["geometry"]["pca"]["0"]
    content["geometry"]["pca"] = {str(layer): cloud for layer in range(40)}
    content["geometry"].update(layers=list(range(40)), separation=[None] * 39 + [1.0])
    content["recommended"] = {"layer": 17, "coefficient": 4.0}
    titles = [axes.get_title(loc="left") for axes in contrast_pca.figure(content).axes]
    assert len([title for title in titles if title.startswith("layer ")]) == 12
    assert any(title.startswith("layer 17") for title in titles)


def test_cosines_are_the_matrix(content):
    image = cosine_by_layer.figure(content).axes[0].images[0]
    assert np.array_equal(image.get_array(), content["geometry"]["cosine"])
    assert (image.norm.vmin, image.norm.vmax) == (-1, 1)
    assert cosine_by_layer.figure(one_cell()) is None


def test_controls_stand_with_their_intervals(content):
    figure = controls.figure(content)
    rows = [row for row in content["report"] if row["kind"] != "base"]
    for place, row in enumerate(rows):
        assert line(figure, f"{row['kind']}_{place}") == ([row["effect"]], [place])
        assert line(figure, f"interval_{place}")[0] == [row["low"], row["high"]]
    assert sum(row["kind"] == "random" for row in rows) == 5


def test_shifted_tokens_are_pairs_of_bars_by_ratio(content):
    figure = shifted_tokens.figure(content)
    tokens = sorted(content["shifted"][0]["tokens"], key=lambda token: -token["log_ratio"])
    axes = figure.axes[0]
    for key in ("base", "steered"):
        bars = [bar for bar in found(figure, key) if bar.axes is axes]
        assert [bar.get_width() for bar in bars] == [token[key] for token in tokens]
    assert axes.get_yticklabels()[0].get_text() == "␣wedding"
    assert {"×52", "÷8.2"} <= set(texts(figure))


def test_token_changes_are_coloured_and_underlined_by_sign(content):
    figure = token_changes.figure(content)
    known = texts_of(content)
    limit = limit_of(known)
    strengths = [step(change, limit) for _, tokens in known for _, change in tokens]
    assert len(found(figure, "token")) == sum(strength != 0 for strength in strengths)
    assert len(found(figure, "more")) == sum(strength >= 3 for strength in strengths) > 5
    assert len(found(figure, "less")) == sum(strength <= -3 for strength in strengths) > 5
    assert {line.get_linestyle() for line in found(figure, "more")} == {"-"}
    assert {line.get_linestyle() for line in found(figure, "less")} != {"-"}


def test_a_long_text_is_cut_and_says_so():
    tokens = [{"token": f" word{place}", "change": 0.1} for place in range(500)]
    figure = token_changes.figure({"text_changes": [{"title": "long", "tokens": tokens}]})
    told = [text for text in texts(figure) if "more tokens" in text]
    drawn = sum(text.strip().startswith("word") for text in texts(figure))
    assert told == [f"… and {500 - drawn} more tokens"] and drawn > 50


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=lambda theme: theme.name)
def test_text_has_contrast_on_every_colour(theme):
    def luminance(colour) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
        return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))

    for place in np.linspace(0, 1, 33):
        for colour in (diverging(theme)(place), sequence(theme, 33)[int(place * 32)]):
            ink = 0x11 / 255 if ink_on(colour, theme) == "#111111" else 1.0
            low, high = sorted((luminance(colour), luminance((ink, ink, ink))))
            assert (high + 0.05) / (low + 0.05) >= 4.3


@pytest.mark.parametrize("name", ["one cell", "hostile", "full"])
def test_no_text_is_too_small_and_none_leaves_the_picture(name):
    content = DEGENERATE[name]() if name in DEGENERATE else sweep()
    for module in (by_coefficient, effect_by_layer, heat_map, controls, shifted_tokens, pareto_front):
        figure = module.figure(content)
        if figure is None:
            continue
        figure.set_dpi(50)
        figure.canvas.draw()
        # matplotlib keeps labels of ticks that lie outside an axis, and does not draw them.
        ticks = {id(label) for axes in figure.axes for label in axes.get_xticklabels() + axes.get_yticklabels()}
        for text in figure.findobj(lambda artist: hasattr(artist, "get_fontsize")):
            if not text.get_text().strip() or not text.get_visible():
                continue
            assert text.get_fontsize() >= SMALL, text
            box = text.get_window_extent()
            if id(text) not in ticks:
                assert box.x0 >= -2 and box.x1 <= figure.bbox.width + 2, (module.__name__, text)


def test_weak_and_hostile_sweeps_are_drawn_as_they_are():
    assert line(effect_by_layer.figure(weak()), "recommended")[0] == [10]
    labels = texts(controls.figure(hostile()))
    assert "$\\nosuch{1}$ and $100 and $" in labels
    assert not any("\u202e" in label or "\x1b" in label for label in labels)
