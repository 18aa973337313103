"""Reading JSON, JSON Lines and CSV: what is accepted, and what a refusal says."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from patcher.errors import InputError
from patcher.pairs.formats import load_pairs
from patcher.pairs.pair import ContrastPair

ROWS = [{"positive": "Love", "negative": "Hate"}, {"prompt": "I feel", "positive": " good", "negative": " bad"}]
PAIRS = [("Love", "Hate", None), (" good", " bad", "I feel")]


def load(folder: Path, name: str, content: str | bytes, **options: object) -> list[ContrastPair]:
    data = content if isinstance(content, bytes) else content.encode()
    (folder / name).write_bytes(data)
    return load_pairs(name, base_folder=folder, where="recipe.yaml: vectors.0.pairs", **options)


def sides(pairs: list[ContrastPair]) -> list[tuple[str, str, str | None]]:
    return [(pair.positive, pair.negative, pair.prompt) for pair in pairs]


def refusal(folder: Path, name: str, content: str | bytes, **options: object) -> InputError:
    with pytest.raises(InputError) as caught:
        load(folder, name, content, **options)
    return caught.value


def test_json_lines(tmp_path):
    text = "\n".join(json.dumps(row) for row in ROWS)
    pairs = load(tmp_path, "pairs.jsonl", text.replace("\n", "\n\n") + "\n")
    assert sides(pairs) == PAIRS
    assert [pair.origin for pair in pairs] == ["pairs.jsonl:1", "pairs.jsonl:3"]
    assert sides(load(tmp_path, "pairs.ndjson", text)) == PAIRS


def test_json_lines_with_windows_line_ends_bom_and_line_separators_in_texts(tmp_path):
    row = '{"positive": "a\u2028b", "negative": "c\x85d"}'
    pairs = load(tmp_path, "pairs.jsonl", b"\xef\xbb\xbf" + f"{row}\r\n{row}\r\n".encode())
    assert sides(pairs) == [("a\u2028b", "c\x85d", None)] * 2


@pytest.mark.parametrize("wrap", [lambda rows: rows, lambda rows: {"data": rows}, lambda rows: {"pairs": rows}])
def test_json(tmp_path, wrap):
    pairs = load(tmp_path, "pairs.json", json.dumps(wrap(ROWS)))
    assert sides(pairs) == PAIRS
    assert [pair.origin for pair in pairs] == ["pairs.json[0]", "pairs.json[1]"]


def test_csv_counts_physical_lines_and_reads_an_empty_prompt_as_none(tmp_path):
    text = 'prompt,positive,negative\n,"Love\nyou","Hate, really"\n\nI feel, good,""\n'
    pairs = load(tmp_path, "pairs.csv", text)
    assert sides(pairs) == [("Love\nyou", "Hate, really", None), (" good", "", "I feel")]
    assert [pair.origin for pair in pairs] == ["pairs.csv:2", "pairs.csv:5"]


def test_paths_are_relative_to_the_base_folder(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "p.jsonl").write_text(json.dumps(ROWS[0]))
    pairs = load_pairs("data/p.jsonl", base_folder=tmp_path, where="here")
    assert pairs[0].origin == "data/p.jsonl:1"


@pytest.mark.parametrize(
    ("name", "content", "where", "message"),
    [
        ("p.jsonl", "", "p.jsonl", "no rows"),
        ("p.jsonl", "\n \n", "p.jsonl", "no rows"),
        ("p.json", "", "p.json", "no rows"),
        ("p.json", "[]", "p.json", "no rows"),
        ("p.csv", "positive,negative\n", "p.csv", "no rows"),
        ("p.json", '[\n{"positive": "a",\n "negative" "b"}]', "p.json:3", "broken JSON at column 13"),
        ("p.json", '{"positive": "a"}', "p.json", "a list of objects"),
        ("p.json", '"text"', "p.json", "a list of objects"),
        ("p.json", '{"data": [], "pairs": []}', "p.json", "a list of objects"),
        ("p.json", "[" * 100_000, "p.json", "cannot be read"),
        ("p.json", "[" + "1" * 5_000 + "]", "p.json", ""),
        ("p.jsonl", '{"positive": "a", "negative": "b"}\n{"positive": ', "p.jsonl:2", "broken JSON"),
        ("p.jsonl", '["a", "b"]', "p.jsonl:1", "an object of keys and values"),
        ("p.jsonl", "[" * 100_000, "p.jsonl:1", ""),
        ("p.jsonl", b'{"positive": "a"}\n\n\xff\xfe', "p.jsonl:3", "not UTF-8"),
        ("p.csv", 'positive,negative\na,b\n"a,b\n', "p.csv:3", ""),
        ("p.csv", "positive,negative\na,b,c\n", "p.csv:2", "3 columns, the header has 2"),
        ("p.csv", "positive,positive\na,b\n", "p.csv:1", "same name"),
        ("p.yaml", "- a", "recipe.yaml: vectors.0.pairs", ".json, .jsonl, .ndjson, .csv"),
    ],
)
def test_refusals_name_the_place(tmp_path, name, content, where, message):
    problem = refusal(tmp_path, name, content).problems[0]
    assert problem.where == where
    assert message in problem.message


def test_a_missing_file_names_recipe_key_path_and_remedy(tmp_path):
    with pytest.raises(InputError) as caught:
        load_pairs("no/such.jsonl", base_folder=tmp_path, where="recipe.yaml: vectors.0.pairs")
    problem = caught.value.problems[0]
    assert problem.where == "recipe.yaml: vectors.0.pairs"
    assert problem.found == str(tmp_path / "no/such.jsonl")
    assert "relative to the recipe" in (problem.remedy or "")


@pytest.mark.parametrize("source", ["folder.jsonl", "~nobody-has-this-name/p.jsonl", "a\0b.jsonl", "file.csv/p.jsonl"])
def test_impossible_paths_are_refused(tmp_path, source):
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "file.csv").touch()
    with pytest.raises(InputError):
        load_pairs(source, base_folder=tmp_path, where="here")


def test_all_bad_rows_are_named_up_to_ten(tmp_path):
    good, bad = json.dumps(ROWS[0]), json.dumps({"positive": "a", "negative": 3})
    error = refusal(tmp_path, "p.jsonl", "\n".join([good, *[bad] * 3, "{"]))
    assert [problem.where for problem in error.problems] == ["p.jsonl:5", "p.jsonl:2", "p.jsonl:3", "p.jsonl:4"]
    error = refusal(tmp_path, "p.jsonl", "\n".join([good, *[bad] * 25]))
    assert len(error.problems) == 11
    assert error.problems[-1].message == "and 15 more like these"


TEXTS = st.text(max_size=40)
VALUES = st.one_of(TEXTS, st.none(), st.integers(), st.floats(), st.lists(TEXTS, max_size=2))
KEYS = st.one_of(
    st.sampled_from(
        ["positive", "negative", "prompt", "question", "answer_matching_behavior", "answer_not_matching_behavior"]
    ),
    TEXTS,
)
DOCUMENTS = st.one_of(VALUES, st.lists(st.dictionaries(KEYS, VALUES, max_size=5), max_size=4))


def pairs_or_refusal(folder: Path, name: str, content: bytes) -> list[ContrastPair]:
    try:
        pairs = load(folder, name, content)
    except InputError as error:
        assert str(error)
        assert len(error.problems) <= 11
        return []
    assert pairs
    return pairs


HERE = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@HERE
@given(
    content=st.one_of(st.binary(max_size=200), st.text(max_size=200).map(lambda text: text.encode("utf-8", "ignore")))
)
@pytest.mark.parametrize("name", ["p.json", "p.jsonl", "p.csv"])
def test_arbitrary_content_is_read_or_refused(tmp_path, name, content):
    pairs_or_refusal(tmp_path, name, content)


@HERE
@given(document=DOCUMENTS)
@pytest.mark.parametrize("ascii_only", [True, False])
def test_arbitrary_json_is_read_or_refused(tmp_path, document, ascii_only):
    text = json.dumps(document, ensure_ascii=ascii_only)
    pairs_or_refusal(tmp_path, "p.json", text.encode("utf-8", "surrogatepass"))
    items = document if isinstance(document, list) else [document]
    lines = "\n".join(json.dumps(item, ensure_ascii=ascii_only) for item in items)
    pairs_or_refusal(tmp_path, "p.jsonl", lines.encode("utf-8", "surrogatepass"))


@HERE
@given(table=st.lists(st.lists(st.one_of(KEYS, TEXTS), min_size=1, max_size=4), max_size=4))
def test_arbitrary_csv_is_read_or_refused(tmp_path, table):
    text = io.StringIO()
    csv.writer(text).writerows([["positive", "negative"], *table])
    pairs_or_refusal(tmp_path, "p.csv", text.getvalue().encode("utf-8", "ignore"))


PAIR_ROWS = st.lists(
    st.fixed_dictionaries({"positive": TEXTS, "negative": TEXTS}, optional={"prompt": TEXTS, "statement": VALUES}),
    min_size=1,
    max_size=5,
)


@HERE
@given(rows=PAIR_ROWS)
def test_every_text_survives_json_and_json_lines(tmp_path, rows):
    wanted = [(row["positive"], row["negative"], row.get("prompt") or None) for row in rows]
    text = json.dumps(rows, ensure_ascii=False)
    assert sides(load(tmp_path, "p.json", text)) == wanted
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    assert sides(load(tmp_path, "p.jsonl", lines)) == wanted


@HERE
@given(rows=st.lists(st.tuples(TEXTS, TEXTS, TEXTS), min_size=1, max_size=5))
def test_every_text_survives_csv(tmp_path, rows):
    # The csv module of Python 3.10 refuses NUL; both ways are covered by the tests above.
    rows = [tuple(cell.replace("\0", "") for cell in row) for row in rows]
    text = io.StringIO()
    csv.writer(text, quoting=csv.QUOTE_ALL).writerows([("positive", "negative", "prompt"), *rows])
    wanted = [(positive, negative, prompt or None) for positive, negative, prompt in rows]
    assert sides(load(tmp_path, "p.csv", text.getvalue())) == wanted
