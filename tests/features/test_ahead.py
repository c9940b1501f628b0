from __future__ import annotations

import dataclasses
import errno
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from PIL.Image import Image

from fedclip_flwr.base.errors import ReadError
from fedclip_flwr.data.base import Source
from fedclip_flwr.data.dataset import DataSet
from fedclip_flwr.data.drawn import Drawn
from fedclip_flwr.data.folder import ImageFolder
from fedclip_flwr.data.presets import Canonical, Preset
from fedclip_flwr.features import ahead, clip, models
from fedclip_flwr.features.clip import Clip
from tests.failing import failing
from tests.pixels import LARGE, PREPARER


@pytest.fixture
def broken(tree: Path) -> Path:
    for name in ("car/1", "car/2", "fish/3"):
        (tree / "photo" / f"{name}.png").write_bytes(b"no picture")
    return tree


Workers = list[subprocess.Popen[bytes]]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Workers:
    """The workers that a test starts; this process may have other children, such as another test's browser."""
    found: Workers = []

    class Kept(subprocess.Popen[bytes]):
        def __init__(self, *args: Any, **how: Any) -> None:
            super().__init__(*args, **how)
            found.append(self)

    monkeypatch.setattr(subprocess, "Popen", Kept)
    return found


def running(started: Workers) -> int:
    return sum(process.poll() is None for process in started)


def has_ended(pid: int) -> bool:
    """True if the process ends within a minute."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    return bool(select.select([handle], [], [], 60)[0])


def source_of(kind: str, tree: Path) -> Source:
    folder = ImageFolder(tree)
    if kind == "folder":
        return folder
    if kind == "drawn":
        return Drawn(5)
    if kind == "preset":
        return Canonical(folder, Preset("", {"photo": (), "cartoon": ()}, ("car", "cat", "fish")))
    rows = [(p.label, {"bytes": (tree / p.name).read_bytes(), "path": None}) for p in folder.pictures("photo")]
    features = datasets.Features({"label": datasets.Value("int64"), "image": datasets.Image()})
    table = datasets.Dataset.from_dict(dict(zip(("label", "image"), map(list, zip(*rows, strict=True)), strict=True)))
    table.cast(features).save_to_disk(tree.parent / "photo")
    return DataSet(tree.parent / "photo", "photo")


@pytest.mark.parametrize("kind", ["folder", "drawn", "preset", "data set"])
def test_some_rows_of_a_source_are_those_of_all(tree: Path, kind: str) -> None:
    source = source_of(kind, tree)
    assert list(source.pictures("photo", 3, 8)) == list(source.pictures("photo", 0, 12))[3:8]
    last = source.count("photo") - 2
    assert len(list(source.pictures("photo", last))) == 2


@pytest.mark.parametrize(
    "kind", ["folder", *(pytest.param(kind, marks=pytest.mark.soak) for kind in ("drawn", "preset")), "data set"]
)
def test_workers_bring_the_same_batches_in_the_same_order(
    broken: Path, kind: str, started: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = ahead.Work(source_of(kind, broken), "photo", PREPARER, 2)
    alone = list(ahead.batches(work, 0, 12))
    assert not started
    monkeypatch.setattr(ahead, "workers", lambda *_: 2)
    helped = []
    for batch in ahead.batches(work, 0, 12):
        helped.append(batch)
        assert len(started) == (2 if len(helped) > 1 else 0)
    assert running(started) == 0
    assert [batch[1:] for batch in helped] == [batch[1:] for batch in alone]
    assert sum(batch.rows for batch in helped) == 12
    for one, other in zip(helped, alone, strict=True):
        assert one.inputs.keys() == other.inputs.keys()
        assert all(torch.equal(one.inputs[name], other.inputs[name]) for name in one.inputs)
    assert sum(len(batch.broken) for batch in helped) == (0 if kind == "drawn" else 3)


@pytest.mark.parametrize("dtype", [pytest.param(torch.bfloat16, marks=pytest.mark.soak), torch.uint8])
def test_pixels_of_any_type_come_as_they_are(tree: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "workers", lambda *_: 1)
    work = ahead.Work(ImageFolder(tree), "photo", Clip(models.find("bundled")).preparer(dtype), 4)
    found = [batch.inputs["pixel_values"] for batch in ahead.batches(work, 0, 12)]
    for number, pixels in enumerate(found):
        assert pixels.dtype == dtype
        assert torch.equal(pixels, work.batch(4 * number).inputs["pixel_values"])


def test_what_a_killed_worker_owes_is_done_without_it(
    broken: Path,
    started: Workers,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    work = ahead.Work(ImageFolder(broken), "photo", PREPARER, 1)
    monkeypatch.setattr(ahead, "workers", lambda *_: 2)
    found = []
    for batch in ahead.batches(work, 0, 12):
        found.append(batch)
        if len(found) == 4:
            started[0].kill()
    assert [batch[1:] for batch in found] == [work.batch(row)[1:] for row in range(12)]
    assert all(batch.inputs.keys() == work.batch(row).inputs.keys() for row, batch in enumerate(found))
    assert caplog.text.count("the main process prepares its images") <= 1


def test_an_error_of_a_worker_is_the_callers_own(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that has raised is gone; what it was to bring is asked for here, and fails here too."""
    (tree / "photo" / "car" / "0.png").rename(tree / "photo" / "car" / "a.png")
    work = ahead.Work(ImageFolder(tree), "photo", PREPARER, 2)
    list(work.source.pictures("photo", 0, 0))
    failing(monkeypatch, "a.png", OSError(errno.EIO, "Input/output error"))
    ours, theirs = socket.socketpair()
    monkeypatch.setattr(os, "dup", lambda _: theirs.detach())
    with ours:
        ahead._send(ours, pickle.dumps((work, [0, 2])))
        with pytest.raises(ReadError):
            ahead.serve()
        with pytest.raises(ReadError, match=r"a.png can't be read now"):
            list(ahead._received(work, [0, 2], [ours], False))


