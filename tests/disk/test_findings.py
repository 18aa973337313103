"""What was found is looked up by all that it depends on, and anything but that very finding is as good as none."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from patcher.disk import findings
from patcher.disk.findings import Findings, findings_folder, versions


@dataclass(frozen=True)
class Proof:
    holds: bool
    difference: float
    shapes: dict[str, tuple[int, ...]]


PROOF = Proof(True, float("inf"), {"a.weight": (2, 3)})


@pytest.fixture(autouse=True)
def kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("PATCH_MODEL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(Findings, "kept", True)
    yield
    versions.cache_clear()


def found(subject: object, key: object = "key", value: object = PROOF, kind: object = Proof) -> tuple[object, bool]:
    """What is found, and whether it was made anew."""
    made = []
    result = Findings(subject).once(key, kind, lambda: made.append(True) or value)
    return result, bool(made)


def files() -> list[Path]:
    return sorted(findings_folder().rglob("*.json"))


def test_a_finding_is_made_once_and_comes_back_the_same() -> None:
    assert found(["config"]) == (PROOF, True)
    assert found(["config"]) == (PROOF, False)
    assert found(["config"], "none", None, str | None) == (None, True)
    assert found(["config"], "none", "other", str | None) == (None, False)


def test_another_subject_key_or_version_is_another_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    found(["config"])
    assert found(["other"])[1] and found(["config"], "other")[1]
    real = findings.metadata.version
    monkeypatch.setattr(findings.metadata, "version", lambda name: "9.9" if name == "transformers" else real(name))
    versions.cache_clear()
    assert found(["config"])[1]
    monkeypatch.undo()


def test_other_sources_of_this_package_are_another_version(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = tmp_path / "probe.py"
    source.write_text("LIMIT = 1", encoding="utf-8")
    monkeypatch.setattr(findings, "_sources", lambda _package: iter([source]))
    versions.cache_clear()
    before = versions()
    source.write_text("LIMIT = 2", encoding="utf-8")
    versions.cache_clear()
    assert versions() != before


@pytest.mark.parametrize("damage", ["cut", "value", "key", "writable", "link", "folder"])
def test_what_is_damaged_or_not_ones_own_is_as_good_as_none(damage: str, tmp_path: Path) -> None:
    found(["config"])
    (path,) = files()
    content = json.loads(path.read_text(encoding="ascii"))
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-9])
    elif damage == "value":
        content["value"]["holds"] = False
        path.write_text(json.dumps(content), encoding="ascii")
    elif damage == "key":
        path.write_text(json.dumps({**content, "key": "0" * 64}), encoding="ascii")
    elif damage == "writable":
        path.chmod(0o666)
    elif damage == "link":
        path.replace(tmp_path / "elsewhere.json")
        path.symlink_to(tmp_path / "elsewhere.json")
    else:
        path.unlink()
        path.mkdir()
    assert found(["config"]) == (PROOF, True)


def test_nothing_is_kept_without_a_subject_or_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    assert found(None)[1] and found(None)[1]
    monkeypatch.setenv("PATCH_MODEL_CACHE_SIZE", "0")
    assert found(["config"])[1] and found(["config"])[1]
    assert files() == []


def test_a_folder_that_cannot_be_written_to_costs_time_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="ascii")
    monkeypatch.setenv("PATCH_MODEL_CACHE", str(tmp_path / "file"))
    assert found(["config"]) == (PROOF, True)
    assert found(["config"]) == (PROOF, True)


def test_an_error_is_not_kept() -> None:
    def fail() -> Proof:
        raise ValueError("no such class")

    for _again in range(2):
        with pytest.raises(ValueError, match="no such class"):
            Findings(["config"]).once("key", Proof, fail)
    assert files() == []


def test_what_other_versions_found_goes_after_a_month() -> None:
    old, recent = findings_folder() / "old", findings_folder() / "recent"
    for folder in (old, recent):
        (folder / "ab").mkdir(parents=True)
    long_ago = time.time() - 40 * 24 * 3600
    os.utime(old, (long_ago, long_ago))
    found(["config"])
    assert not old.exists() and recent.exists()
