"""An adapter's tokenizer, chat template and generation config in the place of its base's.

Whoever trains an adapter saves its tokenizer beside it: with more tokens, another template, or just the base's again.
Whole tokenizers are not mixed: a vocabulary with its config drops every file of the base's. Files that only add to one
(a tokenizer_config.json alone) lie over the base's. A template has one owner, in whichever form it is stored: a file of
its own, or a key of tokenizer_config.json.
"""

from __future__ import annotations

import fnmatch
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from patcher.checkpoint.adapter_folder import WEIGHTS, AdapterFolder, Use
from patcher.checkpoint.copying import place_file, sha256_of
from patcher.checkpoint.folder import GENERATION, PROCESSOR_FILES, TEMPLATE_FILES, TEMPLATE_FOLDERS, TOKENIZER_FILES
from patcher.disk.json_files import read_json_object
from patcher.disk.links import require_inside

TOKENIZER_CONFIG = "tokenizer_config.json"
_ADDITIONS = (TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json", "emoji.json")
_KEY = "chat_template"


def offered(adapter: AdapterFolder) -> frozenset[Use]:
    """For what the adapter has side files at all.

    Raises:
        InputError: one of them is damaged.
    """
    folder = adapter.folder
    found: set[Use] = set()
    if _files(folder, TOKENIZER_FILES):
        found.add("tokenizer")
    if _KEY in _config_of(folder) or _templates(folder):
        found.add("template")
    if (folder / GENERATION).is_file():
        read_json_object(folder / GENERATION)
        found.add("generation")
    return frozenset(found)


def taken_files(adapter: AdapterFolder) -> dict[Path, Path]:
    """The adapter's files that are used: their names in the copy, and where they lie."""
    folder, names = adapter.folder, list[Path]()
    if "tokenizer" in adapter.uses:
        names += _files(folder, TOKENIZER_FILES)
    elif "template" in adapter.uses and _KEY in _config_of(folder):
        names.append(Path(TOKENIZER_CONFIG))
    if "template" in adapter.uses:
        names += _templates(folder)
    if "generation" in adapter.uses and (folder / GENERATION).is_file():
        names.append(Path(GENERATION))
    return {name: folder / name for name in names}


def place_side_files(base: Path, adapter: AdapterFolder, target: Path) -> None:
    """Make ``target``'s tokenizer, template and generation config those of the base with the adapter.

    Args:
        base: the base's folder.
        target: a folder, which may hold the base's side files already.

    Raises:
        InputError: a file is a link out of its folder, or a tokenizer_config.json is no JSON.
    """
    uses = adapter.uses & offered(adapter)
    chosen = {name: base / name for name in _files(base, TOKENIZER_FILES)}
    if "tokenizer" in uses:
        theirs = {name: adapter.folder / name for name in _files(adapter.folder, TOKENIZER_FILES)}
        chosen = theirs if _is_whole(list(theirs)) else {**chosen, **theirs}
    owner = adapter.folder if "template" in uses else base
    chosen |= {name: owner / name for name in _templates(owner)}
    if "generation" in uses:
        chosen[Path(GENERATION)] = adapter.folder / GENERATION
    for name in (*_files(target, TOKENIZER_FILES), *_templates(target), *(set(chosen) & {Path(GENERATION)})):
        (target / name).unlink(missing_ok=True)
    for name, path in chosen.items():
        require_inside(path, adapter.folder if path.is_relative_to(adapter.folder) else base)
        place_file(path, target / name)
    stated = _config_of(target)
    wanted = {key: value for key, value in stated.items() if key != _KEY}
    if _KEY in (of_owner := _config_of(owner)):
        wanted[_KEY] = of_owner[_KEY]
    if wanted != stated:
        (target / TOKENIZER_CONFIG).write_text(json.dumps(wanted, indent=2) + "\n", encoding="ascii")


@contextmanager
def tokenizer_folder(base: Path, adapter: AdapterFolder) -> Iterator[Path]:
    """A folder to load the tokenizer of the base with the adapter from, before there is a merged model."""
    with tempfile.TemporaryDirectory(prefix="patch-model-tokenizer-") as name:
        folder = Path(name)
        of_processor = [path for name in PROCESSOR_FILES if (path := base / name).is_file()]
        for path in of_processor:
            require_inside(path, base)
        for path in (base / "config.json", *of_processor, *base.glob("*.py")):
            place_file(path, folder / path.name)
        place_side_files(base, adapter, folder)
        yield folder


def adapter_record(adapter: AdapterFolder | None) -> dict[str, Any] | None:
    """What the manifest says of the adapter: its name, where it was found (publishing drops a path), its hashes."""
    if adapter is None:
        return None
    return {
        "name": Path(adapter.given).name,
        "given": adapter.given,
        "revision": adapter.revision,
        "sha256": sha256_of(adapter.folder / WEIGHTS),
        "uses": sorted(adapter.uses & offered(adapter)),
        "files": [
            {"name": name.as_posix(), "size": path.stat().st_size, "sha256": sha256_of(path)}
            for name, path in sorted(taken_files(adapter).items())
        ],
    }


def _is_whole(names: Sequence[Path]) -> bool:
    plain = {str(name) for name in names}
    return TOKENIZER_CONFIG in plain and bool(plain - {*_ADDITIONS})


def _files(folder: Path, patterns: Sequence[str]) -> list[Path]:
    return [
        Path(item.name)
        for item in sorted(folder.iterdir())
        if item.is_file() and any(fnmatch.fnmatchcase(item.name, pattern) for pattern in patterns)
    ]


def _templates(folder: Path) -> list[Path]:
    inside = [path for name in TEMPLATE_FOLDERS for path in sorted((folder / name).glob("*.jinja"))]
    return _files(folder, TEMPLATE_FILES) + [path.relative_to(folder) for path in inside if path.is_file()]


def _config_of(folder: Path) -> Mapping[str, Any]:
    path = folder / TOKENIZER_CONFIG
    return read_json_object(path) if path.is_file() else {}
