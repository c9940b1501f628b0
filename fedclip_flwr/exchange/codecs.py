"""Fewer bytes for what changes: how the difference between two adapters is packed to travel.

`bfloat16` keeps 8 bits of each number's mantissa. `int8` is an eighth of a byte more than a byte for each number: a
whole number from -127 to 127 and a factor for each row, rounded up or down by chance so that nothing is lost on
average. What rounding does lose is handed back, to go with the next difference (error feedback, arXiv 1901.09847).
`float32` packs nothing: whole tensors travel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fedclip_flwr.base.tensors import State


class Codec(NamedTuple):
    """Bytes from a tensor, and numbers from bytes of a tensor with such a shape."""

    pack: Callable[[Tensor, torch.Generator], list[Tensor]]
    unpack: Callable[[Tensor, torch.Size], Tensor]
    size: Callable[[torch.Size], int]


def _pack_bfloat16(tensor: Tensor, chance: torch.Generator) -> list[Tensor]:
    return [tensor.to(torch.bfloat16)]


def _unpack_bfloat16(packed: Tensor, shape: torch.Size) -> Tensor:
    return packed.clone().view(torch.bfloat16).float().view(shape)  # a clone is aligned


def _pack_int8(tensor: Tensor, chance: torch.Generator) -> list[Tensor]:
    rows = _rows(tensor)
    factors = rows.abs().amax(dim=1, keepdim=True) / 127
    numbers = rows / factors.clamp_min(torch.finfo(torch.float32).tiny)
    rounded = (numbers + torch.rand(rows.shape, generator=chance)).floor()
    return [factors, rounded.clamp(-127, 127).to(torch.int8)]  # after rounding: in float32, 127 + 0.9999999 is 128


def _unpack_int8(packed: Tensor, shape: torch.Size) -> Tensor:
    many, long = _shape_of_rows(shape)
    factors = packed[: 4 * many].clone().view(torch.float32).view(many, 1)
    rows = packed[4 * many :].view(torch.int8).float().view(many, long) * factors
    return (rows.T if _lies(shape) else rows).reshape(shape)


def _rows(tensor: Tensor) -> Tensor:
    """As a matrix with rows that are not shorter than its columns: each has a factor, which takes four bytes."""
    if _lies(tensor.shape):
        return tensor.flatten(1).T.contiguous()
    return tensor.reshape(_shape_of_rows(tensor.shape))


def _lies(shape: torch.Size) -> bool:
    return len(shape) > 1 and shape[0] > shape[1:].numel()


def _shape_of_rows(shape: torch.Size) -> tuple[int, int]:
    if len(shape) < 2:
        return 1, shape.numel()
    sides = shape[0], shape[1:].numel()
    return min(sides), max(sides)


CODECS = {
    "bfloat16": Codec(_pack_bfloat16, _unpack_bfloat16, lambda shape: 2 * shape.numel()),
    "int8": Codec(_pack_int8, _unpack_int8, lambda shape: 4 * _shape_of_rows(shape)[0] + shape.numel()),
}


class Parcel(NamedTuple):
    """What travels, what the other side makes of it, and what rounding has left over."""

    packed: Tensor
    arrives: State
    residual: State


def wrap(codec: str, new: Mapping[str, Tensor], base: State, residual: Mapping[str, Tensor], seed: int) -> Parcel:
    """A parcel that brings someone who has `base` to `new`; the `residual` of an earlier one goes with it."""
    generator = torch.Generator().manual_seed(seed)
    wished = {name: new[name] - base[name] + residual.get(name, 0.0) for name in sorted(base)}
    parts = [part for tensor in wished.values() for part in CODECS[codec].pack(tensor, generator)]
    packed = torch.cat([part.reshape(-1).view(torch.uint8) for part in parts])
    brought = _contents(codec, packed, base)
    arrives = {name: base[name] + brought[name] for name in base}
    return Parcel(packed, arrives, {name: wished[name] - brought[name] for name in base})


def unwrap(codec: str, packed: Tensor, base: State) -> State:
    """What someone who has `base` makes of a parcel of the right size."""
    brought = _contents(codec, packed, base)
    return {name: base[name] + brought[name] for name in base}


def packed_size(codec: str, like: Mapping[str, Tensor]) -> int:
    """How many bytes a parcel for such tensors has."""
    return sum(CODECS[codec].size(tensor.shape) for tensor in like.values())


def _contents(codec: str, packed: Tensor, like: State) -> State:
    """The numbers in the parcel, in tensors as those of `like`."""
    names = sorted(like)
    parts = torch.split(packed, [CODECS[codec].size(like[name].shape) for name in names])
    return {name: CODECS[codec].unpack(part, like[name].shape) for name, part in zip(names, parts, strict=True)}
