"""An entry of the store in the making: it grows by a batch at a time, and whoever is interrupted goes on there.

The features are written where the finished file has them, behind room for its header and labels. A journal beside it
gets a line for each batch that is whole: its labels, the names of its broken images, and the CRC of its features.
"""

from __future__ import annotations

import contextlib
import json
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from fedclip_flwr.base import files, tensorfile
from fedclip_flwr.base.tensorfile import TensorSpec

FORMAT = 1
HEADER = 2**14
NAMED = 5
"""So many broken images are named."""
LONGEST = 200
"""So many characters of a name are kept."""


def so_far(path: Path) -> int:
    """How many images of an entry in the making are encoded; whoever is at work on it is not disturbed."""
    count = 0
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError), _beside(path, "journal").open() as lines:
        next(lines, None)  # what the entry is about
        for line in lines:
            batch = json.loads(line)
            count += len(batch["labels"]) + len(batch["broken"])
    return count


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(f".{path.name}.{ending}")


class Growing:
    """The images of an entry that are encoded so far; only one process may have it open."""

    def __init__(self, path: Path, count: int) -> None:
        """`count` is the number of images there will be, broken ones included."""
        self.rows = self.broken = 0
        self.labels: list[int] = []
        self._names: list[str] = []
        self._path, self._crc = path, 0
        self._kind: TensorSpec | None = None
        self._start = HEADER + 8 * count  # of the features
        self._about: dict[str, Any] = {"format": FORMAT, "count": count}
        self._part, self._journal = _beside(path, "part"), _beside(path, "journal")
        with files.writing_to(path.parent):
            for file in (self._part, self._journal):
                file.touch()
            self._features = self._part.open("r+b")
            self._lines = self._journal.open("r+b")
            self._take_up()

    def __enter__(self) -> Growing:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in (self._features, self._lines):
            with contextlib.suppress(OSError):  # it was told of when it was written to
                file.close()

    def _take_up(self) -> None:
        """Goes to the end of what is whole, and cuts off the rest."""
        whole = 0
        self._features.seek(self._start)
        first = self._lines.readline()
        with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError, StopIteration):
            about = json.loads(first)
            kind = TensorSpec(about.pop("dtype"), tuple(about.pop("shape")))
            if about == self._about and kind.size >= 0:
                self._kind, whole = kind, len(first)
                while line := self._line():
                    whole += line
        self._lines.seek(whole)
        self._lines.truncate()
        self._features.seek(self._start + len(self.labels) * self._row_size)
        self._features.truncate()

    def _line(self) -> int:
        """The length of the journal's next line, if its batch is there as it was written; else 0."""
        line = self._lines.readline()
        if not line.endswith(b"\n"):
            return 0
        batch = json.loads(line)
        crc, labels = self._crc, [int(label) for label in batch["labels"]]
        left = len(labels) * self._row_size
        while left and (piece := self._features.read(min(left, tensorfile.PIECE))):
            crc, left = zlib.crc32(piece, crc), left - len(piece)
        if left or crc != batch["crc"]:
            return 0
        self._count(labels, [str(name) for name in batch["broken"]], crc)
        return len(line)

    @property
    def _row_size(self) -> int:
        return self._kind.size if self._kind else 0

    def _count(self, labels: Sequence[int], broken: Sequence[str], crc: int) -> None:
        self.labels += labels
        self.broken += len(broken)
        self.rows = len(self.labels) + self.broken
        self._names = [*self._names, *broken][:NAMED]
        self._crc = crc

    def append(self, features: Tensor, labels: Sequence[int], broken: Sequence[str]) -> None:
        """Keeps a batch: a row of features for each label, and the names of the images that can't be read."""
        kind = TensorSpec(tensorfile.NAMES[features.dtype], tuple(features.shape[1:]))
        names = [name.encode("utf-8", "replace").decode()[:LONGEST] for name in broken]
        with files.writing_to(self._path.parent):
            if self._kind is None:
                self._kind = kind
                self._write_line({**self._about, "dtype": kind.dtype, "shape": kind.shape})
            if kind != self._kind:
                raise ValueError(f"a batch of {kind} cannot follow one of {self._kind}")
            crc = self._crc
            for piece in tensorfile.pieces(features):
                crc = zlib.crc32(piece, crc)
                self._features.write(piece)
            self._features.flush()
            self._write_line({"labels": list(labels), "broken": names, "crc": crc})
        self._count(labels, names, crc)

    def _write_line(self, told: dict[str, Any]) -> None:
        self._lines.write(json.dumps(told, separators=(",", ":")).encode() + b"\n")
        self._lines.flush()

    def finish(self) -> None:
        """Makes it the entry."""
        if self._kind is None:
            raise ValueError("nothing was ever appended")
        labels = torch.tensor(self.labels, dtype=torch.int64)
        kinds = {
            "labels": tensorfile.spec_of(labels),
            "image_features": TensorSpec(self._kind.dtype, (len(labels), *self._kind.shape)),
        }
        crcs = {"labels": tensorfile.crc_of(labels), "image_features": self._crc}
        facts = {"broken": str(self.broken), "names": ", ".join(self._names)}
        facts["checksum"] = tensorfile.checksum(facts, {name: (kind, crcs[name]) for name, kind in kinds.items()})
        with files.writing_to(self._path.parent):
            _begin(self._features, tensorfile.header(kinds, facts, self._start - 8 * len(labels)), labels)
            os.fsync(self._features.fileno())
            self._part.replace(self._path)
            self._journal.unlink()


def _begin(file: BinaryIO, header: bytes, labels: Tensor) -> None:
    """Writes what comes before the features."""
    file.seek(0)
    file.write(header)
    file.writelines(tensorfile.pieces(labels))
    file.flush()
