"""What of the memory can be used: every file that limits it, faked."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path, PurePosixPath

import pytest
import torch
import transformers
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from patcher.capture import memory, model, opened
from patcher.capture.memory import (
    FOR_WEIGHTS,
    UNKNOWN,
    CgroupMount,
    address_space_left,
    available_memory,
    cgroup_left,
    cgroup_mounts,
    cgroup_paths,
    cgroup_places,
    meminfo_available,
    soft_limit,
    status_bytes,
)
from patcher.capture.model import load_causal_lm
from patcher.capture.opened import choose_mode
from patcher.errors import OutsideError

GIB = 1 << 30
V2_MOUNT = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate"
V1_MOUNT = "35 31 0:32 {root} /sys/fs/cgroup/memory rw,relatime shared:9 - cgroup cgroup rw,memory"
LIMITS = """\
Limit                     Soft Limit           Hard Limit           Units
Max cpu time              unlimited            unlimited            seconds
Max data size             {data:<20} unlimited            bytes
Max stack size            8388608              unlimited            bytes
Max address space         {space:<20} unlimited            bytes
"""


class Machine:
    """A root folder with the files of a machine that has 64 GiB free and no limits."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.write("proc/meminfo", f"MemTotal: 99999999 kB\nMemFree: 1 kB\nMemAvailable: {64 * GIB // 1024} kB\n")
        self.write("proc/self/status", "Name:\tpython\nVmSize:\t 1048576 kB\nVmData:\t 524288 kB\nThreads:\t4\n")
        self.limits()
        self.cgroup("0::/\n", V2_MOUNT)

    def write(self, path: str, text: object) -> None:
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_text(f"{text}\n")

    def limits(self, *, space: object = "unlimited", data: object = "unlimited") -> None:
        self.write("proc/self/limits", LIMITS.format(space=space, data=data))

    def cgroup(self, own: str, *mounts: str) -> None:
        self.write("proc/self/cgroup", own)
        self.write("proc/self/mountinfo", "\n".join(["22 1 8:1 / / rw - ext4 /dev/sda1 rw", *mounts]))

    def v2(self, path: str, *, limit: object, used: int, stat: str = "", high: object = "max") -> None:
        folder = f"sys/fs/cgroup/{path}"
        self.write(f"{folder}/memory.max", limit)
        self.write(f"{folder}/memory.high", high)
        self.write(f"{folder}/memory.current", used)
        self.write(f"{folder}/memory.stat", stat)

    def v1(self, path: str, *, limit: int, used: int, stat: str = "", hierarchy: int = 1) -> None:
        folder = f"sys/fs/cgroup/memory/{path}"
        self.write(f"{folder}/memory.limit_in_bytes", limit)
        self.write(f"{folder}/memory.usage_in_bytes", used)
        self.write(f"{folder}/memory.stat", stat)
        self.write(f"{folder}/memory.use_hierarchy", hierarchy)

    @property
    def available(self) -> int:
        return available_memory(self.root)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_without_limits_it_is_what_the_machine_has(machine: Machine) -> None:
    assert machine.available == 64 * GIB


def test_a_cgroup_of_version_2(machine: Machine) -> None:
    machine.cgroup("0::/user/job\n", V2_MOUNT)
    machine.v2("user/job", limit=4 * GIB, used=3 * GIB)
    assert machine.available == GIB
    stat = f"anon 5\ninactive_file {GIB // 2}\nactive_file {GIB // 4}\nslab_reclaimable 7\n"
    machine.v2("user/job", limit=4 * GIB, used=3 * GIB, stat=stat)
    assert machine.available == GIB + GIB // 2 + GIB // 4
    machine.v2("user/job", limit="max", used=3 * GIB)
    assert machine.available == 64 * GIB
    machine.v2("user/job", limit="max", used=3 * GIB, high=3 * GIB + 5)
    assert machine.available == 5
    machine.v2("user/job", limit=2 * GIB, used=3 * GIB)
    assert machine.available == 0


def test_a_parent_cgroup_limits_as_well(machine: Machine) -> None:
    machine.cgroup("0::/a/b/c\n", V2_MOUNT)
    machine.v2("a/b/c", limit="max", used=1)
    machine.v2("a/b", limit=3 * GIB, used=GIB)
    machine.v2("a", limit=10 * GIB, used=9 * GIB)
    assert machine.available == GIB
    machine.v2("a/b/c", limit=GIB, used=GIB - 7)
    assert machine.available == 7


def test_in_a_container_of_version_2_the_mount_is_the_containers(machine: Machine) -> None:
    machine.cgroup("0::/\n", V2_MOUNT)
    machine.v2(".", limit=2 * GIB, used=GIB)
    assert machine.available == GIB


@pytest.mark.parametrize("own", ["0::/../other\n", "0::/elsewhere/deep\n"])
def test_a_cgroup_that_the_mount_does_not_show(machine: Machine, own: str) -> None:
    machine.cgroup(own, V2_MOUNT.replace(" / /sys", " /inner /sys"))
    machine.v2(".", limit=2 * GIB, used=GIB)
    assert machine.available == GIB


def test_a_cgroup_of_version_1(machine: Machine) -> None:
    machine.cgroup("9:name=systemd:/x\n5:cpu,memory:/docker/abc\n0::/\n", V1_MOUNT.format(root="/"))
    machine.v1("docker/abc", limit=4 * GIB, used=3 * GIB, stat=f"inactive_file 9\ntotal_inactive_file {GIB}\n")
    assert machine.available == 2 * GIB
    machine.v1("docker", limit=8 * GIB, used=8 * GIB - 6)
    assert machine.available == 6
    machine.v1("docker", limit=8 * GIB, used=8 * GIB - 6, hierarchy=0)
    assert machine.available == 2 * GIB
    machine.v1("docker", limit=9223372036854771712, used=8 * GIB)
    assert machine.available == 2 * GIB


def test_in_a_container_of_version_1_the_mount_begins_below_the_root(machine: Machine) -> None:
    machine.cgroup("5:memory:/docker/abc\n", V1_MOUNT.format(root="/docker/abc"))
    machine.v1(".", limit=4 * GIB, used=3 * GIB)
    assert machine.available == GIB


def test_a_limit_of_the_address_space(machine: Machine) -> None:
    machine.limits(space=3 * GIB)
    assert machine.available == address_space_left(machine.root) == 2 * GIB
    machine.limits(space=3 * GIB, data=GIB)
    assert machine.available == address_space_left(machine.root) == GIB // 2
    machine.limits(space=GIB // 2)
    assert machine.available == 0
    machine.limits()
    assert address_space_left(machine.root) is None


def test_the_least_counts(machine: Machine) -> None:
    machine.cgroup("5:memory:/\n0::/job\n", V1_MOUNT.format(root="/"), V2_MOUNT.replace("/cgroup rw", "/cgroup/two rw"))
    machine.limits(space=11 * GIB)
    machine.v1(".", limit=9 * GIB, used=0)
    machine.v2("two/job", limit=8 * GIB, used=0)
    assert machine.available == 8 * GIB


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1000}, 2_048_000),
        ({"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1000, "SC_AVPHYS_PAGES": 10}, 40_960),
        ({"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": -1}, UNKNOWN),
        ({}, UNKNOWN),
    ],
)
def test_without_proc_the_pages_are_asked_for(tmp_path: Path, values: dict[str, int], expected: int) -> None:
    def sysconf(name: str) -> int:
        if name not in values:
            raise ValueError("unrecognized configuration name")
        return values[name]

    assert available_memory(tmp_path, sysconf) == expected


