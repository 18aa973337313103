"""What counts as a local path or a token, and what does not."""

from __future__ import annotations

import copy
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.publishing import manifest

from patcher.errors import InputError
from patcher.errors.hub import holds_token, without_tokens
from patcher.patched.schema import Manifest
from patcher.publish.privacy import publishable, sanitised_config, sanitised_manifest, sanitised_text

PATHS = {
    "model: /home/me/llama-7b  # mine": "model: llama-7b  # mine",
    "pairs: '/home/me/My Files/x.jsonl'": "pairs: 'My Files/x.jsonl'",
    "output: /data": "output: data",
    "  - /data": "  - data",
    r"file: C:\Users\me\v.pt and D:/data/w.pt": "file: v.pt and w.pt",
    r'"C:\\Users\\me\\v.pt"': '"v.pt"',
    r"\\server\share\v.bin": "v.bin",
    "~/x/y.pt, ~me/z.pt": "y.pt, z.pt",
    "see file:///home/me/a%20b.txt": "see a b.txt",
    "file:///C:/Users/me/x.txt": "x.txt",
    "(/usr/lib/x.so) path=/x/y path:/x/z": "(x.so) path=y path:z",
    r'"line\n/home/me/x"': r'"line\nx"',
    "/home/me/folder/": "folder",
}
KEPT = [
    "meta-llama/Llama-2-7b-chat-hf and/or 1/2 or 3 / 4",
    "./data/x.jsonl ../up/x data/pairs.jsonl",
    "https://huggingface.co/a/b/c hf://datasets/a/b http://127.0.0.1:8000/a/b",
    "</s> [/INST] <</SYS>> </think> <|/im|>",
    "s/a/b/ km/h n/a text/html",
    "/help and // comments",
    "model.layers.1.mlp.down_proj.bias original/h.5.mlp.c_proj.bias",
    "~5 % of 10:30",
]


@pytest.mark.parametrize("text", PATHS)
def test_absolute_paths_keep_their_last_component(text: str) -> None:
    assert sanitised_text(text) == PATHS[text]


@pytest.mark.parametrize("text", KEPT)
def test_what_is_no_absolute_path_stays(text: str) -> None:
    assert sanitised_text(text) == text


def test_tokens() -> None:
    real = "hf_" + "aBcD1234" * 4
    assert without_tokens(f"a {real}.") == "a hf_***."
    assert without_tokens(f"https://me:{real}@huggingface.co/x") == "https://me:hf_***@huggingface.co/x"
    assert without_tokens("hf_abcDEF1234") == "hf_***"
    assert without_tokens("hf_oauth_" + "eyJ0aBc." * 5) == "hf_***"
    assert without_tokens("api_org_" + "aBcD1234" * 4) == "hf_***"
    for name in ("hf_transfer", "hf_hub_download", "hf_checkpoints", "hf_", "hf_***"):
        assert without_tokens(name) == name and not holds_token(name)
    assert holds_token("x" + real) and not holds_token(without_tokens("x" + real))


def test_the_manifest() -> None:
    secret = "hf_" + "aBcD1234" * 4
    source = manifest(
        base={"model": "/srv/me/My Models/gpt2", "path": "/srv/me/My Models/gpt2", "files": [{"name": "a", "size": 1}]},
        recipe={
            "text": f"model: /srv/me/My Models/gpt2\npairs: ~/me/p.jsonl\ntoken: {secret}\n",
            "resolved": {
                "model": "/srv/me/My Models/gpt2",
                "output": "/data",
                "vectors": [{"pairs": [{"prompt": "/think What is 3/4 of 8?", "positive": "a", "negative": "/help"}]}],
            },
        },
        notes=["was at /srv/me/x.txt", "/help"],
        evaluation={"/srv/me/texts.txt": 1.0, "pairs": 24, "distinguishable": True, "base": None},
    )
    before = copy.deepcopy(source)
    clean = sanitised_manifest(source)
    assert source == before
    assert clean["base"] == {"model": "gpt2", "files": [{"name": "a", "size": 1}]}
    assert clean["recipe"]["text"] == "model: gpt2\npairs: p.jsonl\ntoken: hf_***\n"
    resolved = clean["recipe"]["resolved"]
    assert (resolved["model"], resolved["output"]) == ("gpt2", "data")
    assert resolved["vectors"] == before["recipe"]["resolved"]["vectors"], "what a model reads is not a path"
    assert clean["notes"] == ["was at x.txt", "/help"]
    assert clean["evaluation"] == {"texts.txt": 1.0, "pairs": 24, "distinguishable": True, "base": None}
    assert {key: clean[key] for key in ("edits", "route", "verification")} == {
        key: before[key] for key in ("edits", "route", "verification")
    }
    assert sanitised_manifest(clean) == clean


def test_a_manifest_without_a_base() -> None:
    assert sanitised_manifest({"base": None, "edits": []}) == {"base": None, "edits": []}


def test_configs_lose_only_the_paths_that_libraries_leave_in_them() -> None:
    text = '{"_name_or_path":   "/home/me/gpt2", "text_config": {"name_or_path": "C:\\\\me\\\\x"}, "vocab": ["/a/b"]}'
    assert json.loads(sanitised_config(text)) == {
        "_name_or_path": "gpt2",
        "text_config": {"name_or_path": "x"},
        "vocab": ["/a/b"],
    }
    for kept in ('{"_name_or_path":  "me/gpt2"}', '{"vocab":  ["/home/me/x"]}', "{", "[1,  2]"):
        assert sanitised_config(kept) == kept


PART = st.text("abcXYZ019_-.", min_size=1, max_size=8).filter(lambda part: part.strip(".-"))


@given(st.lists(PART, min_size=2, max_size=5), st.sampled_from(["/", "~/", "C:\\", "file:///"]), st.text(" ab:\n'\""))
def test_no_folder_of_a_path_survives(parts: list[str], root: str, around: str) -> None:
    separator = "\\" if root == "C:\\" else "/"
    folders = [f"QQ{part}" for part in parts[:-1]]
    path = root + separator.join([*folders, parts[-1]])
    clean = sanitised_manifest({"a": path, "b": f"{around} {path} {around}", "c": f"x: {path}\n"})
    assert "QQ" not in json.dumps(clean)


def test_keys_that_are_paths_and_hide_others_are_refused() -> None:
    """Once cut, `/x/y/edits` is called `edits`."""
    content = {**manifest(), "/x/y/edits": "none"}
    with pytest.raises(InputError, match="hide others"):
        publishable(Manifest.model_validate(content))
