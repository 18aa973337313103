"""A tokenizer's files travel unchanged, but which class reads them may follow from ``model_type``.

``AutoTokenizer`` overrides what tokenizer_config.json says for some model types, and some of its classes build their
own pre-tokenizer instead of the one in tokenizer.json. So a changed model type can change ids.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from patcher.architectures.model_class import quiet_transformers
from patcher.disk.findings import Findings

AS_STORED = "PreTrainedTokenizerFast"
"""The ``tokenizer_class`` that takes tokenizer.json as it is, in every release of transformers."""

_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "*.model", "*.tiktoken", "tekken.json")

_TEXTS = (
    "The film was wonderful, and the food was terrible.",
    " leading space",
    "two  spaces,   three\ttab",
    "",
    "line\nline\n\n  indented\r\nend ",
    "It's 1234567 or 3.14159; I'D SAY won't",
    "naïve café — “quotes” … Straße",
    "日本語のテキスト 中文 한국어",
    "Привет, мир! العربية שלום",
    "🙂👍🏽 e\u0301 \u00a0 \u200b",
    "def f(x):\n    return x**2  # done",
    "HTTPServer2 camelCase snake_case http://a.b/c?d=e&f",
    "<s>[INST] hi [/INST]</s> x",
    "\u2581 underscore \u2581\u2581",
)


def tokenizer_changes(base: Path, config: Mapping[str, Any]) -> dict[str, str] | None:
    """What tokenizer_config.json must say for the base's tokenizer to give the same ids beside another config.json.

    Args:
        base: a checkpoint folder.
        config: the other config.json.

    Returns:
        The keys to change: none where the ids are the same anyway, or the base has no tokenizer that loads. None where
        no change was found that keeps the ids.
    """
    files = [[name, hashlib.sha256((base / name).read_bytes()).hexdigest()] for name in _read_beside(base)]
    subject = ["tokenizer", files, dict(config)]
    return Findings(subject).once("changes", dict[str, str] | None, lambda: _changes(base, config))


def _changes(base: Path, config: Mapping[str, Any]) -> dict[str, str] | None:
    with quiet_transformers():
        before = _loaded(base)
        if before is None:
            return {}
        wanted = _seen(before)
        own_class = type(before).__name__
        # Older releases do not know the class that newer ones load a tokenizer.json with.
        names = [AS_STORED] if own_class == "TokenizersBackend" else [own_class, AS_STORED]
        for changes in ({}, *({"tokenizer_class": name} for name in names)):
            after = _beside(base, config, changes)
            if after is not None and _seen(after) == wanted:
                return changes
    return None


def _beside(base: Path, config: Mapping[str, Any], changes: Mapping[str, str]) -> Any:
    """The base's tokenizer as it loads from a folder with ``config`` and a changed tokenizer_config.json."""
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch)
        for name in _read_beside(base):
            (copy / name).symlink_to((base / name).resolve())
        _replace(copy / "config.json", config)
        if changes:
            stated = base / "tokenizer_config.json"
            before = json.loads(stated.read_text(encoding="utf-8")) if stated.is_file() else {}
            _replace(copy / "tokenizer_config.json", {**before, **changes})
        return _loaded(copy)


def _read_beside(base: Path) -> list[str]:
    """The small files that a tokenizer may be read from."""
    wanted = (".json", ".model", ".txt", ".tiktoken", ".jinja")
    names = (file.name for file in base.iterdir() if file.is_file() and file.suffix in wanted)
    return sorted(name for name in names if not name.endswith(".index.json"))


def _replace(file: Path, content: Mapping[str, Any]) -> None:
    file.unlink(missing_ok=True)
    file.write_text(json.dumps(dict(content)), encoding="utf-8")


def _loaded(folder: Path) -> Any:
    from transformers import AutoTokenizer

    # Some classes make an empty tokenizer of no files at all.
    if not any(found for pattern in _VOCABULARIES for found in folder.glob(pattern)):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception:
        # Tokenizers fail in their own ways; verification says later what a folder's tokenizer cannot do.
        return None


def _seen(tokenizer: Any) -> list[Any]:
    special = [token for token in tokenizer.all_special_tokens if isinstance(token, str)]
    # Special tokens in mid-text: a prefix space is put after them by some classes and not by others.
    texts = [*_TEXTS, *(f"before{token}after {token} x" for token in special[:8])]
    ids = [tokenizer(text)["input_ids"] for text in texts]
    return [ids, [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts], special, len(tokenizer)]