def test_without_anything_something_is_assumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(memory.os, "sysconf")
    assert available_memory(tmp_path) == UNKNOWN


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_this_machine() -> None:
    import resource

    here = available_memory()
    assert 0 < here <= int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    size = status_bytes(Path("/proc/self/status").read_text())["VmSize"]
    limit = size + (64 << 20)
    if hard != resource.RLIM_INFINITY and limit > hard:
        pytest.skip("the address space is limited already")
    try:
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
        left = address_space_left()
        seen = available_memory()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert left is not None and seen <= left <= 64 << 20


# --- the parsers, with any text --------------------------------------------------------------------------------------

WORDS = st.sampled_from(
    ["MemAvailable:", "VmSize:", "kB", "max", "0::/", "-", " - ", "memory", "Max address space", "unlimited", "\n", "/"]
)
TEXTS = st.lists(st.one_of(WORDS, st.text(max_size=8), st.integers().map(str)), max_size=30).map(" ".join)
PATHS = st.lists(st.text(st.characters(exclude_characters="/\n:\0"), min_size=1, max_size=6), max_size=4).map(
    lambda parts: "/" + "/".join(parts)
)


@given(TEXTS)
@example("MemAvailable: ٣ kB")
@example("MemAvailable: -5 kB")
@example(f"MemAvailable: {'9' * 5000} kB")
def test_no_text_breaks_a_parser(text: str) -> None:
    found = meminfo_available(text)
    assert found is None or found >= 0
    assert all(value >= 0 for value in status_bytes(text).values())
    limit = soft_limit(text, "Max address space")
    assert limit is None or limit >= 0
    paths = cgroup_paths(text)
    assert set(paths) <= {1, 2} and all(path.is_absolute() for path in paths.values())
    for mount in cgroup_mounts(text):
        assert mount.place.is_absolute()
        for path in paths.values():
            assert mount.place in cgroup_places(mount, path)


