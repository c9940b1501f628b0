"""Tensors that are made once and read from then on, also by several processes at once.

An entry is a safetensors file. It is written whole or not at all, checked on every read, and memory-mapped.
"""

from __future__ import annotations

import json
import logging
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fedclip_flwr import content
from fedclip_flwr.errors import UserError

log = logging.getLogger(__name__)
Tensors = dict[str, Tensor]
Facts = Mapping[str, str]


def kept(path: Path, make: Callable[[], tuple[Tensors, dict[str, str]]]) -> tuple[Tensors, Facts]:
    """The store's entry at `path`; made if it is missing or damaged, by one process while the others wait."""
    entry = _read(path)
    if entry:
        return entry
    lock = FileLock(f"{path}.lock")
    with content.writing_to(path.parent):
        try:
            lock.acquire(timeout=2)
        except Timeout:
            log.warning("waiting for another process that is encoding the same features")
            lock.acquire()
    try:
        entry = _read(path)
        if not entry:
            _write(path, *make())
            entry = _read(path)
    finally:
        lock.release()
    if not entry:
        raise UserError(
            f"features stored in {path} come back damaged: check the disk, or let FEDCLIP_HOME name another"
        )
    return entry


def _write(path: Path, tensors: Tensors, facts: dict[str, str]) -> None:
    """Called by one process at a time: what a killed one left half-written is removed."""
    for left in path.parent.glob(f".{path.name}.*"):
        left.unlink()
    facts = {**facts, "checksum": _checksum(tensors, facts)}
    content.write_whole(path, lambda part: content.save_tensors(tensors, part, facts))


def _read(path: Path) -> tuple[Tensors, Facts] | None:
    """The entry, if it is there and whole."""
    try:
        tensors, facts = mapped(path)
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError):
        tensors, facts = {}, {}
    claimed = facts.pop("checksum", None)
    if claimed and claimed == _checksum(tensors, facts):
        return tensors, facts
    log.warning("stored features are damaged and will be made again: %s", path)
    return None


def mapped(path: Path) -> tuple[Tensors, dict[str, str]]:
    """The file's tensors, memory-mapped, and its metadata."""
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118


def _checksum(tensors: Tensors, facts: Facts) -> str:
    """Over names, types, shapes and bytes: what a damaged header could change as well as what a damaged body could."""
    value = zlib.crc32(json.dumps(sorted(facts.items())).encode())
    for name, tensor in sorted(tensors.items()):
        value = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), value)
        value = zlib.crc32(tensor.contiguous().view(torch.uint8).numpy().data, value)
    return f"{value:08x}"
