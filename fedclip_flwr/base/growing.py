"""A store entry that grows batch by batch, and resumes after an interruption.

The features are written where the finished file has them, after space for its header and labels. A journal beside it
gets a line for each complete batch: its labels, the names of its broken images, and the CRC of its features so far.
"""

from __future__ import annotations

import contextlib
import json
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedclip_flwr.base import files, tensorfile
from fedclip_flwr.base.tensorfile import TensorSpec

FORMAT = 1
HEADER = 2**14
NAMED = 5
"""The most broken images that are named."""
LONGEST = 200
"""The most characters of a name that are kept."""


def encoded_count(path: Path) -> int:
    """How many images of an unfinished entry are encoded. Does not disturb the process that writes it."""
    count = 0
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError), _beside(path, "journal").open() as lines:
        next(lines, None)  # the header of the journal
        for line in lines:
            batch = json.loads(line)
            count += len(batch["labels"]) + len(batch["broken"])
    return count


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(f".{path.name}.{ending}")


class Growing:
    """An unfinished entry with the images encoded so far; only one process may have it open."""

    def __init__(self, path: Path, count: int) -> None:
        """`count` is the number of images in the finished entry, broken ones included."""
        self.rows = self.broken = 0
        self.labels: list[int] = []
        self._names: list[str] = []
        self._path, self._crc = path, 0
        self._spec: TensorSpec | None = None
        self._start = HEADER + 8 * count  # of the features
        self._head: dict[str, Any] = {"format": FORMAT, "count": count}
        self._part, self._journal = _beside(path, "part"), _beside(path, "journal")
        with files.writing_to(path.parent):
            for file in (self._part, self._journal):
                file.touch()
            self._features = self._part.open("r+b")
            self._lines = self._journal.open("r+b")
            self._resume()

    def __enter__(self) -> Growing:
        return self

    def __exit__(self, *error: object) -> None:
        for file in (self._features, self._lines):
            with contextlib.suppress(OSError):  # it was already raised on writing
                file.close()

    def _resume(self) -> None:
        """Moves to the end of the complete batches, and cuts off the rest."""
        complete = 0
        self._features.seek(self._start)
        first = self._lines.readline()
        with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError, StopIteration):
            head = json.loads(first)
            spec = TensorSpec(head.pop("dtype"), tuple(head.pop("shape")))
            if head == self._head and spec.size >= 0:
                self._spec, complete = spec, len(first)
                while line := self._line():
                    complete += line
        self._lines.seek(complete)
        self._lines.truncate()
        self._features.seek(self._start + len(self.labels) * self._row_size)
        self._features.truncate()

    def _line(self) -> int:
        """The length of the journal's next line if its batch is intact, else 0."""
        line = self._lines.readline()
        if not line.endswith(b"\n"):
            return 0
        batch = json.loads(line)
        crc, labels = self._crc, [int(label) for label in batch["labels"]]
        remaining = len(labels) * self._row_size
        while remaining and (piece := self._features.read(min(remaining, tensorfile.PIECE))):
            crc, remaining = zlib.crc32(piece, crc), remaining - len(piece)
        if remaining or crc != batch["crc"]:
            return 0
        self._count(labels, [str(name) for name in batch["broken"]], crc)
        return len(line)

    @property
    def _row_size(self) -> int:
        return self._spec.size if self._spec else 0

    def _count(self, labels: Sequence[int], broken: Sequence[str], crc: int) -> None:
        self.labels += labels
        self.broken += len(broken)
        self.rows = len(self.labels) + self.broken
        self._names = [*self._names, *broken][:NAMED]
        self._crc = crc

    def append(self, features: Tensor, labels: Sequence[int], broken: Sequence[str]) -> None:
        """Adds a batch: a row of features for each label, and the names of images that can't be read."""
        spec = TensorSpec(tensorfile.NAMES[features.dtype], tuple(features.shape[1:]))
        names = [name.encode("utf-8", "replace").decode()[:LONGEST] for name in broken]
        with files.writing_to(self._path.parent):
            if self._spec is None:
                self._spec = spec
                self._write_line({**self._head, "dtype": spec.dtype, "shape": spec.shape})
            if spec != self._spec:
                raise ValueError(f"a batch of {spec} cannot follow one of {self._spec}")
            crc = self._crc
            for piece in tensorfile.pieces(features):
                crc = zlib.crc32(piece, crc)
                self._features.write(piece)
            self._features.flush()
            self._write_line({"labels": list(labels), "broken": names, "crc": crc})
        self._count(labels, names, crc)

    def _write_line(self, record: dict[str, Any]) -> None:
        self._lines.write(json.dumps(record, separators=(",", ":")).encode() + b"\n")
        self._lines.flush()

    def finish(self) -> None:
        """Completes the file and moves it into the entry's place."""
        if self._spec is None:
            raise ValueError("nothing was ever appended")
        labels = torch.tensor(self.labels, dtype=torch.int64)
        specs = {
            "labels": tensorfile.spec_of(labels),
            "image_features": TensorSpec(self._spec.dtype, (len(labels), *self._spec.shape)),
        }
        crcs = {"labels": tensorfile.crc_of(labels), "image_features": self._crc}
        facts = {"broken": str(self.broken), "names": ", ".join(self._names)}
        facts["checksum"] = tensorfile.checksum(facts, {name: (spec, crcs[name]) for name, spec in specs.items()})
        with files.writing_to(self._path.parent):
            self._features.seek(0)
            self._features.write(tensorfile.header(specs, facts, self._start - 8 * len(labels)))
            self._features.writelines(tensorfile.pieces(labels))
            self._features.flush()
            os.fsync(self._features.fileno())
            self._part.replace(self._path)
            self._journal.unlink()
