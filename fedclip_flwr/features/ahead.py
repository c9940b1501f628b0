"""Images decoded and prepared ahead of the model, by worker processes where that pays.

Workers are plain new Python processes: nothing is forked (there may be threads of gRPC or Ray), and the main module is
not run again (it may be a script without a guard). Each takes every n-th batch and holds one that is ready, so memory
is bounded; a socket brings it here. A worker ends when its socket does, however this process ended.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import pickle
import socket
import subprocess
import sys
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from subprocess import DEVNULL
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fedclip_flwr.base import tensorfile
from fedclip_flwr.data import Source
from fedclip_flwr.features.clip import Inputs, Preparer

if TYPE_CHECKING:
    from PIL.Image import Image


log = logging.getLogger(__name__)
WORTH = 20.0
"""Seconds of preparing, in one process, from which on workers pay: each takes about 5 to start."""
SLOW = 0.25
"""Preparing has to take so much of the time that the model takes: else workers would only take cores from it."""
MOST = 16
PIXELS = 2**26
"""With so many, images are prepared before the next one is read: a batch of large ones would not fit into memory."""
SCRIPT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from fedclip_flwr.features import ahead; ahead.serve()"
)
DTYPES = {name: dtype for dtype, name in tensorfile.NAMES.items()}


class Batch(NamedTuple):
    """Some images of a domain, as the model takes them; `inputs` is empty if none of them can be read."""

    inputs: Inputs
    labels: list[int]
    broken: list[str]  # their names

    @property
    def rows(self) -> int:
        return len(self.labels) + len(self.broken)


@dataclass(frozen=True)
class Work:
    """Where a domain's images come from, and what is done with them."""

    source: Source
    domain: str
    prepare: Preparer
    size: int  # of a batch

    def batch(self, start: int) -> Batch:
        """The batch that begins with this image."""
        inputs: list[Inputs] = []
        images: list[Image] = []
        labels: list[int] = []
        broken: list[str] = []
        for name, label, image in self.source.pictures(self.domain, start, start + self.size):
            if image is None:
                broken.append(name)
                continue
            images.append(image)
            labels.append(label)
            if sum(image.width * image.height for image in images) > PIXELS:
                inputs.append(self.prepare(images))
                images.clear()
        if images:
            inputs.append(self.prepare(images))
        if len(inputs) < 2:
            return Batch(inputs[0] if inputs else {}, labels, broken)
        return Batch({name: torch.cat([part[name] for part in inputs]) for name in inputs[0]}, labels, broken)


def batches(work: Work, start: int, stop: int, *, pinned: bool = False) -> Generator[Batch]:
    """The batches of the images from `start` to before `stop`, in order.

    The first is prepared here; the time it takes, here and with whoever asked for it, tells how many workers pay.
    `pinned`: in memory from which a GPU copies faster.
    """
    if start >= stop:
        return
    left = range(start, stop, work.size)[1:]
    list(work.source.pictures(work.domain, start, start))  # what a source does once is not counted
    begun = time.perf_counter()
    batch = work.batch(start)
    prepared = time.perf_counter()
    yield batch
    if count := workers(prepared - begun, time.perf_counter() - prepared, len(left)):
        with _started(work, left, count) as sockets:
            yield from _received(work, left, sockets, pinned)
    else:
        yield from map(work.batch, left)


def workers(preparing: float, seeing: float, left: int) -> int:
    """How many keep up with the model, given the seconds that a batch takes to be prepared and to be seen."""
    if preparing * left < WORTH or preparing < SLOW * seeing:
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(math.ceil(preparing / max(seeing, 1e-3)), cores, left, MOST)


@contextlib.contextmanager
def _started(work: Work, starts: Sequence[int], count: int) -> Iterator[list[socket.socket]]:
    """Workers that have been told what to do; they are ended afterwards."""
    sockets: list[socket.socket] = []
    processes: list[subprocess.Popen[bytes]] = []
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-P", "-c", SCRIPT, json.dumps(sys.path)]
    try:
        for _ in range(count):
            ours, theirs = socket.socketpair()
            sockets.append(ours)
            with theirs:  # a process group of their own: Ctrl-C is for this process alone
                processes.append(
                    subprocess.Popen(
                        command, stdin=theirs.fileno(), env=env, stdout=DEVNULL, stderr=DEVNULL, process_group=0
                    )
                )
        for number, channel in enumerate(sockets):
            with contextlib.suppress(ConnectionError):  # _received finds out
                _send(channel, pickle.dumps((work, starts[number::count])))
        yield sockets
    finally:
        for channel in sockets:
            channel.close()
        for process in processes:
            process.kill()
            process.wait()


def _received(work: Work, starts: Sequence[int], sockets: Sequence[socket.socket], pinned: bool) -> Iterator[Batch]:
    """The workers' batches in turn; what a worker fails to bring is prepared here, where its error shows."""
    failed: set[socket.socket] = set()
    for start, channel in zip(starts, cycle(sockets), strict=False):
        batch = None
        if channel not in failed:
            try:
                batch = _receive_batch(channel, pinned)
            except (ConnectionError, ValueError):
                failed.add(channel)
                log.warning("a process that prepares images has ended; its part is done without it")
        yield batch or work.batch(start)


def serve() -> None:
    """What a worker does until nobody listens to it any more; its socket is its standard input."""
    torch.set_num_threads(1)
    channel = socket.socket(fileno=os.dup(0))
    with contextlib.suppress(ConnectionError):
        told, starts = pickle.loads(_receive(channel))
        for start in starts:
            _send_batch(channel, told.batch(start))


def _send(channel: socket.socket, data: bytes) -> None:
    channel.sendall(len(data).to_bytes(8, "little"))
    channel.sendall(data)


def _receive(channel: socket.socket) -> bytearray:
    length = bytearray(8)
    _fill(channel, memoryview(length))
    data = bytearray(int.from_bytes(length, "little"))
    _fill(channel, memoryview(data))
    return data


def _fill(channel: socket.socket, view: memoryview) -> None:
    while view:
        count = channel.recv_into(view)
        if not count:
            raise ConnectionError("the other side is gone")
        view = view[count:]


def _send_batch(channel: socket.socket, batch: Batch) -> None:
    kinds = {name: tensorfile.spec_of(tensor) for name, tensor in batch.inputs.items()}
    _send(channel, json.dumps([kinds, batch.labels, batch.broken]).encode())
    for tensor in batch.inputs.values():
        for piece in tensorfile.pieces(tensor):
            channel.sendall(piece)


def _receive_batch(channel: socket.socket, pinned: bool) -> Batch:
    kinds, labels, broken = json.loads(_receive(channel))
    inputs: Inputs = {}
    for name, (dtype, shape) in kinds.items():
        tensor: Tensor = torch.empty(shape, dtype=DTYPES[dtype], pin_memory=pinned)
        _fill(channel, tensorfile.bytes_of(tensor))
        inputs[name] = tensor
    return Batch(inputs, labels, broken)
