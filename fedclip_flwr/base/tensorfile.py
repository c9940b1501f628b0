"""Files in the safetensors format, written and read piece by piece: no tensor has to fit into memory."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor

NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
PIECE = 2**20


class TensorSpec(NamedTuple):
    """The type and the shape of a tensor, as in a header."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """In bytes."""
        dtype = next(torch_type for torch_type, name in NAMES.items() if name == self.dtype)
        return math.prod(self.shape) * dtype.itemsize


def spec_of(tensor: Tensor) -> TensorSpec:
    return TensorSpec(NAMES[tensor.dtype], tuple(tensor.shape))


def header(specs: Mapping[str, TensorSpec], facts: Mapping[str, str], size: int = 0) -> bytes:
    """The start of a file whose tensors follow in this order, padded to at least `size` bytes."""
    entries: dict[str, Any] = {"__metadata__": dict(sorted(facts.items()))} if facts else {}
    offset = 0
    for name, spec in specs.items():
        entries[name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": [offset, offset + spec.size]}
        offset += spec.size
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    length = max(size, -(-(8 + len(text)) // 8) * 8) - 8  # tensors begin at a multiple of 8
    return length.to_bytes(8, "little") + text.ljust(length)


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    flat: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)


def pieces(tensor: Tensor) -> Iterator[memoryview]:
    """The tensor's bytes, some rows at a time."""
    for part in _parts(tensor):
        yield bytes_of(part.contiguous())


def _parts(tensor: Tensor) -> Sequence[Tensor]:
    rows = tensor if tensor.dim() else tensor.reshape(1)
    return torch.split(rows, max(1, PIECE * len(rows) // max(1, rows.numel() * rows.itemsize)))


def save(tensors: Mapping[str, Tensor], path: Path, facts: Mapping[str, str]) -> None:
    """Writes the tensors, those with the largest data types first, so that each is aligned to its type."""
    ordered = dict(sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0])))
    with path.open("wb") as file:
        file.write(header({name: spec_of(tensor) for name, tensor in ordered.items()}, facts))
        for tensor in ordered.values():
            file.writelines(pieces(tensor))


def checksum(facts: Mapping[str, str], tensors: Mapping[str, tuple[TensorSpec, int]]) -> str:
    """A checksum of facts, names, types, shapes and the CRCs of the bytes: it covers the header and the body."""
    covered = [
        sorted(facts.items()),
        sorted((name, spec.dtype, *spec.shape, crc) for name, (spec, crc) in tensors.items()),
    ]
    return f"{zlib.crc32(json.dumps(covered).encode()):08x}"


def with_checksum(facts: Mapping[str, str], tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The facts, and the `checksum` of them and of the tensors."""
    crcs = {name: (spec_of(tensor), crc_of(tensor)) for name, tensor in tensors.items()}
    return {**facts, "checksum": checksum(facts, crcs)}


def crc_of(tensor: Tensor) -> int:
    value = 0
    for piece in pieces(tensor):
        value = zlib.crc32(piece, value)
    return value


def checksum_of_file(path: Path, facts: Mapping[str, str]) -> str:
    """The `checksum` of a file with these facts, read once from start to end."""
    with path.open("rb") as file:
        try:
            entries = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            entries.pop("__metadata__", None)
            begins = file.tell()
            specs = {name: TensorSpec(of["dtype"], tuple(of["shape"])) for name, of in entries.items()}
            starts = {name: begins + int(of["data_offsets"][0]) for name, of in entries.items()}
            return checksum(facts, {name: (spec, _crc(file, starts[name], spec.size)) for name, spec in specs.items()})
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, StopIteration) as error:
            raise SafetensorError(f"damaged header ({error})") from None


def _crc(file: BinaryIO, start: int, size: int) -> int:
    file.seek(start)
    value = 0
    while size and (piece := file.read(min(size, PIECE))):
        value, size = zlib.crc32(piece, value), size - len(piece)
    return value


def all_finite(tensor: Tensor) -> bool:
    """True if the tensor holds no NaN and no infinity; makes no copy of all of it."""
    return all(bool(part.isfinite().all()) for part in _parts(tensor))
