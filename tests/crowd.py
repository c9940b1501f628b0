"""Eight processes that want the same entries of the store at once, while some of them are killed; see test_store.py.

`python -m tests.crowd FOLDER WAY ROUNDS`: in each round four of them go ahead and kill themselves in the middle of
their work in that way (`random`: they are killed from outside, at any moment). Once the first one has come to that
point, three others go on, and one reads whatever is there. All that survive must have the same as one that was alone.
"""

from __future__ import annotations

import hashlib
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from fedclip_flwr.base import store, tensorfile
from fedclip_flwr.base.growing import Growing
from fedclip_flwr.base.tensors import State

COUNT, BATCH, WIDTH = 96, 8, 64
KEPT, GROWN = "kept.safetensors", "grown.safetensors"
FEATURES = torch.randn(COUNT, WIDTH, generator=torch.Generator().manual_seed(0))
WAYS = ("a batch", "half a batch", "half a line", "a finish", "a finished one", "half a file", "a whole file", "random")
VICTIMS, OTHERS = 4, 3


def work(folder: Path, before_batch: Callable[[Growing, int], None] = lambda *_: None) -> str:
    """Both entries, made or read; a hash of what they are here."""

    def grow(growing: Growing) -> None:
        for done, row in enumerate(range(growing.rows, COUNT, BATCH)):
            before_batch(growing, done)
            labels = list(range(row, row + BATCH - 1))
            growing.append(FEATURES[labels], labels, [f"image {row + BATCH - 1}"])

    kept = store.load_or_make(folder / KEPT, lambda: ({"features": FEATURES.clone()}, {}))
    return checksum(kept, store.load_or_grow(folder / GROWN, COUNT, grow))


def checksum(*entries: tuple[State, store.Facts]) -> str:
    whole = hashlib.sha256()
    for tensors, facts in entries:
        for name in sorted(tensors):
            whole.update(f"{name} {tensors[name].shape}".encode() + tensors[name].numpy().tobytes())
        whole.update(repr(sorted(facts.items())).encode())
    return whole.hexdigest()


def victim(folder: Path, way: str, signalled: int) -> NoReturn:
    """Kills itself in the middle of its work, unless that was done by others before."""

    def die(*_: Any, **__: Any) -> NoReturn:
        os.write(signalled, b"x")
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("alive")

    def half_a_file(tensors: Mapping[str, Tensor], path: Path, facts: Mapping[str, str]) -> None:
        save(tensors, path, facts)
        os.truncate(path, path.stat().st_size // 2)
        die()

    def before_batch(growing: Growing, done: int) -> None:
        if way == "half a batch":
            growing._features.write(b"half")
            growing._features.flush()
        elif way == "half a line":
            growing._lines.write(b'{"labels":[0,1')
            growing._lines.flush()
        if done == 2 and way in ("a batch", "half a batch", "half a line"):
            die()

    save = tensorfile.save
    if way == "half a file":
        tensorfile.save = half_a_file
    elif way == "a whole file":
        os.fsync = die  # which comes between writing a file and putting it in its place
    elif way == "a finish":
        store.load_or_make(folder / KEPT, lambda: ({"features": FEATURES.clone()}, {}))
        os.fsync = die
    elif way == "a finished one":
        store.load_or_make(folder / KEPT, lambda: ({"features": FEATURES.clone()}, {}))
        Path.unlink = die  # type: ignore[method-assign]
    if way == "random":
        os.write(signalled, b"x")
    work(folder, before_batch)
    os._exit(0)


def reader(folder: Path, expected: str) -> None:
    """Reads until both are there; what it finds is never half of one."""
    found: dict[str, tuple[State, store.Facts]] = {}
    while len(found) < 2:
        for name in (KEPT, GROWN):
            if entry := store.read(folder / name):
                found[name] = entry
        os.sched_yield()
    assert checksum(found[KEPT], found[GROWN]) == expected


def forked(do: Callable[[], object]) -> int:
    pid = os.fork()
    if not pid:
        code = 1
        try:
            do()
            code = 0
        finally:
            os._exit(code)
    return pid


def crowd(folder: Path, way: str, chance: random.Random) -> int:
    """One round; how many were killed."""
    alone, together = folder / "alone", folder / "together"
    expected = work(alone)
    signals, signalled = os.pipe()
    victims = [forked(lambda: victim(together, way, signalled)) for _ in range(VICTIMS)]
    os.read(signals, 1)

    def survive() -> None:
        assert work(together) == expected

    others = [forked(survive) for _ in range(OTHERS)] + [forked(lambda: reader(together, expected))]
    if way == "random":
        for pid in victims:
            time.sleep(chance.random() * 0.03)
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in [*victims, *others]]
    os.close(signals)
    os.close(signalled)
    assert codes[VICTIMS:] == [0] * (OTHERS + 1), codes
    assert set(codes[:VICTIMS]) <= {0, -signal.SIGKILL}, codes
    for name in (KEPT, GROWN):
        assert (together / name).read_bytes() == (alone / name).read_bytes()
    left = {path.name for path in together.iterdir() if path.suffix != ".lock"}
    assert left - {f".{GROWN}.journal"} == {KEPT, GROWN}, left
    return codes[:VICTIMS].count(-signal.SIGKILL)


def main(root: Path, way: str, rounds: int) -> None:
    store.FRESH = -1.0
    torch.set_num_threads(1)
    os.environ["FEDCLIP_HOME"] = str(root / "home")
    killed = sum(crowd(root / str(number), way, random.Random(number)) for number in range(rounds))
    print(killed)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