def test_workers_end_once_nobody_asks(started: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "workers", lambda *_: 2)
    batches = ahead.batches(ahead.Work(Drawn(), "photo", LARGE, 4), 0, 400)
    next(batches)
    next(batches)
    assert running(started) == 2
    batches.close()
    assert running(started) == 0


SCRIPT = """
import signal
import sys
from pathlib import Path
print("begun", flush=True)
from fedclip_flwr.features import ahead
from fedclip_flwr.data.drawn import Drawn
from tests.pixels import LARGE
signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background inherits that it is ignored
ahead.workers = lambda *_: 2
work = ahead.Work(Drawn(), "photo", LARGE, 4)
for number, batch in enumerate(ahead.batches(work, 0, 400)):
    if number == 3:
        tasks = Path("/proc/self/task").iterdir()
        print(*(task.joinpath("children").read_text().strip() for task in tasks), flush=True)
        if sys.argv[1:]:
            sys.stdin.readline()
            break
"""


def script(folder: Path, *more: str) -> subprocess.Popen[str]:
    """A user's script without a guard for the main module."""
    (folder / "script.py").write_text(SCRIPT)
    command = [sys.executable, str(folder / "script.py"), *more]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=env, start_new_session=True, **pipes)


def test_a_script_without_a_guard_is_not_run_again_by_workers(tmp_path: Path) -> None:
    process = script(tmp_path)
    output, _ = process.communicate()
    first, second = output.splitlines()
    assert (process.returncode, first, len(second.split())) == (0, "begun", 2)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_a_process_that_is_killed(tmp_path: Path, how: signal.Signals) -> None:
    process = script(tmp_path, "wait")
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    pids = list(map(int, process.stdout.readline().split()))
    assert len(pids) == 2
    os.killpg(process.pid, how)  # Ctrl-C reaches the whole group
    process.wait()
    assert all(map(has_ended, pids))


def test_workers_are_started_where_they_pay() -> None:
    cores = len(os.sched_getaffinity(0))
    assert ahead.workers(preparing=0.1, encoding=1.0, remaining=100) == 0
    assert ahead.workers(preparing=1.0, encoding=2.0, remaining=100) == 1
    assert ahead.workers(preparing=1.0, encoding=9.0, remaining=100) == 0
    assert ahead.workers(preparing=1.0, encoding=0.0, remaining=10**6) == min(cores, ahead.MAX_WORKERS)
    assert ahead.workers(preparing=50.0, encoding=0.0, remaining=1) == 1
    assert ahead.workers(preparing=50.0, encoding=1.0, remaining=0) == 0


def test_a_range_without_images_has_no_batch(tree: Path) -> None:
    assert list(ahead.batches(ahead.Work(ImageFolder(tree), "photo", PREPARER, 4), 12, 12)) == []


def test_a_batch_of_large_images_is_prepared_in_parts(broken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And is the same: so many images of the largest size would not fit into memory at once."""
    work = ahead.Work(ImageFolder(broken), "photo", PREPARER, 7)
    whole = work.batch(0)
    held: list[int] = []

    def prepare(images: Sequence[Image]) -> clip.Inputs:
        held.append(len(images))
        return PREPARER(images)

    own: Any = prepare
    for pixels, most in ((1, 1), (2 * 64 * 64, 3)):
        monkeypatch.setattr(ahead, "PIXELS", pixels)
        parts = dataclasses.replace(work, prepare=own).batch(0)
        assert max(held) == most
        assert torch.equal(parts.inputs["pixel_values"], whole.inputs["pixel_values"])
        assert (parts.labels, parts.broken) == (whole.labels, whole.broken)
