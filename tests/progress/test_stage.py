"""What is said and how far it is: for callbacks, and for downloads of the Hub's client."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from patcher.checkpoint.hub_bytes import bar_class
from patcher.progress.stage import Stage, bytes_in, doing, warn


def test_a_callback_is_told_each_stage_once() -> None:
    said: list[str] = []
    with doing(said.append, "reading activations", 80, "prompts") as reading:
        for _ in range(80):
            reading.advance()
    warn(said.append, "note: everyone can load the copy")
    assert said == ["reading activations", "note: everyone can load the copy"]
    assert (reading.done, reading.total) == (80, 80)


def test_bytes_in_a_folder_that_is_filled(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a").write_bytes(b"12")
    (tmp_path / "b").write_bytes(b"345")
    (tmp_path / "gone").symlink_to("nowhere")
    assert bytes_in(tmp_path) == 5 + len("nowhere")
    assert bytes_in(tmp_path / "nowhere") == 0


def test_the_bytes_of_a_download_and_not_its_files() -> None:
    running = Stage()
    make = bar_class(running)
    files, wire, disk = make([1, 2], total=2, desc="Fetching"), make(total=0, unit="B"), make(total=0, unit="B")
    assert list(files) == [1, 2]
    files.update(1)
    assert running.total is None
    disk.total = 1000
    threads = [threading.Thread(target=disk.update, args=(100,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wire.update(300)
    assert (running.done, running.total) == (800, 1000)
    with disk:
        disk.update(500)
        disk.set_postfix_str("1 MB/s", refresh=False)
        disk.close()
    assert running.done == 1000, "never more than there is"


@pytest.mark.parametrize("place", ["huggingface_hub.utils.tqdm.hf_thread_map", "tqdm.contrib.concurrent.thread_map"])
def test_what_the_clients_of_the_hub_do_with_a_class_of_bars(place: str) -> None:
    """Newer ones have a function of their own, older ones take that of tqdm."""
    module, _, name = place.rpartition(".")
    thread_map = getattr(pytest.importorskip(module), name, None)
    if thread_map is None:
        pytest.skip(f"this client has no {name}")
    running = Stage()
    make = bar_class(running)
    bar = make(total=10, unit="B", initial=0)
    assert list(thread_map(bar.update, [1, 2], desc="y", max_workers=2, tqdm_class=make)) == [None] * 2
    assert (running.done, running.total) == (3, 10)