@given(st.dictionaries(st.from_regex(r"[A-Z][A-Za-z()_]{0,12}", fullmatch=True), st.integers(0, 1 << 50)))
def test_entries_in_kb_are_read_back(values: dict[str, int]) -> None:
    text = "".join(f"{name}:\t{value:>9} kB\n" for name, value in values.items()) + "HugePages_Total:  0\n"
    assert status_bytes(text) == {name: value * 1024 for name, value in values.items()}


@given(PATHS, st.integers(1, 99))
def test_the_cgroup_is_read_back(path: str, number: int) -> None:
    assert cgroup_paths(f"0::{path}\n") == {2: PurePosixPath(path)}
    assert cgroup_paths(f"{number}:cpu,memory:{path}\n") == {1: PurePosixPath(path)}
    assert cgroup_paths(f"{number}:cpu,memoryless:{path}\n") == {}


@given(
    st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=6), st.sampled_from([" ", "\t", "\\"])
)
def test_a_mount_point_with_odd_characters_is_read_back(name: str, odd: str) -> None:
    place = f"/mnt/{name.replace('/', '')}{odd}x"
    escaped = place.replace("\\", "\\134").replace(" ", "\\040").replace("\t", "\\011")
    line = f"30 23 0:26 / {escaped} rw - cgroup2 cgroup2 rw"
    assert cgroup_mounts(line) == [CgroupMount(2, PurePosixPath("/"), PurePosixPath(place))]


@given(st.lists(st.sampled_from("abc"), max_size=5), st.integers(0, 5))
def test_places_go_up_to_the_mount_and_no_further(parts: list[str], below: int) -> None:
    path = PurePosixPath("/", *parts)
    root = PurePosixPath("/", *parts[:below])
    places = cgroup_places(CgroupMount(2, root, PurePosixPath("/mnt")), path)
    assert places[0] == PurePosixPath("/mnt", *parts[below:]) and places[-1] == PurePosixPath("/mnt")
    assert all(upper == lower.parent for lower, upper in itertools.pairwise(places))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(limit=st.integers(0, 1 << 40), used=st.integers(0, 1 << 40), cache=st.integers(0, 1 << 41))
def test_a_cgroup_never_leaves_more_than_its_limit(tmp_path: Path, limit: int, used: int, cache: int) -> None:
    machine = Machine(tmp_path)
    machine.v2("x", limit=limit, used=used, stat=f"inactive_file {cache}\n")
    left = cgroup_left(tmp_path / "sys/fs/cgroup/x", 2)
    assert left is not None and 0 <= left <= limit
    assert left >= min(limit, limit - used)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(st.lists(TEXTS | st.binary(max_size=40).map(lambda data: data.decode("latin-1")), min_size=7, max_size=7))
def test_no_content_of_the_files_breaks_it(tmp_path: Path, texts: list[str]) -> None:
    machine = Machine(tmp_path)
    names = ["proc/meminfo", "proc/self/status", "proc/self/limits", "proc/self/cgroup", "sys/fs/cgroup/memory.max"]
    names += ["sys/fs/cgroup/memory.current", "sys/fs/cgroup/memory.stat"]
    for name, text in zip(names, texts, strict=True):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(text.encode("utf-8", "replace"))
    assert machine.available >= 0


def test_what_is_said_to_fit_in_memory_is_what_is_kept_for_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for module in (opened, model):
        assert module.FOR_WEIGHTS is FOR_WEIGHTS
        monkeypatch.setattr(module, "available_memory", lambda: 1000)
    asked: dict[str, object] = {}

    def loaded(_folder: Path, **options: object) -> None:
        asked.update(options)
        raise MemoryError

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", loaded)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(OutsideError, match="does not fit in memory"):
        load_causal_lm(tmp_path, dtype=torch.float32, device="cpu", offload=tmp_path)
    kept = asked["max_memory"]
    assert isinstance(kept, dict) and kept["cpu"] == 800
    modes = [choose_mode("auto", size=size, device="cpu", quantised=False, whole=None) for size in (800, 801)]
    assert modes == ["memory", "stream"]
