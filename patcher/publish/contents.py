"""What of a patched folder is published: which files, in which form, and whether the folder may be at all."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from patcher.checkpoint.steering_files import CARD, GENERATIONS, MANIFEST, PICTURES, VECTORS, numbered
from patcher.disk.links import require_inside
from patcher.errors import InputError, OutsideError
from patcher.errors.hub import holds_token
from patcher.patched.schema import Manifest, Verification
from patcher.publish.privacy import sanitised_config, sanitised_manifest, sanitised_text

_LEGAL = ("LICEN[CS]E*", "Licen[cs]e*", "COPYING*", "NOTICE*", "USE_POLICY*")
_BELONGS = (
    *("*.safetensors", "*.json", "*.jinja", "*.model", "*.tiktoken", "*.bpe", "*.txt", "*.py", CARD),
    *("additional_chat_templates/*.jinja", GENERATIONS, numbered(GENERATIONS, "*"), PICTURES, *_LEGAL),
)
# Weights in other formats would be preferred by some stacks, and run unsteered.
_NEVER = ("consolidated*", "*.bin.index.json", "*.partial*")
_TEXT = (".json", ".jsonl", ".jinja", ".md", ".txt", ".py")
# What loaders look for by name. Left over from an earlier commit, any of it could take the place of a new file.
_READ_BY_LOADERS = (
    *("*.safetensors", "*.safetensors.index.json", "pytorch_model*", "tf_model*", "flax_model*", "consolidated*"),
    *("adapter_*", "config.json", "generation_config.json", "processor_config.json"),
    *("preprocessor_config.json", "video_preprocessor_config.json"),
    *("tokenizer*", "tekken.json", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt"),
    *("spiece*", "chat_template*", "additional_chat_templates/*"),
    # No loader's, but responses that another vector was made of, or its pictures, would pass for this one's.
    *(GENERATIONS, PICTURES),
)


@dataclass(frozen=True)
class OnHub:
    """The content of a file that is only on the Hub: the server copies it, or it cannot be published."""

    size: int
    sha256: str


@dataclass(frozen=True)
class PublishedFile:
    """One file as it is sent: from the disk, from memory where it had to be cleaned, or not at all."""

    name: str
    content: Path | bytes | OnHub

    @property
    def size(self) -> int:
        if isinstance(self.content, OnHub):
            return self.content.size
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size

    @property
    def here(self) -> bool:
        return not isinstance(self.content, OnHub)

    def read(self) -> bytes:
        if isinstance(self.content, OnHub):
            raise ValueError(f"{self.name} is not here")
        return self.content if isinstance(self.content, bytes) else self.content.read_bytes()


def check_verified(manifest: Manifest, folder: Path, *, remote: bool = False) -> None:
    """Refuse a folder whose steering was not shown to work.

    Args:
        remote: its weights are on the Hub, so that what could be checked without them is enough.

    Raises:
        InputError: a stack failed, or stock transformers was not checked in full.
    """
    enough = ("passed", "truncated", "structural") if remote else ("passed",)
    bad = [entry for entry in manifest.verification if _stands_in_the_way(entry, enough)]
    if not bad and any(entry.stack == "transformers" for entry in manifest.verification):
        return
    found = ", ".join(f"{entry.stack}: {entry.status}" for entry in bad) or "no check in transformers"
    raise InputError(
        "the steering of this folder was not verified, so it is not published",
        where=f"{folder / MANIFEST}: verification",
        found=found,
        remedy=f"patch-model verify {folder}",
        code="not_verified",
    )


def published_files(folder: Path, manifest: Manifest, on_hub: Mapping[str, OnHub] | None = None) -> list[PublishedFile]:
    """The files to publish, sorted by name; local paths and tokens are taken out of copies in memory.

    Args:
        on_hub: the files that belong to the folder but are only on the Hub, by name.

    Raises:
        InputError: the folder is not complete, a file is a link out of it, or a text file holds what is a Hub token.
        OutsideError: a file cannot be read.
    """
    try:
        names = sorted(
            path.relative_to(folder).as_posix()
            for pattern in ("*", "additional_chat_templates/*")
            for path in folder.glob(pattern)
            if path.is_file()
        )
        files = [PublishedFile(name, folder / name) for name in names if _belongs(name)]
        for file in files:
            require_inside(folder / file.name, folder)
        elsewhere = [PublishedFile(name, content) for name, content in (on_hub or {}).items()]
        _check_complete(folder, {file.name for file in (*files, *elsewhere)})
        found = [*(_cleaned(file, manifest) for file in files), *elsewhere]
        return sorted(found, key=lambda file: file.name)
    except OSError as error:
        raise OutsideError("the folder cannot be read", where=str(folder), found=error, code="disk") from None


def left_over(in_repository: list[str], published: list[str]) -> list[str]:
    """Files of the repository that loaders read and that this folder does not have; they must go in the same commit.

    An old ``model.safetensors`` beside a new index, for one, silently wins over it.
    """
    return sorted(name for name in set(in_repository) - set(published) if _matches(name, _READ_BY_LOADERS))


def _stands_in_the_way(entry: Verification, enough: Sequence[str]) -> bool:
    if entry.stack == "transformers":
        return entry.status not in enough or entry.passed is False
    # The other stacks may stay unchecked.
    return entry.status == "failed" or (entry.status == "passed" and entry.passed is False)


def _belongs(name: str) -> bool:
    hidden = any(part.startswith(".") for part in name.split("/"))
    return not hidden and _matches(name, _BELONGS) and not _matches(name, _NEVER)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    # fnmatch lets * cross a slash, which would reach into sub-folders.
    return any(pattern.count("/") == name.count("/") and fnmatchcase(name, pattern) for pattern in patterns)


def _check_complete(folder: Path, names: set[str]) -> None:
    wanted = {"config.json", VECTORS}
    for index in (name for name in names if name.endswith(".safetensors.index.json")):
        try:
            wanted |= {str(name) for name in json.loads((folder / index).read_bytes())["weight_map"].values()}
        except (ValueError, RecursionError, KeyError, AttributeError, TypeError):
            raise InputError("the index of the weights is damaged", where=str(folder / index)) from None
    missing = sorted(wanted - names)
    if not any(name.endswith(".safetensors") and name != VECTORS for name in names):
        missing.append("*.safetensors (the weights)")
    if missing:
        raise InputError(
            "the folder is not complete",
            where=str(folder),
            found="missing: " + ", ".join(missing),
            remedy="build it again",
        )


def _cleaned(file: PublishedFile, manifest: Manifest) -> PublishedFile:
    if not file.name.endswith(_TEXT) and not _matches(file.name, _LEGAL):
        return file
    raw = file.read()
    text = raw.decode("utf-8", errors="replace")
    cleaned = text
    if file.name == MANIFEST:
        cleaned = json.dumps(sanitised_manifest(manifest.as_json()), indent=2, ensure_ascii=False) + "\n"
    elif file.name == GENERATIONS:
        # Not splitlines(): JSON strings may hold U+2028 and its like as they are.
        cleaned = "\n".join(_cleaned_record(line) for line in text.split("\n"))
    elif file.name.endswith(".json"):
        cleaned = sanitised_config(text)
    elif file.name == CARD:
        cleaned = sanitised_text(text) if not holds_token(text) else text
    if holds_token(cleaned):
        raise InputError(
            "this file holds a Hub token, so nothing is published",
            where=file.name,
            remedy="remove the token from the file, and revoke it in your Hub settings if it was ever shared",
            code="token_in_file",
        )
    # Half a surrogate pair has no UTF-8, but an escape, which is what stood there in JSON.
    return file if cleaned == text else PublishedFile(file.name, cleaned.encode("utf-8", errors="backslashreplace"))


def _cleaned_record(line: str) -> str:
    """A line of JSON with its texts cleaned; what the model and its user wrote stays prose."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return sanitised_text(line)
    if not isinstance(record, dict):
        return sanitised_text(line)
    texts = {key: sanitised_text(value) for key, value in record.items() if isinstance(value, str)}
    cleaned = {**record, **texts}
    return line if cleaned == record else json.dumps(cleaned, ensure_ascii=False)
