"""Calibration texts: where they come from, how they are split, and what the model adds itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.tiny_models import TEXTS, tiny_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

from patcher.errors import InputError
from patcher.routes.rank_one.calibration import CHUNK, calibration_tokens, chunks, load_calibration, sample_rows


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("calibration") / "base"
    tiny_checkpoint(folder, "meta-llama--Llama-3.2-1B")
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def quiet(_line: str) -> None:
    return None


def test_the_bundled_text_is_varied_and_does_not_repeat_itself() -> None:
    texts = load_calibration(None, Path("nowhere"))
    assert len(texts) == len(set(texts)) > 60
    joined = "\n".join(texts)
    assert len(joined.encode()) > 10_000
    for mark in ("def ", "Assistant:", "SELECT", "昨日", "Guten Morgen", "1.", "|---|"):
        assert mark in joined


def test_a_text_file_gives_its_paragraphs(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("\ufeffone\ntwo\n\n\n\n three\n", encoding="utf-8")
    assert load_calibration("mine.txt", tmp_path) == ["one\ntwo", " three"]


def test_a_jsonl_file_gives_the_text_of_each_line(tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text('{"text": "a\\n\\nb"}\n\n"c"\n', encoding="utf-8")
    assert load_calibration("mine.jsonl", tmp_path) == ["a\n\nb", "c"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.txt", None, "no such file"),
        ("mine.csv", b"a,b", "this kind of file"),
        ("mine.txt", b"\n \n\n", "no text"),
        ("mine.txt", b"\xff\xfe\x00", "not UTF-8"),
        ("mine.jsonl", b'{"text": "a"}\n{broken', "line 2"),
        ("mine.jsonl", b'{"texts": "a"}', "no `text`"),
        ("mine.jsonl", b'{"text": 3}', "no `text`"),
        ("mine.jsonl", b"[1]", "no `text`"),
    ],
)
def test_a_file_that_cannot_serve_is_refused_in_words(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        load_calibration(name, tmp_path)
    assert "calibration.texts" in str(caught.value)


def test_a_folder_is_no_text_file(tmp_path: Path) -> None:
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(InputError, match="cannot be read"):
        load_calibration("folder.txt", tmp_path)


def test_long_texts_come_in_pieces_that_each_begin_with_the_bos(loaded) -> None:
    model, tokenizer = loaded
    text = " ".join(TEXTS * 20)
    pieces = chunks(tokenizer, text, model)
    assert len(pieces) > 1
    assert all(piece[0] == tokenizer.bos_token_id and len(piece) <= CHUNK for piece in pieces)
    assert [index for piece in pieces for index in piece[1:]] == tokenizer(text)["input_ids"][1:]


def test_the_split_is_seeded_disjoint_and_within_the_limit(loaded) -> None:
    model, tokenizer = loaded
    texts = [f"number {index}: {TEXTS[index % 4]}" for index in range(40)]
    options = {"limit": 900, "width": 1, "progress": quiet}
    one, two, other = (calibration_tokens(texts, model, tokenizer, seed=seed, **options) for seed in (0, 0, 1))
    assert one == two != other
    assert one.tokens <= 900
    assert one.sampled == 0
    assert not {*map(tuple, one.train)} & {*map(tuple, one.held_out)}


def test_the_model_writes_the_rest_where_the_texts_are_few(loaded) -> None:
    model, tokenizer = loaded
    before = torch.random.get_rng_state()
    found = calibration_tokens(TEXTS, model, tokenizer, limit=10_000, width=200, seed=0, progress=quiet)
    assert found.sampled > 0
    assert found.tokens >= 1000
    assert torch.equal(before, torch.random.get_rng_state())
    again = calibration_tokens(TEXTS, model, tokenizer, limit=10_000, width=200, seed=0, progress=quiet)
    assert again == found


def test_samples_end_where_the_model_ends_them(loaded) -> None:
    model, tokenizer = loaded
    rows = sample_rows(model, tokenizer, [[1, 5, 6, 7, 8, 9, 10, 11]], 500, seed=3, progress=quiet)
    end = tokenizer.eos_token_id
    assert all(end not in row[8:-1] and len(row) <= CHUNK for row in rows)
    assert all(0 <= index < 400 for row in rows for index in row)


def test_nothing_left_to_hold_out_is_refused(loaded) -> None:
    model, tokenizer = loaded
    with pytest.raises(InputError, match="too little calibration text"):
        calibration_tokens(["word"], model, tokenizer, limit=4, width=0, seed=0, progress=quiet)


def test_a_model_without_a_tokenizer_is_refused(loaded) -> None:
    with pytest.raises(InputError, match="tokenizer"):
        calibration_tokens(TEXTS, loaded[0], None, limit=100, width=1, seed=0, progress=quiet)
