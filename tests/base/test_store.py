from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fedclip_flwr.base import content, store, tensorfile
from fedclip_flwr.base.tensors import State
from tests import forked
from tests.crowd import WAYS


@pytest.fixture
def entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stored tensor whose check has passed, which is remembered."""
    monkeypatch.setattr(store, "FRESH", -1.0)
    path = tmp_path / "a.safetensors"
    store.load_or_make(path, lambda: ({"a": torch.arange(3.0)}, {}))
    return path


def never() -> tuple[State, dict[str, str]]:
    pytest.fail("made again")


def test_a_file_that_was_found_intact_is_not_read_again(entry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorfile, "checksum_of_file", lambda *_: pytest.fail("read again"))
    assert store.load_or_make(entry, never)[0]["a"].tolist() == [0, 1, 2]


def test_the_lock_of_an_entry_says_when_it_was_used(entry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new time of the entry itself would cause a new check."""
    lock, before = Path(f"{entry}.lock"), entry.stat()
    monkeypatch.setattr(tensorfile, "checksum_of_file", lambda *_: pytest.fail("read again"))
    os.utime(lock, (before.st_mtime - 2 * content.DAY,) * 2)
    store.load_or_make(entry, never)
    assert lock.stat().st_mtime >= before.st_mtime
    assert entry.stat().st_mtime_ns == before.st_mtime_ns


def test_a_file_that_was_written_to_since_is_read_again(entry: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = entry.stat()
    with entry.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")
    os.utime(entry, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert store.load_or_make(entry, lambda: ({"a": torch.arange(4.0)}, {}))[0]["a"].tolist() == [0, 1, 2, 3]
    assert "corrupt and will be made again" in caplog.text


def test_what_is_not_found_or_fresh_is_not_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_text("x")
    looks: list[bool] = []

    def look(answer: bool) -> Callable[[], bool]:
        def found() -> bool:
            looks.append(answer)
            return answer

        return found

    monkeypatch.setattr(store, "FRESH", 3600.0)
    assert store.passes_once(tmp_path / "a", "good", look(True))
    monkeypatch.setattr(store, "FRESH", -1.0)
    assert not store.passes_once(tmp_path / "a", "good", look(False))
    assert store.passes_once(tmp_path / "a", "good", look(True))
    assert store.passes_once(tmp_path / "a", "good", look(False))
    assert not store.passes_once(tmp_path / "a", "better", look(False))
    assert looks == [True, False, True, False]


LARGE = """
import re, sys
from pathlib import Path
import torch
from fedclip_flwr.base import store
store.FRESH = -1.0
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024
def grow(growing):
    rows = torch.zeros(1024, 512)
    while growing.rows < 2**17:
        growing.append(rows + growing.rows, list(range(1024)), [])
path = Path(sys.argv[1])
torch.zeros(2**21).sum()
before = peak()
tensors, _ = store.load_or_grow(path, 2**17, grow)
rows = torch.arange(0, 2**17, 2**13)
assert tensors["image_features"][rows].sum(dim=1).tolist() == (512 * rows).tolist()
print(peak() - before, path.stat().st_size // 2**20)
"""


def test_entries_larger_than_memory_are_written_checked_and_read(tmp_path: Path) -> None:
    """The first process writes and checks 256 MiB, the second one reads a few rows of them."""
    for _ in range(2):
        done = forked.run(LARGE, str(tmp_path / "a.safetensors"))
        assert done.returncode == 0, done.stderr
        grown, size = map(int, done.stdout.split())
        assert size >= 256
        assert grown < 64


def crowded(folder: Path, way: str, rounds: int) -> int:
    """How many processes were killed while eight wanted the same entries; the process checks its own results."""
    command = [sys.executable, "-m", "tests.crowd", str(folder), way, str(rounds)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        killed, _ = process.communicate(timeout=60 + 30 * rounds)  # generous: only for a process that hangs
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0
    return int(killed)


@pytest.mark.parametrize("way", WAYS[:-1])
def test_eight_at_once_get_the_same_however_some_of_them_are_killed(tmp_path: Path, way: str) -> None:
    assert crowded(tmp_path, way, 1) >= 1


@pytest.mark.soak
@pytest.mark.parametrize("way", WAYS)
def test_eight_at_once_get_the_same_round_after_round(tmp_path: Path, way: str) -> None:
    assert crowded(tmp_path, way, 100) >= 1
