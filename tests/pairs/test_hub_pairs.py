"""Pairs from Hub data sets, with the ``datasets`` package's loader replaced: no network."""

from __future__ import annotations

import sys

import pytest

from patcher.errors import InputError, MissingExtraError, OutsideError
from patcher.pairs.formats import load_pairs
from patcher.pairs.hub_datasets import HubAddress, parse_address

datasets = pytest.importorskip("datasets")

ROWS = [{"positive": "a", "negative": "b"}, {"positive": "c", "negative": "d", "prompt": None}]


def load(source: str, tmp_path):
    return load_pairs(source, base_folder=tmp_path, where="recipe.yaml: vectors.0.pairs")


@pytest.fixture
def hub(monkeypatch):
    """Answers ``load_dataset`` with ``hub.answer`` (or raises it) and records how it was called."""

    class Hub:
        answer: object = None
        called: tuple[object, ...] = ()

    def load_dataset(path, name=None, data_files=None, split=None):
        Hub.called = (path, name, data_files, split)
        if isinstance(Hub.answer, Exception):
            raise Hub.answer
        return Hub.answer if split is None else Hub.answer[split]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return Hub


@pytest.mark.parametrize(
    ("source", "address"),
    [
        ("hf://datasets/me/pairs", HubAddress("me/pairs", None, None, None)),
        ("hf://datasets/me/pairs@test", HubAddress("me/pairs", None, None, "test")),
        ("hf://datasets/me/pairs/english", HubAddress("me/pairs", "english", None, None)),
        ("hf://datasets/me/pairs/2022.en@test", HubAddress("me/pairs", "2022.en", None, "test")),
        ("hf://datasets/me/pairs/data/a.jsonl", HubAddress("me/pairs", None, "data/a.jsonl", None)),
    ],
)
def test_addresses(source, address):
    assert parse_address(source, "here") == address


@pytest.mark.parametrize("source", ["hf://datasets/me", "hf://me/pairs", "hf://datasets/", "hf://datasets/a/b@c@d"])
def test_malformed_addresses_are_refused(source, tmp_path):
    with pytest.raises(InputError, match="not the address of a data set") as caught:
        load(source, tmp_path)
    assert "hf://datasets/owner/name" in str(caught.value)


def test_the_only_split_else_train_is_read(hub, tmp_path):
    table = datasets.Dataset.from_list(ROWS)
    hub.answer = datasets.DatasetDict({"validation": table})
    pairs = load("hf://datasets/me/pairs", tmp_path)
    assert [pair.positive for pair in pairs] == ["a", "c"]
    assert pairs[1].origin == "hf://datasets/me/pairs[1]"
    hub.answer = datasets.DatasetDict({"test": table.select([0]), "train": table})
    assert len(load("hf://datasets/me/pairs", tmp_path)) == 2
    assert len(load("hf://datasets/me/pairs/english@test", tmp_path)) == 1
    assert hub.called == ("me/pairs", "english", None, "test")
    load("hf://datasets/me/pairs/data/a.jsonl", tmp_path)
    assert hub.called == ("me/pairs", None, "data/a.jsonl", None)
    hub.answer = datasets.DatasetDict({"test": table, "dev": table})
    with pytest.raises(InputError, match="several splits") as caught:
        load("hf://datasets/me/pairs", tmp_path)
    assert "test, dev" in str(caught.value)


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (
            datasets.exceptions.DatasetNotFoundError("Dataset 'me/pairs' doesn't exist"),
            OutsideError,
            "is not on the Hub",
        ),
        (ConnectionError("Couldn't reach me/pairs\nlong story"), OutsideError, "could not be fetched"),
        (RuntimeError(""), OutsideError, "could not be fetched"),
        (
            ValueError("BuilderConfig 'x' not found. Available: ['a']"),
            InputError,
            "configuration is missing or unknown",
        ),
        (ValueError('Unknown split "x". Should be one of [...]'), InputError, "has no split"),
        (datasets.exceptions.DataFilesNotFoundError("No data files"), InputError, "no data file"),
    ],
)
def test_hub_errors_become_plain_words(hub, tmp_path, error, kind, words):
    hub.answer = error
    with pytest.raises(kind, match=words) as caught:
        load("hf://datasets/me/pairs", tmp_path)
    assert caught.value.problems[0].where == "recipe.yaml: vectors.0.pairs"
    assert "long story" not in str(caught.value)


def test_an_empty_split(hub, tmp_path):
    hub.answer = {"train": []}
    with pytest.raises(InputError, match="no rows"):
        load("hf://datasets/me/pairs", tmp_path)


def test_without_the_package(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"needs the package datasets") as caught:
        load("hf://datasets/me/pairs", tmp_path)
    assert "patch-model[datasets]" in str(caught.value)
