"""Images decoded and preprocessed ahead of the model, by worker processes if they are worth starting.

Workers are new Python processes. Nothing is forked (gRPC or Ray may run threads), and the main module is not run again
(it may be a script without a guard). Each worker takes every n-th batch, keeps one ready, and sends it over a socket,
so memory is bounded. A worker exits when its socket closes, however this process ended.
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
MIN_SECONDS = 20.0
"""Minimum seconds of preprocessing in one process that justify workers: each takes about 5 to start."""
MIN_RATIO = 0.25
"""Minimum ratio of preprocessing time to model time: below it, workers would only take cores from the model."""
MAX_WORKERS = 16
PIXELS = 2**26
"""Maximum pixels held decoded: beyond it images are preprocessed early, so that large ones fit into memory."""
SCRIPT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from fedclip_flwr.features import ahead; ahead.serve()"
)
DTYPES = {name: dtype for dtype, name in tensorfile.NAMES.items()}


class Batch(NamedTuple):
    """Some images of a domain as model inputs; `inputs` is empty if none of them is readable."""

    inputs: Inputs
    labels: list[int]
    broken: list[str]  # names of unreadable images

    @property
    def rows(self) -> int:
        return len(self.labels) + len(self.broken)


@dataclass(frozen=True)
class Work:
    """A domain's images, and how to preprocess them."""

    source: Source
    domain: str
    prepare: Preparer
    size: int  # images per batch

    def batch(self, start: int) -> Batch:
        """The batch that begins with image number `start`."""
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
    """The batches of the images in range(start, stop), in order.

    The first one is prepared in this process; its time here and in the caller decides the number of workers.
    `pinned`: allocate page-locked memory, for faster copies to a GPU.
    """
    if start >= stop:
        return
    remaining = range(start, stop, work.size)[1:]
    list(work.source.pictures(work.domain, start, start))  # exclude the source's one-time setup from the timing
    begun = time.perf_counter()
    batch = work.batch(start)
    prepared = time.perf_counter()
    yield batch
    if count := workers(prepared - begun, time.perf_counter() - prepared, len(remaining)):
        with _started(work, remaining, count) as sockets:
            yield from _received(work, remaining, sockets, pinned)
    else:
        yield from map(work.batch, remaining)


def workers(preparing: float, encoding: float, remaining: int) -> int:
    """The number of workers that keep up with the model, from the seconds per batch of either; 0 if not worth it."""
    if preparing * remaining < MIN_SECONDS or preparing < MIN_RATIO * encoding:
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(math.ceil(preparing / max(encoding, 1e-3)), cores, remaining, MAX_WORKERS)


@contextlib.contextmanager
def _started(work: Work, starts: Sequence[int], count: int) -> Iterator[list[socket.socket]]:
    """The sockets of running workers, which are killed on exit."""
    sockets: list[socket.socket] = []
    processes: list[subprocess.Popen[bytes]] = []
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-P", "-c", SCRIPT, json.dumps(sys.path)]
    try:
        for _ in range(count):
            ours, theirs = socket.socketpair()
            sockets.append(ours)
            with theirs:  # a separate process group: Ctrl-C is for this process only
                processes.append(
                    subprocess.Popen(
                        command, stdin=theirs.fileno(), env=env, stdout=DEVNULL, stderr=DEVNULL, process_group=0
                    )
                )
        for number, channel in enumerate(sockets):
            with contextlib.suppress(ConnectionError):  # _received notices
                _send(channel, pickle.dumps((work, starts[number::count])))
        yield sockets
    finally:
        for channel in sockets:
            channel.close()
        for process in processes:
            process.kill()
            process.wait()


def _received(work: Work, starts: Sequence[int], sockets: Sequence[socket.socket], pinned: bool) -> Iterator[Batch]:
    """The workers' batches in order; batches of failed workers are prepared here, so that errors surface."""
    failed: set[socket.socket] = set()
    for start, channel in zip(starts, cycle(sockets), strict=False):
        batch = None
        if channel not in failed:
            try:
                batch = _receive_batch(channel, pinned)
            except (ConnectionError, ValueError):
                failed.add(channel)
                log.warning("an image worker process exited; the main process prepares its images")
        yield batch or work.batch(start)


def serve() -> None:
    """Run a worker until the other side closes the socket, which is its standard input."""
    torch.set_num_threads(1)
    with socket.socket(fileno=os.dup(0)) as channel, contextlib.suppress(ConnectionError):
        work, starts = pickle.loads(_receive(channel))
        for start in starts:
            _send_batch(channel, work.batch(start))


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
            raise ConnectionError("connection closed")
        view = view[count:]


def _send_batch(channel: socket.socket, batch: Batch) -> None:
    specs = {name: tensorfile.spec_of(tensor) for name, tensor in batch.inputs.items()}
    _send(channel, json.dumps([specs, batch.labels, batch.broken]).encode())
    for tensor in batch.inputs.values():
        for piece in tensorfile.pieces(tensor):
            channel.sendall(piece)


def _receive_batch(channel: socket.socket, pinned: bool) -> Batch:
    specs, labels, broken = json.loads(_receive(channel))
    inputs: Inputs = {}
    for name, (dtype, shape) in specs.items():
        tensor: Tensor = torch.empty(shape, dtype=DTYPES[dtype], pin_memory=pinned)
        _fill(channel, tensorfile.bytes_of(tensor))
        inputs[name] = tensor
    return Batch(inputs, labels, broken)
