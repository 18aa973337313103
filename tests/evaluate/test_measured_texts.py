"""Sentences, ids, tokens as text, and the bundled neutral passages."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.tiny_models import tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from patcher.evaluate.neutral import neutral_texts
from patcher.evaluate.texts import encode_texts, split_sentences, token_texts
from patcher.verify.probes import PROBES

SENTENCES = [
    ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
    ('He said "No." Then he left.', ['He said "No."', "Then he left."]),
    ("It grew by 3.5 per cent. So did Dr. J. Smith's, e.g. in May.", None),
    ("So did I. Then we ate.", ["So did I.", "Then we ate."]),
    ("1. Wash the rice. 2. Heat the oil.", ["1. Wash the rice.", "2. Heat the oil."]),
    ("a. Sustainability and eco-friendliness: there is more. Venues grow.", None),
    ("Title: Trends\n\nIntroduction\nThe sea is cold.", ["Title: Trends", "Introduction", "The sea is cold."]),
    ("Wait... what? yes. (Really.) 42 of them.", ["Wait... what? yes.", "(Really.)", "42 of them."]),
    ("海は冷たい。雨が降る！", ["海は冷たい。", "雨が降る！"]),
    (" \n\t", []),
]


@pytest.mark.parametrize(("text", "expected"), SENTENCES)
def test_sentences(text: str, expected: list[str] | None) -> None:
    found = split_sentences(text)
    assert len(found) == 2 if expected is None else found == expected


@given(st.text(st.sampled_from('aB1. !?…"”)\n\u2028。’(«Dr'), max_size=60))
def test_nothing_but_white_space_is_left_out(text: str) -> None:
    found = split_sentences(text)
    assert "".join("".join(found).split()) == "".join(text.split())
    assert all(sentence == sentence.strip() and sentence for sentence in found)


def test_every_text_begins_with_a_token_that_is_not_scored() -> None:
    with_bos = tiny_tokenizer()
    (ids,) = encode_texts(["I love the sea"], with_bos)
    assert ids == tuple(with_bos("I love the sea")["input_ids"]) and ids[0] == 1
    plain = tiny_tokenizer()
    plain.backend_tokenizer.post_processor = None  # as GPT-2, which puts nothing in front
    assert plain("I")["input_ids"][0] != 1
    assert encode_texts(["I love the sea", ""], plain) == [ids, (1,)]
    plain.bos_token = None
    assert encode_texts(["I love the sea"], plain) == [(2, *ids[1:])]
    plain.eos_token = None
    assert encode_texts(["I love the sea"], plain, positions=3) == [ids[1:4]]


def _sentencepiece() -> Any:
    words = {word: number for number, word in enumerate(["<s>", "<unk>", "▁the", "▁sea", "x", "▁x", "s"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")


def test_tokens_keep_the_space_they_begin_with() -> None:
    bytes_too = tiny_tokenizer()
    text = "I love the sea, 海"
    ids = bytes_too(text, add_special_tokens=False)["input_ids"]
    found = token_texts(ids, bytes_too)
    assert "".join(found[:-3]) == "I love the sea, " and set(found[-3:]) == {"�"}
    assert token_texts([1], bytes_too) == ["<s>"]
    pieces = _sentencepiece()
    assert pieces.decode([2]) == "the"
    assert token_texts([2, 3, 6], pieces) == [" the", " sea", "s"]


def test_neutral_passages() -> None:
    passages = neutral_texts()
    assert 55 <= len(passages) <= 70 and len(set(passages)) == len(passages)
    assert not set(passages) & set(PROBES)
    assert all(passage.isascii() and 8 <= len(passage.split()) <= 60 for passage in passages)
    assert neutral_texts(5) == passages[:5]
    assert any("\n    " in passage for passage in passages[:6])  # code stays as it is
