"""Files of the format safetensors, written and read piece by piece: no tensor need fit into memory."""

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
    """The type and the shape of a tensor, as a header tells them."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """In bytes."""
        dtype = next(torch_type for torch_type, name in NAMES.items() if name == self.dtype)
        return math.prod(self.shape) * dtype.itemsize


def spec_of(tensor: Tensor) -> TensorSpec:
    return TensorSpec(NAMES[tensor.dtype], tuple(tensor.shape))


def header(kinds: Mapping[str, TensorSpec], facts: Mapping[str, str], size: int = 0) -> bytes:
    """What a file begins with whose tensors follow in this order; filled up to the size that is asked for."""
    told: dict[str, Any] = {"__metadata__": dict(sorted(facts.items()))} if facts else {}
    offset = 0
    for name, kind in kinds.items():
        told[name] = {"dtype": kind.dtype, "shape": kind.shape, "data_offsets": [offset, offset + kind.size]}
        offset += kind.size
    text = json.dumps(told, separators=(",", ":"), ensure_ascii=False).encode()
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
    """Writes them; those of the largest numbers come first, so that each begins where such a number may."""
    ordered = dict(sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0])))
    with path.open("wb") as file:
        file.write(header({name: spec_of(tensor) for name, tensor in ordered.items()}, facts))
        for tensor in ordered.values():
            file.writelines(pieces(tensor))


def checksum(facts: Mapping[str, str], tensors: Mapping[str, tuple[TensorSpec, int]]) -> str:
    """Over facts, names, types, shapes and the CRCs of the bytes: a damaged header shows as well as a damaged body."""
    told = [
        sorted(facts.items()),
        sorted((name, kind.dtype, *kind.shape, crc) for name, (kind, crc) in tensors.items()),
    ]
    return f"{zlib.crc32(json.dumps(told).encode()):08x}"


def crc_of(tensor: Tensor) -> int:
    value = 0
    for piece in pieces(tensor):
        value = zlib.crc32(piece, value)
    return value


def checksum_of_file(path: Path, facts: Mapping[str, str]) -> str:
    """The same of a file with these facts, read once from its beginning to its end."""
    with path.open("rb") as file:
        try:
            told = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            told.pop("__metadata__", None)
            begins = file.tell()
            kinds = {name: TensorSpec(of["dtype"], tuple(of["shape"])) for name, of in told.items()}
            starts = {name: begins + int(of["data_offsets"][0]) for name, of in told.items()}
            return checksum(facts, {name: (kind, _crc(file, starts[name], kind.size)) for name, kind in kinds.items()})
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, StopIteration) as error:
            raise SafetensorError(f"damaged header ({error})") from None


def _crc(file: BinaryIO, start: int, size: int) -> int:
    file.seek(start)
    value = 0
    while size and (piece := file.read(min(size, PIECE))):
        value, size = zlib.crc32(piece, value), size - len(piece)
    return value


def all_finite(tensor: Tensor) -> bool:
    """Without a copy of the whole."""
    return all(bool(part.isfinite().all()) for part in _parts(tensor))
