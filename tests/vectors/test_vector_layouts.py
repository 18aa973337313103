"""Which row of a file is the vector of a layer: decided by the number of blocks, said, or refused with the key to give.

Row, feature or tensor number n is filled with n + 1, so that a value tells where it was read.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.building import build_recipe, job_of
from support.tiny_models import tiny_checkpoint
from support.vector_files import reading_of

from patcher.build.planning import plan_build
from patcher.errors import InputError, Problem

HIDDEN, BLOCKS = 8, 4


def rows(count: int, width: int = HIDDEN) -> torch.Tensor:
    return torch.arange(1.0, count + 1)[:, None].repeat(1, width)


def saved(folder: Path, value: Any, name: str = "v.pt") -> Path:
    torch.save(value, folder / name)
    return folder / name


def value(path: Path, layer: int, *, blocks: int = BLOCKS, **asked: Any) -> float:
    found = reading_of(path, layer, HIDDEN, blocks=blocks, **asked).values
    assert found.dtype == torch.float32 and found.shape == (HIDDEN,) and len(found.unique()) == 1
    return float(found[0])


def refusal(path: Path, layer: int, *, blocks: int = BLOCKS, **asked: Any) -> Problem:
    with pytest.raises(InputError) as caught:
        reading_of(path, layer, HIDDEN, blocks=blocks, **asked)
    return caught.value.problems[0]


def notes(path: Path, layer: int, *, blocks: int = BLOCKS, **asked: Any) -> str:
    found = reading_of(path, layer, HIDDEN, blocks=blocks, **asked)
    return "\n".join([found.words, *found.notes])


def test_as_many_rows_as_blocks_are_one_a_block(tmp_path: Path) -> None:
    path = saved(tmp_path, rows(BLOCKS))
    assert [value(path, layer) for layer in range(BLOCKS)] == [1, 2, 3, 4]
    assert "row 2 of [4, 8], a row for each block: that of block 2 (as many rows as blocks)" in notes(path, 2)
    assert "no row for layer -1" in refusal(path, -1).message


def test_a_row_more_than_blocks_is_hidden_states(tmp_path: Path) -> None:
    path = saved(tmp_path, rows(BLOCKS + 1))
    assert [value(path, layer) for layer in range(-1, BLOCKS)] == [1, 2, 3, 4, 5]
    assert "hidden_states[3]: the residual stream after block 2 (a row more than blocks)" in notes(path, 2)
    assert "the residual stream of the embedding" in notes(path, -1)


def test_the_last_hidden_state_and_those_that_leave_one_out(tmp_path: Path) -> None:
    whole = saved(tmp_path, {"hidden_states": rows(BLOCKS + 1)})
    assert "after the final norm" in notes(whole, BLOCKS - 1) and "norm" not in notes(whole, 2)
    short = saved(tmp_path, {"hidden_states": rows(BLOCKS)})
    assert "one is left out" in refusal(short, 2).message
    assert value(short, 2, layout="hidden_states") == 4 and value(short, 2, layout="blocks") == 3


@pytest.mark.parametrize("shape", [(1, 5, HIDDEN), (5, 1, HIDDEN), (1, 5, 1, HIDDEN)])
def test_dimensions_of_one_are_left_out(tmp_path: Path, shape: tuple[int, ...]) -> None:
    assert value(saved(tmp_path, rows(5).reshape(shape)), 2) == 4


def test_lists_of_tensors_are_rows(tmp_path: Path) -> None:
    assert value(saved(tmp_path, list(rows(5))), 2) == 4
    assert value(saved(tmp_path, [row[None] for row in rows(4)]), 2) == 3
    # The place in a list that leaves some out is the layer.
    assert value(saved(tmp_path, [None, *rows(4)[1:]]), 2) == 3
    assert "no vector for layer 0" in refusal(saved(tmp_path, [None, *rows(4)[1:]]), 0).message


@pytest.mark.parametrize("count", [2, 3, 6, 7, 100])
def test_other_numbers_of_rows_are_refused_with_the_keys_that_say_what_they_are(tmp_path: Path, count: int) -> None:
    path = saved(tmp_path, rows(count))
    problem = refusal(path, 1)
    assert problem.message == f"nothing says what the {count} rows of this tensor are: the model has 4 blocks"
    assert "`row:`" in str(problem.remedy) and "`feature:`" in str(problem.remedy)
    assert ("`layout: blocks`" in str(problem.remedy)) == (count <= BLOCKS)
    assert value(path, 1, row=1) == value(path, 1, feature=1) == 2
    if count <= BLOCKS:
        assert value(path, 1, layout="blocks") == 2 and value(path, 0, layout="hidden_states") == 2


def test_a_square_matrix_is_refused_even_where_its_rows_are_as_many_as_blocks(tmp_path: Path) -> None:
    path = saved(tmp_path, rows(HIDDEN))
    for blocks in (BLOCKS, HIDDEN):
        assert refusal(path, 1, blocks=blocks).message == "this matrix is square, and its rows may be anything"
    assert value(path, 1, blocks=HIDDEN, layout="blocks") == 2
    assert value(path, 1, blocks=HIDDEN, layout="hidden_states") == 3
    assert value(path, 1, row=5) == 6


def test_the_layout_where_the_shape_does_not_say(tmp_path: Path) -> None:
    path = saved(tmp_path, rows(BLOCKS))
    assert value(path, 0, layout="hidden_states") == 2
    assert "layers -1 to 2" in str(refusal(path, 3, layout="hidden_states").found)
    for count, layout in ((5, "blocks"), (6, "hidden_states")):
        problem = refusal(saved(tmp_path, rows(count)), 1, layout=layout)
        assert "more rows than the model" in problem.message and "`row:`" in str(problem.remedy)


def test_a_model_of_one_block(tmp_path: Path) -> None:
    assert value(saved(tmp_path, rows(1)), 0, blocks=1) == 1
    assert value(saved(tmp_path, rows(2)), 0, blocks=1) == 2
    assert value(saved(tmp_path, rows(2)), -1, blocks=1) == 1


def test_a_named_row(tmp_path: Path) -> None:
    path = saved(tmp_path, rows(7))
    assert value(path, 1, row=0) == 1 and value(path, 1, row=-1) == 7
    assert "row 6 of [7, 8], as the recipe says" in notes(path, 1, row=-1)
    assert "rows 0 to 6" in str(refusal(path, 1, row=7).found)
    assert "takes one index" in refusal(path, 1, row=[1, 2]).message
    assert "no row to choose" in refusal(saved(tmp_path, torch.ones(HIDDEN)), 1, row=0).message


def test_several_positions_and_layers_take_two_indices(tmp_path: Path) -> None:
    cube = torch.stack([rows(BLOCKS), rows(BLOCKS) + 10])
    path = saved(tmp_path, cube, "mean_diffs.pt")
    problem = refusal(path, 1)
    assert "it has several for each layer" in problem.message
    # What that repository reads enters the block: after block 1 is its row 2.
    assert "`row: [POSITION, 2]`" in str(problem.remedy)
    assert value(path, 1, row=[-1, 2]) == 13
    assert "it has none after the last" in str(refusal(path, 3).remedy)


def test_layers_as_keys(tmp_path: Path) -> None:
    """steering-vectors, repeng and many scripts number by block; the numbers 0 to n of n blocks are hidden states."""
    by_block = dict(enumerate(rows(BLOCKS)))
    for held in (by_block, {"layer_activations": by_block, "layer_type": "decoder_block"}, {"directions": by_block}):
        assert value(saved(tmp_path, held), 2) == 3
    states = saved(tmp_path, dict(enumerate(rows(BLOCKS + 1))))
    assert value(states, 2) == 4 and value(states, -1) == 1 and value(states, 3) == 5
    assert "tensor n is read as hidden_states[n], what enters block n" in notes(states, 2)
    from_one = saved(tmp_path, {layer + 1: row for layer, row in enumerate(rows(BLOCKS))})
    assert value(from_one, 0) == 1 and value(from_one, 3) == 4
    assert value(saved(tmp_path, by_block), 1, layout="hidden_states") == 3
    deeper = refusal(saved(tmp_path, dict(enumerate(rows(9)))), 2)
    assert "more layers than this model has blocks" in deeper.message
    shallower = saved(tmp_path, dict(enumerate(rows(BLOCKS))))
    assert "look like those of a model of 4 blocks" in notes(shallower, 2, blocks=20)


def test_names_that_say_another_layer_or_point(tmp_path: Path) -> None:
    for name in ("layer.3", "layers.3", "direction_3", "blocks.3.hook_resid_post", "model.layers.3", "hidden_states.4"):
        path = saved(tmp_path, {name: torch.ones(HIDDEN)})
        assert value(path, 3) == 1, name
        problem = refusal(path, 1)
        assert "there is no vector for layer 1 in this file: its only one is of block 3" in problem.message
        assert f"`tensor: {name}`" in str(problem.remedy)
        assert value(path, 1, tensor=name) == 1 and "means block 3" in notes(path, 1, tensor=name)
    for name in ("L{}", "l{}", "resid_post_{}", "layer_{:02d}", "blk.{}.direction", "{}", "layers.{}.vector"):
        path = saved(tmp_path, {name.format(n): row for n, row in enumerate(rows(BLOCKS))})
        assert [value(path, layer) for layer in range(BLOCKS)] == [1, 2, 3, 4], name
    entering = saved(tmp_path, {f"resid_pre_{n}": row for n, row in enumerate(rows(BLOCKS))})
    assert value(entering, 1) == 3
    entering = saved(tmp_path, {f"blocks.{n}.hook_resid_pre": row for n, row in enumerate(rows(BLOCKS))})
    assert value(entering, 1) == 3
    elsewhere = saved(tmp_path, {"model.layers.3.mlp": torch.ones(HIDDEN)})
    assert "another point of block 3 than its output" in refusal(elsewhere, 3).message
    both = saved(tmp_path, {"attn": {3: torch.ones(HIDDEN)}, "resid": {3: 2 * torch.ones(HIDDEN)}})
    assert value(both, 3) == 2


def test_sides_of_one_layer_are_not_taken_for_its_vector(tmp_path: Path) -> None:
    path = saved(tmp_path, {"positive": {3: torch.ones(HIDDEN)}, "negative": {3: torch.zeros(HIDDEN)}})
    assert "several tensors of this file may be meant for layer 3" in refusal(path, 3).message
    assert value(path, 3, tensor="positive.3") == 1


def test_rows_of_a_tensor_whose_name_is_a_layer_are_not_blocks(tmp_path: Path) -> None:
    path = saved(tmp_path, {"layer.2": rows(BLOCKS)})
    assert "is of one layer and has 4 rows" in refusal(path, 2).message
    assert value(path, 2, row=3) == 4


def test_a_wrong_hidden_size(tmp_path: Path) -> None:
    heads = refusal(saved(tmp_path, {"layer.2": torch.ones(2, HIDDEN // 2)}), 2)
    assert "attention heads" in str(heads.remedy)
    assert "`feature:`" in str(refusal(saved(tmp_path, torch.ones(HIDDEN, 32)), 2).remedy)


MODEL = "meta-llama--Llama-3.2-1B"


def recipe(folder: Path, **vector: Any) -> Path:
    entry = {"name": "trait", "method": "file", **vector}
    text = {"model": str(folder / "base"), "vectors": [entry], "evaluate": {"enabled": False}, "output": "out"}
    (folder / "recipe.yaml").write_text(json.dumps(text))
    return folder / "recipe.yaml"


@pytest.mark.slow
def test_a_build_reads_hidden_states_and_says_so(tmp_path: Path) -> None:
    """A persona vector: [blocks + 1, hidden], row i filled with i + 1. After the last block is the last row."""
    tiny_checkpoint(tmp_path / "base", MODEL)
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    blocks, hidden = config["num_hidden_layers"], config["hidden_size"]
    saved(tmp_path, rows(blocks + 1, hidden), "trait_response_avg_diff.pt")
    last = blocks - 1
    path = recipe(tmp_path, file="trait_response_avg_diff.pt", layer=last)
    dry = plan_build(job_of(path, tmp_path / "out"))
    assert any(f"hidden_states[{blocks}]" in note for note in dry.notes)
    manifest = build_recipe(path, tmp_path / "out").manifest
    held = load_file(tmp_path / "out" / "steering.safetensors")[f"trait.layer.{last}"]
    assert held.unique().tolist() == [blocks + 1]
    source = manifest["edits"][0]["source"]
    assert (source["layout"], source["index"], source["shape"]) == ("hidden_states", [blocks], [blocks + 1, hidden])
    assert source["words"] in " ".join(manifest["notes"])
    assert source["words"] in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("vector", "words"),
    [
        ({"file": "none.pt", "layer": 0}, "there is no such vector file"),
        ({"file": "six.safetensors", "layer": 0}, "nothing says what the 60 rows"),
        ({"file": "zero.safetensors", "layer": 0}, "zero, or not finite"),
        ({"file": "nan.safetensors", "layer": 0}, "zero, or not finite"),
    ],
)
def test_a_wrong_file_is_found_in_the_plan(tmp_path: Path, vector: dict[str, Any], words: str) -> None:
    tiny_checkpoint(tmp_path / "base", MODEL)
    hidden = json.loads((tmp_path / "base" / "config.json").read_text())["hidden_size"]
    save_file({"v": torch.ones(60, hidden)}, tmp_path / "six.safetensors")
    save_file({"v": torch.zeros(hidden)}, tmp_path / "zero.safetensors")
    save_file({"v": torch.full((hidden,), torch.nan)}, tmp_path / "nan.safetensors")
    with pytest.raises(InputError, match=words):
        plan_build(job_of(recipe(tmp_path, **vector), tmp_path / "out"))


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"row": 1, "feature": 2}, "takes no `feature` or `layout`"),
        ({"row": 1, "layout": "blocks"}, "takes no `feature` or `layout`"),
        ({"feature": 1, "layout": "blocks"}, "has no `layout: blocks`"),
        ({"layout": "columns"}, "needs `feature`"),
        ({"method": "pca", "pairs": [], "row": 1, "file": None}, "`row` goes with `method: file`"),
    ],
)
def test_keys_that_contradict_each_other(tmp_path: Path, keys: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        job_of(recipe(tmp_path, **{"file": "v.pt", "layer": 1, **keys}), tmp_path / "out")


@pytest.mark.slow
def test_a_folder_is_a_vector_file_from_the_plan_to_the_record(tmp_path: Path) -> None:
    """The folder of an autoencoder: its weights are what is hashed and named."""
    tiny_checkpoint(tmp_path / "base", MODEL)
    hidden = json.loads((tmp_path / "base" / "config.json").read_text())["hidden_size"]
    folder = tmp_path / "layers.1"
    folder.mkdir()
    save_file(
        {"W_dec": rows(3 * hidden, hidden), "encoder.weight": rows(3 * hidden, hidden)}, folder / "sae.safetensors"
    )
    path = recipe(tmp_path, file="layers.1", layer=1, feature=5, scale="unit")
    manifest = build_recipe(path, tmp_path / "out").manifest
    edit = manifest["edits"][0]
    assert edit["norm"] == pytest.approx(1) and edit["source"]["file"] == "sae.safetensors"
    assert edit["source"]["layout"] == "feature" and edit["source"]["index"] == [5]
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"It was read from `sae.safetensors, W_dec: feature 5 of {3 * hidden}" in card and "`.\n" in card


def test_the_command_for_gguf_takes_a_column_as_the_refusal_says() -> None:
    from click.testing import CliRunner

    from patcher.cli.gguf_command import gguf

    options = ["README.md", "out.gguf", "--vector", "v.pt", "--layer", "1", "--feature", "3", "--layout", "columns"]
    assert "give only one of" not in CliRunner().invoke(gguf, options).output
    assert "give only one of" in CliRunner().invoke(gguf, [*options, "--row", "3"]).output
