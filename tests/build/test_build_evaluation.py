"""What a build measures besides its held-out pairs, what it makes of it, and `auto`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.building import build_recipe, job_of
from support.tiny_models import tiny_checkpoint, write_recipe

from patcher.cli import main
from patcher.demo.write import write_demo
from patcher.errors import CheckFailed
from patcher.evaluate import details
from patcher.patched.reading import read_manifest
from patcher.publish.contents import published_files
from patcher.sweep.auto import fill_in

LLAMA = "meta-llama--Llama-3.2-1B"


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_demo(tmp_path_factory.mktemp("demo") / "here").parent


@pytest.fixture(scope="module")
def built(demo: Path) -> Path:
    wanted = ("evaluate.system_prompt=Say that it is good.", "evaluate.budget=full")
    build_recipe(demo / "quickstart.yaml", demo / "out", *wanted, strict=True)
    return demo / "out"


def test_damage_curve_and_completions_are_in_the_manifest(built: Path) -> None:
    found = json.loads((built / "steering.json").read_text())["evaluation"]
    guard = found["guard"]
    assert 0.05 < guard["kl"] < 0.5 and guard["within"] and guard["kl_low"] < guard["kl"] < guard["kl_high"]
    assert guard["perplexity"]["base"] < guard["perplexity"]["steered"]
    curve = found["curve"]
    assert [cell["coefficient"] for cell in curve] == [-2.0, -1.0, 1.0, 2.0, 3.0, 4.0]
    effects = [cell["effect"] for cell in curve]
    assert effects == sorted(effects) and effects[0] < -0.1 and effects[3] > 0.2
    # A random vector of the same length moves it far less.
    assert max(abs(cell["effect"]) for cell in found["random_curve"]) < effects[3] / 2
    assert {"alone", "steered"} == set(found["prompting"])
    assert min(found["prompting"].values()) > found["base"] + 0.1
    names = [variant["name"] for variant in found["generations"][0]["variants"]]
    assert names == ["base", "steered", "negative", "prompting", "prompting and steering"]
    assert found["shifted"][0]["tokens"] and found["kl_tokens"]


def test_the_card_shows_them_and_is_published_with_its_pictures(built: Path) -> None:
    pytest.importorskip("matplotlib")
    card = (built / "README.md").read_text()
    for name in ("steering_by_coefficient.png", "steering_shifted_tokens.png"):
        assert f"]({name})" in card
        assert (built / name).read_bytes().startswith(b"\x89PNG")
    assert "KL divergence from the base; the guard is 0.5" in card and "## Completions" in card
    assert "system prompt alone" in card and "Warning" not in card
    names = {file.name for file in published_files(built, read_manifest(built))}
    assert {"steering_by_coefficient.png", "steering_shifted_tokens.png"} <= names
    assert not [path for path in built.iterdir() if path.name.startswith(".")]


def test_without_a_curve_the_shifted_tokens_are_drawn(demo: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    build_recipe(demo / "quickstart.yaml", tmp_path / "out", "evaluate.prompts=[The film was very]")
    assert [path.name for path in (tmp_path / "out").glob("*.png")] == ["steering_shifted_tokens.png"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "](steering_shifted_tokens.png)" in card and "steering_by_coefficient" not in card
    assert "Less than everything was measured" in card and "no curve over coefficients" in card


@pytest.mark.slow
def test_the_card_names_the_temperature_that_the_completions_were_sampled_at(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(details, "TEMPERATURE", 0.25)
    build_recipe(demo / "quickstart.yaml", tmp_path / "out", "evaluate.pictures=false", "evaluate.limit=4")
    assert json.loads((tmp_path / "out" / "steering.json").read_text())["evaluation"]["generation_temperature"] == 0.25
    assert "sampled at temperature 0.25; none was picked" in (tmp_path / "out" / "README.md").read_text()


def test_strict_refuses_a_vector_that_means_nothing(tmp_path: Path) -> None:
    layer = tiny_checkpoint(tmp_path / "base", LLAMA)
    path = write_recipe(
        tmp_path / "recipe.yaml", tmp_path / "base", layer, tmp_path / "out", evaluate={"guard": {"kl": 1e-6}}
    )
    with pytest.raises(CheckFailed) as caught:
        build_recipe(path, tmp_path / "out", strict=True)
    assert caught.value.exit_code == 1
    assert "beyond the guard" in str(caught.value) and not (tmp_path / "out").exists()
    off = write_recipe(tmp_path / "off.yaml", tmp_path / "base", layer, tmp_path / "out")
    with pytest.raises(CheckFailed, match=r"no effect was measured"):
        build_recipe(off, tmp_path / "out", strict=True)


def test_beyond_the_guard_is_warned_about(tmp_path: Path) -> None:
    layer = tiny_checkpoint(tmp_path / "base", LLAMA)
    path = write_recipe(
        tmp_path / "recipe.yaml",
        tmp_path / "base",
        layer,
        tmp_path / "out",
        evaluate={"guard": {"kl": 1e-6, "perplexity": 1.0}},
    )
    result = build_recipe(path, tmp_path / "out")
    assert result.manifest["evaluation"]["guard"]["within"] is False
    assert "beyond the guard" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.slow
def test_auto_sweeps_and_builds_what_was_chosen(demo: Path, tmp_path: Path, capsys: Any) -> None:
    text = (demo / "quickstart.yaml").read_text()
    text = text.replace("layer: 1 ", "layer: auto ").replace("coefficient: 2.0 ", "coefficient: auto ")
    for name in ("model", "pairs.jsonl", "neutral.txt"):
        source = demo / name
        (shutil.copytree if source.is_dir() else shutil.copyfile)(source, tmp_path / name)
    (tmp_path / "auto.yaml").write_text(text)
    arguments = [str(tmp_path / "auto.yaml"), "-o", str(tmp_path / "out"), "--json"]
    arguments += ["--set", "sweep.layers=[0,1,4]", "--set", "sweep.coefficients=[1,2]"]
    arguments += ["--set", "evaluate.pictures=false", "--set", "evaluate.generate_tokens=0"]
    with pytest.raises(SystemExit) as done:
        main(arguments)
    assert not done.value.code
    printed = json.loads(capsys.readouterr().out)
    edit = printed["manifest"]["edits"][0]
    assert (edit["layer"], edit["coefficient"]) == (1, 2.0)
    resolved = printed["manifest"]["recipe"]["resolved"]["vectors"][0]
    assert (resolved["layer"], resolved["coefficient"]) == (1, 2.0)
    sweep = printed["manifest"]["evaluation"]["sweep"]
    assert sweep["recommended"] == {"layer": 1, "coefficient": 2.0}
    assert "How layer and coefficient were chosen" in (tmp_path / "out" / "README.md").read_text()
    assert (tmp_path / "out-sweep" / "sweep.json").is_file()


@pytest.mark.slow
def test_auto_ends_well_where_nothing_is_evaluated(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The sweep is all that there is to say of the effect."""
    keys = ["vectors.0.layer=auto", "sweep.layers=[1]", "sweep.coefficients=[2]", "evaluate.enabled=false"]
    # What a build does not measure keeps nothing back: then a sweep needs pairs of their own, of which some are new.
    keys += ["vectors.0.limit=60", f"evaluate.pairs={demo / 'pairs.jsonl'}"]
    arguments = [str(demo / "quickstart.yaml"), "-o", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as done:
        main([*arguments, *(text for key in keys for text in ("--set", key))])
    assert not done.value.code
    assert f"written: {tmp_path / 'out'}" in capsys.readouterr().out
    evaluation = json.loads((tmp_path / "out" / "steering.json").read_text())["evaluation"]
    assert evaluation["per_vector"] == [] and evaluation["sweep"]["recommended"] == {"layer": 1, "coefficient": 2.0}
    assert "How layer and coefficient were chosen" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.slow
def test_auto_with_nothing_to_choose_writes_nothing(demo: Path, tmp_path: Path) -> None:
    keys = ("vectors.0.layer=auto", "sweep.layers=[5]", "sweep.coefficients=[1]", "evaluate.pictures=false")
    with pytest.raises(CheckFailed, match="no layer and coefficient"):
        fill_in(job_of(demo / "quickstart.yaml", tmp_path / "out", *keys, cache=False))
    assert not (tmp_path / "out").exists()


def test_a_dry_run_of_auto_needs_no_sweep(demo: Path, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit) as done:
        main([str(demo / "quickstart.yaml"), "--set", "vectors.0.layer=auto", "--dry-run", "-o", str(tmp_path / "x")])
    assert not done.value.code
    assert "chosen by a sweep" in capsys.readouterr().out
