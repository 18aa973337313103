"""The capture cache: what it gives is what was put in, and anything else is nothing."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.tiny_models import tiny_checkpoint

from patcher.capture.cache import key as key_module
from patcher.capture.cache import store as cache_module
from patcher.capture.cache.store import (
    CaptureCache,
    CaptureKey,
    cache_limit,
    capture_cache,
    capture_key,
    model_identity,
)
from patcher.capture.residuals import Residuals
from patcher.checkpoint.folder import CheckpointFolder
from patcher.checkpoint.source import Source
from patcher.errors import InputError

COMMIT = "c" * 40
PROMPTS, HIDDEN = 5, 7


@dataclass(frozen=True)
class Prompt:
    ids: tuple[int, ...]
    read: tuple[int, ...]


SIDES = [Prompt((1, 2, 3), (2,)), Prompt((1, 9), (0, 1))]


def key(number: int = 0, layers: tuple[int, ...] = (-1, 3), prompts: int = PROMPTS) -> CaptureKey:
    return CaptureKey(f"{number:064x}", layers, prompts)


def residuals(wanted: CaptureKey, seed: int = 0) -> dict[int, Residuals]:
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for layer in wanted.layers:
        read = torch.randn(wanted.prompts, HIDDEN, generator=generator)
        sums = torch.rand(wanted.prompts, generator=generator, dtype=torch.float64) / 3
        found[layer] = Residuals(read, sums, torch.arange(wanted.prompts) + 1)
    return found


def same(left: Mapping[int, Residuals] | None, right: Mapping[int, Residuals]) -> bool:
    if left is None or set(left) != set(right):
        return False
    pairs = [
        (getattr(left[layer], field.name), getattr(right[layer], field.name))
        for layer in right
        for field in fields(Residuals)
    ]
    return all(one.dtype == other.dtype and torch.equal(one, other) for one, other in pairs)


@pytest.fixture
def cache(tmp_path: Path) -> CaptureCache:
    return CaptureCache(tmp_path / "cache" / "captures")


def files(cache: CaptureCache) -> list[str]:
    assert cache.folder is not None
    return sorted(item.name for item in cache.folder.iterdir()) if cache.folder.exists() else []


# --- what is kept ----------------------------------------------------------------------------------------------------


def test_what_is_put_in_comes_out_bit_for_bit(cache: CaptureCache) -> None:
    first, second = residuals(key(1)), residuals(key(2), seed=1)
    assert cache.get(key(1)) is None
    assert cache.put(key(1), first) is None and cache.put(key(2), second) is None
    assert same(cache.get(key(1)), first) and same(cache.get(key(2)), second)
    assert not same(cache.get(key(1)), second)
    assert cache.put(key(1), second) is None and same(cache.get(key(1)), second)
    found = cache.get(key(1))
    assert found is not None and found[3].mean_norm == second[3].mean_norm
    assert files(cache) == [f"{key(number).digest}.safetensors" for number in (1, 2)]
    assert cache.folder is not None
    assert stat.S_IMODE((cache.folder / files(cache)[0]).stat().st_mode) == 0o600
    assert stat.S_IMODE(cache.folder.stat().st_mode) == 0o700


def test_a_file_can_be_read_by_others(cache: CaptureCache) -> None:
    cache.put(key(1), residuals(key(1)))
    assert cache.folder is not None
    tensors = load_file(cache.folder / files(cache)[0])
    assert tensors["read.3"].shape == (PROMPTS, HIDDEN) and tensors["read.3"].dtype == torch.float32


@pytest.mark.parametrize("cache", [CaptureCache(None)])
def test_without_a_folder_there_is_no_cache(cache: CaptureCache) -> None:
    assert cache.put(key(), residuals(key())) is None and cache.get(key()) is None


def test_a_key_for_other_layers_or_prompts_finds_nothing(cache: CaptureCache) -> None:
    cache.put(key(1), residuals(key(1)))
    assert cache.get(replace(key(1), layers=(3,))) is None
    assert cache.get(replace(key(1), layers=(-1, 3, 4))) is None
    assert cache.get(replace(key(1), prompts=PROMPTS - 1)) is None


# --- what is damaged -------------------------------------------------------------------------------------------------


def kept_file(cache: CaptureCache) -> Path:
    cache.put(key(1), residuals(key(1)))
    assert cache.folder is not None
    return cache.folder / f"{key(1).digest}.safetensors"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=300)
@given(data=st.data())
def test_one_changed_byte_is_a_miss(cache: CaptureCache, data: st.DataObject) -> None:
    file = kept_file(cache)
    content = bytearray(file.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    file.write_bytes(content)
    found = cache.get(key(1))
    # Header bytes that change nothing (a blank for a blank) are the only ones that may be overlooked.
    assert found is None or same(found, residuals(key(1)))
    if place >= 8 + int.from_bytes(file.read_bytes()[:8], "little"):
        assert found is None


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=200)
@given(data=st.data())
def test_a_file_that_is_cut_or_grown_is_a_miss(cache: CaptureCache, data: st.DataObject) -> None:
    file = kept_file(cache)
    content = file.read_bytes()
    cut = data.draw(st.integers(0, len(content) - 1))
    more = data.draw(st.binary(min_size=0, max_size=40))
    file.write_bytes(content[:cut] + more if data.draw(st.booleans()) else content + b"\0" + more)
    found = cache.get(key(1))
    assert found is None or (content == file.read_bytes() and same(found, residuals(key(1))))


HEADERS = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.text(max_size=9)
    | st.sampled_from(["F32", "I64", "pt"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["__metadata__", "read.3", "dtype", "shape", "data_offsets", "key", "format", "checksum"]),
            inner,
        )
    ),
    max_leaves=20,
)


@pytest.mark.slow
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=300)
@given(header=HEADERS, body=st.binary(max_size=64), length=st.none() | st.integers(0, 2**64 - 1))
@example(header={"__metadata__": []}, body=b"", length=None)
@example(header="[" * 20, body=b"", length=None)
def test_a_hostile_file_is_a_miss(cache: CaptureCache, header: Any, body: bytes, length: int | None) -> None:
    file = kept_file(cache)
    text = json.dumps(header).encode()
    file.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + body)
    assert cache.get(key(1)) is None


def test_deeply_nested_json_is_a_miss(cache: CaptureCache) -> None:
    file = kept_file(cache)
    text = b"[" * 200_000
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    assert cache.get(key(1)) is None


def test_a_file_of_another_key_or_format_is_a_miss(cache: CaptureCache, monkeypatch: pytest.MonkeyPatch) -> None:
    file = kept_file(cache)
    other = file.with_name(f"{key(2).digest}.safetensors")
    shutil.copy(file, other)
    assert cache.get(key(2)) is None and cache.get(key(1)) is not None
    monkeypatch.setattr(cache_module, "FORMAT", "patch-model capture 2")
    assert cache.get(key(1)) is None


def test_a_consistent_file_with_other_tensors_is_a_miss(cache: CaptureCache) -> None:
    file = kept_file(cache)

    def forge(tensors: dict[str, torch.Tensor]) -> None:
        marks = {"format": cache_module.FORMAT, "key": key(1).digest, "checksum": cache_module._checksum(tensors)}
        save_file(tensors, file, marks)
        file.chmod(0o600)

    honest = load_file(file)
    forge(honest)
    assert same(cache.get(key(1)), residuals(key(1))), "the forgery itself is sound"
    for tensors in (
        {name: tensor for name, tensor in honest.items() if not name.endswith(".3")},
        {**honest, "read.4": honest["read.3"].clone()},
        {name: tensor[:-1].clone() for name, tensor in honest.items()},
        {**honest, "read.3": torch.tensor(1.0)},
    ):
        forge(tensors)
        assert cache.get(key(1)) is None


def test_what_is_no_plain_file_is_a_miss(cache: CaptureCache, tmp_path: Path) -> None:
    file = kept_file(cache)
    elsewhere = tmp_path / "elsewhere"
    shutil.move(file, elsewhere)
    file.symlink_to(elsewhere)
    assert cache.get(key(1)) is None
    file.unlink()
    file.mkdir()
    assert cache.get(key(1)) is None
    assert "not kept" in (cache.put(key(1), residuals(key(1))) or "")
    file.rmdir()
    os.mkfifo(file)
    assert cache.get(key(1)) is None, "a pipe would be waited for"


def test_a_file_that_others_may_have_written_is_a_miss(cache: CaptureCache, monkeypatch: pytest.MonkeyPatch) -> None:
    file = kept_file(cache)
    assert cache.get(key(1)) is not None
    file.chmod(0o666)
    assert cache.get(key(1)) is None
    file.chmod(0o644)
    assert cache.get(key(1)) is not None
    monkeypatch.setattr(cache_module.os, "geteuid", lambda: file.stat().st_uid + 1)
    assert cache.get(key(1)) is None


def test_a_file_beyond_the_limit_is_not_even_read(cache: CaptureCache) -> None:
    file = kept_file(cache)
    with file.open("r+b") as opened:
        opened.truncate(1 << 40)  # a hole: it takes no room
    assert cache.get(key(1)) is None


# --- disks -----------------------------------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_made_or_written_is_no_cache(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = CaptureCache(tmp_path / "file" / "captures")
    reason = cache.put(key(), residuals(key()))
    assert reason is not None and "not kept" in reason and str(tmp_path / "file") in reason
    assert cache.get(key()) is None


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder(cache: CaptureCache) -> None:
    kept_file(cache)
    assert cache.folder is not None
    cache.folder.chmod(0o500)
    try:
        assert "Permission" in (cache.put(key(2), residuals(key(2))) or "")
        assert same(cache.get(key(1)), residuals(key(1)))
    finally:
        cache.folder.chmod(0o700)


@contextmanager
def failing(monkeypatch: pytest.MonkeyPatch, name: str, error: BaseException) -> Iterator[None]:
    def fail(*_arguments: Any, **_options: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(Path, name, fail)
        yield


def test_a_full_disk_leaves_nothing_and_fails_nothing(cache: CaptureCache, monkeypatch: pytest.MonkeyPatch) -> None:
    kept_file(cache)

    class Full:
        def __init__(self, descriptor: int, _mode: str) -> None:
            self.descriptor = descriptor

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *_error: object) -> None:
            os.close(self.descriptor)

        def write(self, _content: bytes) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(cache_module.os, "fdopen", Full)
        assert "No space left" in (cache.put(key(2), residuals(key(2))) or "")
    with failing(monkeypatch, "replace", OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))):
        assert "quota" in (cache.put(key(2), residuals(key(2))) or "")
    with failing(monkeypatch, "replace", KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
        cache.put(key(2), residuals(key(2)))
    assert files(cache) == [f"{key(1).digest}.safetensors"]


def test_the_least_recently_used_go_first(cache: CaptureCache) -> None:
    one = kept_file(cache)
    cache.limit = 3 * one.stat().st_size + 100
    for number in (2, 3):
        cache.put(key(number), residuals(key(number)))
    assert cache.folder is not None
    for number in (1, 2, 3):
        os.utime(cache.folder / f"{key(number).digest}.safetensors", (number, number))
    (cache.folder / "notes.safetensors").write_bytes(bytes(10_000))
    (cache.folder / ".capture-x.partial").write_bytes(b"of a run that was killed")
    (cache.folder / ".capture-y.partial").write_bytes(b"of a run that still goes on")
    os.utime(cache.folder / ".capture-x.partial", (1, 1))
    assert cache.get(key(1)) is not None  # now it is the most recent
    cache.put(key(4), residuals(key(4)))
    kept = [f"{key(number).digest}.safetensors" for number in (1, 3, 4)]
    assert files(cache) == sorted([*kept, "notes.safetensors", ".capture-y.partial"])


def test_what_is_larger_than_the_cache_is_not_kept(cache: CaptureCache) -> None:
    kept_file(cache)
    cache.limit = 100
    assert "the cache may hold 100" in (cache.put(key(2), residuals(key(2))) or "")
    assert files(cache) == [f"{key(1).digest}.safetensors"]


def test_what_is_not_what_the_key_says_is_not_kept(cache: CaptureCache) -> None:
    for wrong in (residuals(key(1, layers=(3,))), residuals(key(1, prompts=3)), {}):
        assert "not kept" in (cache.put(key(1), wrong) or "")
    assert files(cache) == []


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (None, 2 << 30), ("", 2 << 30), ("0", 0), ("1000", 1000), ("500MB", 500_000_000), ("2GiB", 2 << 30),
        (" 3 kib ", 3072), ("1.5G", 1_500_000_000), ("1T", 10**12), ("7B", 7), ("0.5KiB", 512),
    ],
)  # fmt: skip
def test_the_limit(text: str | None, size: int) -> None:
    assert cache_limit(text) == size


@pytest.mark.parametrize("text", ["-1", "2 gigs", "GB", "1e9", "٣", "1,000", "9" * 40, "1.", "0x10"])
def test_a_limit_that_is_none(text: str) -> None:
    with pytest.raises(InputError, match="not a size"):
        cache_limit(text)


def test_where_the_users_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PATCH_MODEL_CACHE", "XDG_CACHE_HOME", "PATCH_MODEL_CACHE_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert capture_cache().folder == tmp_path / ".cache/patch-model/captures"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert capture_cache().folder == tmp_path / "xdg/patch-model/captures"
    monkeypatch.setenv("PATCH_MODEL_CACHE", str(tmp_path / "own"))
    assert capture_cache().folder == tmp_path / "own/captures"
    assert capture_cache(enabled=False).folder is None
    monkeypatch.setenv("PATCH_MODEL_CACHE_SIZE", "0")
    assert capture_cache().folder is None


# --- keys ------------------------------------------------------------------------------------------------------------


def make_key(**changes: Any) -> CaptureKey:
    given: dict[str, Any] = {
        "identity": {"hub": ["me/base", COMMIT]},
        "dtype": torch.float32,
        "device": "cpu",
        "attention": "sdpa",
        "blocks": "model.layers",
        "prompts": SIDES,
        "layers": [3, 1],
        "settings": {"mode": "memory", "tokens": 1024, "sharing": True},
    }
    return capture_key(**{**given, **changes})


def test_equal_captures_have_equal_keys() -> None:
    assert make_key() == make_key() == make_key(layers=[1, 3, 3])
    assert make_key(settings={"tokens": 1024, "sharing": True, "mode": "memory"}) == make_key()
    assert (make_key().layers, make_key().prompts) == ((1, 3), 2)
    assert len(make_key().digest) == 64


CHANGES: dict[str, Any] = {
    "identity": {"hub": ["me/base", "d" * 40]},
    "dtype": torch.bfloat16,
    "device": "cuda",
    "attention": "eager",
    "blocks": "transformer.h",
    "layers": [3, 2],
    "settings": {"mode": "stream", "tokens": 1024, "sharing": True},
}
OTHER_PROMPTS = [
    SIDES[::-1],
    [*SIDES, SIDES[0]],
    [SIDES[0], replace(SIDES[1], read=(1,))],
    [replace(SIDES[0], ids=(1, 2, 4)), SIDES[1]],
    [Prompt((1, 2, 3, 1), (2,)), Prompt((9,), (0, 1))],
]


def test_whatever_differs_has_another_key(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [make_key(), *(make_key(**{name: value}) for name, value in CHANGES.items())]
    keys += [make_key(prompts=prompts) for prompts in OTHER_PROMPTS]
    monkeypatch.setattr(key_module, "CAPTURE_VERSION", 999)
    keys.append(make_key())
    monkeypatch.setattr(key_module, "_code", lambda: "other sources")
    keys.append(make_key())
    monkeypatch.setattr(key_module, "_packages", lambda: {"torch": "9"})
    keys.append(make_key())
    monkeypatch.setattr(key_module, "_machine", lambda _device: {"threads": 99})
    keys.append(make_key())
    assert len({one.digest for one in keys}) == len(keys)


def test_threads_and_precision_are_in_the_key() -> None:
    before, threads = make_key(), torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert make_key() != before
    finally:
        torch.set_num_threads(threads)
    assert make_key() == before


@given(
    st.lists(st.tuples(st.lists(st.integers(0, 99), min_size=1, max_size=4), st.lists(st.integers(0, 3), max_size=3))),
    st.lists(st.tuples(st.lists(st.integers(0, 99), min_size=1, max_size=4), st.lists(st.integers(0, 3), max_size=3))),
)
def test_prompts_are_told_apart(first: Any, second: Any) -> None:
    one, other = ([Prompt(tuple(ids), tuple(read)) for ids, read in given] for given in (first, second))
    assert (make_key(prompts=one).digest == make_key(prompts=other).digest) is (one == other)


def test_settings_must_be_json() -> None:
    with pytest.raises((TypeError, ValueError)):
        make_key(settings={"a": object()})
    with pytest.raises(ValueError):
        make_key(settings={"a": float("nan")})


# --- which model it is -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "base"
    tiny_checkpoint(folder, "meta-llama--Llama-3.2-1B", sharded=True)
    return folder


@pytest.fixture
def local(made: Path, tmp_path: Path) -> Source:
    folder = Path(shutil.copytree(made, tmp_path / "base"))
    return Source("base", False, None, folder)


def change_a_weight(folder: Path) -> None:
    """In place: the same inode, the same size, the time of the last change put back."""
    shard = folder / CheckpointFolder(folder).weight_files[1]
    before = shard.stat()
    with shard.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\1\2\3\4")
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = shard.stat()
    assert (after.st_ino, after.st_size, after.st_mtime_ns) == (before.st_ino, before.st_size, before.st_mtime_ns)


def replace_a_weight(folder: Path) -> None:
    shard = folder / CheckpointFolder(folder).weight_files[1]
    copy = shard.with_name("copy")
    shutil.copy2(shard, copy)
    copy.replace(shard)


def edit_the_config(folder: Path) -> None:
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"rms_norm_eps": 1e-05', '"rms_norm_eps": 2e-05'))


@pytest.mark.parametrize("change", [change_a_weight, replace_a_weight, edit_the_config])
def test_a_local_file_that_changes_is_another_model(local: Source, change: Callable[[Path], None]) -> None:
    before = model_identity(local)
    assert before is not None and before == model_identity(local)
    time.sleep(0.02)  # the clock of the inodes ticks
    change(local.folder)
    after = model_identity(local)
    assert after is not None and after != before
    assert make_key(identity=before) != make_key(identity=after)


def test_another_folder_with_the_same_content_is_another_model(local: Source, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(local.folder, tmp_path / "copy"))
    assert model_identity(replace(local, folder=copy)) != model_identity(local)


def test_a_file_that_is_written_right_now_is_waited_for_or_not_known(
    local: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = local.folder / CheckpointFolder(local.folder).weight_files[0]
    shard.touch()
    changed = shard.stat().st_ctime_ns
    assert model_identity(local) is not None
    assert time.time_ns() - changed >= key_module._TICK_NS
    # Written again while it was waited for.
    shard.touch()
    monkeypatch.setattr(key_module.time, "sleep", lambda _seconds: shard.touch())
    monkeypatch.setattr(key_module, "_TICK_NS", 10**10)
    assert model_identity(local) is None
    # A clock that has been set back.
    monkeypatch.setattr(key_module.time, "time_ns", lambda: changed - 10**12)
    assert model_identity(local) is None


def test_a_hub_model_is_its_commit(local: Source) -> None:
    pinned = replace(local, name="me/base", hub=True, revision=COMMIT)
    before = model_identity(pinned)
    assert before is not None and before["hub"] == ["me/base", COMMIT] and before["files"] == []
    edit_the_config(local.folder)
    assert model_identity(pinned) == before
    assert model_identity(replace(pinned, revision="d" * 40)) != before
    branch = model_identity(replace(pinned, revision="main"))
    assert branch is not None and branch["hub"] is None and branch["files"]


def test_the_adapter_counts(local: Source, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    (adapter / "adapter_model.safetensors").write_bytes(b"weights")
    pinned = replace(local, name="me/base", hub=True, revision=COMMIT)
    before = model_identity(pinned, adapter)
    assert before is not None and before != model_identity(pinned) and len(before["files"]) == 2
    time.sleep(0.02)
    (adapter / "adapter_model.safetensors").write_bytes(b"WEIGHTS")
    assert model_identity(pinned, adapter) != before


def test_code_of_the_model_counts_where_it_is_run(local: Source) -> None:
    (local.folder / "modeling_own.py").write_text("one = 1\n")
    quiet, trusted = model_identity(local), model_identity(local, trust_remote_code=True)
    assert quiet is not None and trusted is not None and quiet != trusted
    time.sleep(0.02)
    (local.folder / "modeling_own.py").write_text("one = 2\n")
    assert model_identity(local) == quiet and model_identity(local, trust_remote_code=True) != trusted
    config = json.loads((local.folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "someone/else--modeling.Model"}
    (local.folder / "config.json").write_text(json.dumps(config))
    assert model_identity(local, trust_remote_code=True) is None, "nothing pins the code of another repository"


def test_a_shard_that_is_missing_is_not_known(local: Source) -> None:
    (local.folder / CheckpointFolder(local.folder).weight_files[0]).unlink()
    assert model_identity(local) is None
