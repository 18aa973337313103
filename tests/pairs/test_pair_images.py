"""Images of pairs: where they are read from, and what is said of those that cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from pydantic import ValidationError

from patcher.errors import InputError, MissingExtraError
from patcher.pairs import images
from patcher.pairs.formats import load_pairs
from patcher.pairs.image_prompts import states_images
from patcher.pairs.images import require_pillow
from patcher.pairs.lists import load_list
from patcher.pairs.pair import ContrastPair
from patcher.pairs.questions import load_questions
from patcher.pairs.repeats import group_numbers
from patcher.recipe.pairs import Columns, InlinePair
from patcher.recipe.vector import VectorSpec

ROW = {"prompt": "What is it?", "positive": "good", "negative": "bad"}


def photo(path: Path, colour: str = "red", size: tuple[int, int] = (4, 3)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def written(folder: Path, rows: list[dict[str, Any]], name: str = "pairs.jsonl") -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return name


def read(source: Any, folder: Path, **options: Any) -> tuple[list[ContrastPair], list[str]]:
    notes: list[str] = []
    return load_pairs(source, base_folder=folder, where="recipe.yaml: vectors.0.pairs", notes=notes, **options), notes


def refused(source: Any, folder: Path, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        read(source, folder, **options)
    return str(caught.value)


def test_a_pair_of_the_recipe_names_an_image_beside_the_recipe(tmp_path: Path) -> None:
    photo(tmp_path / "photos" / "cat.png")
    [pair], _notes = read([InlinePair(**ROW, image="photos/cat.png")], tmp_path)
    assert pair.image is not None
    assert pair.image.opened().size == (4, 3)
    assert len(pair.image.digest) == 64


def test_paths_in_a_file_are_relative_to_that_file(tmp_path: Path) -> None:
    photo(tmp_path / "data" / "photos" / "cat.jpg")
    written(tmp_path / "data", [{**ROW, "image": "photos/cat.jpg"}, ROW])
    pairs, notes = read("data/pairs.jsonl", tmp_path)
    assert [pair.image is not None for pair in pairs] == [True, False]
    assert notes == [
        "`image` holds the images of the pairs",
        "1 of 2 pairs of data/pairs.jsonl have no image, and are read as text",
    ]


def test_a_column_of_another_name_is_named(tmp_path: Path) -> None:
    photo(tmp_path / "cat.png")
    source = written(tmp_path, [{"q": "What?", "yes": "good", "no": "bad", "photo": "cat.png"}])
    columns = Columns(prompt="q", positive="yes", negative="no", image="photo")
    [pair], _notes = read(source, tmp_path, columns=columns)
    assert pair.image is not None and pair.prompt == "What?"
    missing = refused(source, tmp_path, columns=columns.model_copy(update={"image": "picture"}))
    assert "there is no column `picture`" in missing


def test_a_column_of_images_that_is_not_named_is_said(tmp_path: Path) -> None:
    source = written(tmp_path, [{**ROW, "image": "nowhere.png"}])
    [pair], notes = read(source, tmp_path, columns=Columns(prompt="prompt", positive="positive", negative="negative"))
    assert pair.image is None
    assert "the column `image` is not used" in notes[0]


def test_conversations_may_mark_the_image_of_their_pair(tmp_path: Path) -> None:
    photo(tmp_path / "cat.png")

    def said(role: str, text: str, *parts: dict[str, Any]) -> list[dict[str, Any]]:
        return [{"role": role, "content": [*parts, {"type": "text", "text": text}]}]

    row = {
        "prompt": said("user", "What is it?", {"type": "image", "text": None}),
        "chosen": said("assistant", "A cat."),
        "rejected": said("assistant", "A dog."),
    }
    source = written(tmp_path, [{**row, "images": ["cat.png"]}])
    [pair], notes = read(source, tmp_path)
    assert pair.image is not None and (pair.prompt, pair.positive) == ("What is it?", "A cat.")
    assert any("stands at the front of the user's first turn" in note for note in notes)
    # Without an image to stand there, its mark is refused as before.
    assert "holds more than text" in refused(written(tmp_path, [row]), tmp_path)


def test_answers_to_questions_may_have_images(tmp_path: Path) -> None:
    photo(tmp_path / "cat.png")
    row = {"question": "Is it good?\n (A) yes\n (B) no", "answer_matching_behavior": " (A)"}
    source = written(tmp_path, [{**row, "answer_not_matching_behavior": " (B)", "image": "cat.png"}])
    [pair], _notes = read(source, tmp_path)
    assert pair.format == "ab" and pair.image is not None


def test_a_data_set_may_hold_the_bytes_of_images(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    data = photo(tmp_path / "cat.png").read_bytes()
    rows = [{**ROW, "photo": {"bytes": data, "path": "cat.png"}}, {**ROW, "photo": {"bytes": None, "path": None}}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    columns = Columns(prompt="prompt", positive="positive", negative="negative", image="photo")
    pairs, _notes = read("pairs.parquet", tmp_path, columns=columns)
    assert pairs[0].image is not None and pairs[0].image.opened().size == (4, 3)
    assert pairs[1].image is None


def test_images_of_a_hub_data_set_are_read_without_being_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    paths = [str(photo(tmp_path / f"{colour}.png", colour)) for colour in ("red", "blue")]
    table = datasets.Dataset.from_list([{**ROW, "photo": path, "photos": [path]} for path in paths])
    features = {**table.features, "photo": datasets.Image(), "photos": [datasets.Image()]}
    table = table.cast(datasets.Features(features))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_args, **_options: datasets.DatasetDict(train=table))
    for column in ("photo", "photos", "photos.0"):
        columns = Columns(prompt="prompt", positive="positive", negative="negative", image=column)
        pairs, _notes = read("hf://datasets/me/photos", tmp_path, columns=columns)
        assert [pair.image and pair.image.opened().getpixel((0, 0)) for pair in pairs] == [(255, 0, 0), (0, 0, 255)]


@pytest.mark.parametrize(
    ("image", "said", "remedy"),
    [
        ("nowhere.png", "there is no such image", "paths are relative to the file that names them"),
        ("", None, None),
        ("text.png", "`image` is no image", "give a PNG, JPEG"),
        ("empty.png", "`image` is no image", "give a PNG, JPEG"),
        ("photos", "`image` is a folder, not an image", "name one of its files"),
        ("https://example.org/cat.png", "`image` is an address", "download the image, and give its path"),
        (["a.png", "b.png"], "`image` holds 2 images, and a pair has one", "`image.0`"),
        (7, "`image` is no image", "give a PNG, JPEG"),
    ],
)
def test_what_is_no_image_is_refused_in_its_row(image: Any, said: str | None, remedy: str, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "text.png").write_text("This is not an image, whatever its name says.")
    (tmp_path / "empty.png").touch()
    source = written(tmp_path, [ROW, {**ROW, "image": image}])
    if said is None:
        assert read(source, tmp_path)[0][1].image is None
        return
    text = refused(source, tmp_path)
    assert said in text and "pairs.jsonl:2" in text and remedy in text


def test_a_path_in_a_hub_data_set_leads_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list([{**ROW, "image": "cat.png"}])
    monkeypatch.setattr(datasets, "load_dataset", lambda *_args, **_options: datasets.DatasetDict(train=table))
    text = refused("hf://datasets/me/photos", tmp_path)
    assert "a data set of the Hub has no folder here" in text


def test_half_an_image_is_refused_when_it_is_opened(tmp_path: Path) -> None:
    path = photo(tmp_path / "cat.png", size=(200, 200))
    path.write_bytes(path.read_bytes()[:60])
    [pair], _notes = read([InlinePair(**ROW, image="cat.png")], tmp_path)
    assert pair.image is not None
    with pytest.raises(InputError, match="this image cannot be opened"):
        pair.image.opened()


def test_an_image_that_changes_meanwhile_is_refused(tmp_path: Path) -> None:
    photo(tmp_path / "cat.png")
    [pair], _notes = read([InlinePair(**ROW, image="cat.png")], tmp_path)
    assert pair.image is not None and pair.image.digest
    photo(tmp_path / "cat.png", "blue")
    with pytest.raises(InputError, match="this image was changed while it was in use"):
        pair.image.opened()


def test_a_photograph_is_turned_as_its_camera_says(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (4, 2)).save(tmp_path / "cat.jpg", exif=exif)
    [pair], _notes = read([InlinePair(**ROW, image="cat.jpg")], tmp_path)
    assert pair.image is not None and pair.image.opened().size == (2, 4)


def test_without_pillow_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "has_pillow", lambda: False)
    with pytest.raises(MissingExtraError, match="pillow") as caught:
        require_pillow()
    assert 'pip install "patch-model[images]"' in str(caught.value)


def test_lists_take_no_images(tmp_path: Path) -> None:
    items = [{"prompt": "What?", "response": "good", "image": "cat.png"}, "other"]
    spec = VectorSpec(positives=items, negatives=["one", "two"], layer=1)
    with pytest.raises(InputError, match="this text has an image, and only pairs may have one"):
        load_list(spec, "positive", base_folder=tmp_path, where="recipe.yaml: vectors.0.positives")
    without = [{"prompt": "What?", "response": "good"}, "other"]
    spec = VectorSpec(positives=without, negatives=["one", "two"], layer=1)
    assert len(load_list(spec, "positive", base_folder=tmp_path, where="vectors.0.positives")[0]) == 2
    with pytest.raises(ValidationError, match="goes with `pairs`"):
        columns = Columns(positive="a", negative="b", image="c")
        VectorSpec(positives="a.jsonl", negatives="b.jsonl", columns=columns, layer=1)


def test_questions_take_no_images(tmp_path: Path) -> None:
    written(tmp_path, [{"question": "What?", "image": "cat.png"}], "questions.jsonl")
    with pytest.raises(InputError, match="this question has an image, and only pairs may have one"):
        load_questions("questions.jsonl", base_folder=tmp_path, where="vectors.0.questions")


def test_pairs_that_differ_in_their_images_do_not_say_the_same(tmp_path: Path) -> None:
    for colour in ("red", "blue", "green"):
        photo(tmp_path / f"{colour}.png", colour)
    photo(tmp_path / "again.png", "red")
    names = ["red.png", "blue.png", "green.png", "again.png"]
    rows = [InlinePair(**{**ROW, "positive": f"good {name}"}, image=name) for name in names]
    pairs, _notes = read(rows, tmp_path)
    numbers = group_numbers(pairs)
    assert numbers[0] == numbers[3]
    assert len(set(numbers)) == 3


def test_a_config_of_text_states_nothing_about_images() -> None:
    assert not states_images({"model_type": "llama", "rope_scaling": {"factor": 2}, "num_hidden_layers": 2})
    assert states_images({"model_type": "llava", "vision_config": {}})
    assert states_images({"model_type": "x", "inner": {"image_token_id": 3}})
