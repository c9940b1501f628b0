"""Codecs: the difference between two adapters in fewer bytes.

`bfloat16` keeps 8 bits of each number's mantissa. `int8` takes little more than a byte for each number: an integer from
-127 to 127, and a factor for each row. Rounding is stochastic, so that it is right on average. The rounding error is
returned as a residual, to be added to the next difference (error feedback, arXiv 1901.09847). `float32` is no codec:
whole tensors are sent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fedclip_flwr.base import plugins
from fedclip_flwr.base.tensors import State


class Codec(NamedTuple):
    """Packs a tensor into bytes, unpacks bytes into a tensor of a shape, and gives the size in bytes for a shape."""

    pack: Callable[[Tensor, torch.Generator], list[Tensor]]
    unpack: Callable[[Tensor, torch.Size], Tensor]
    size: Callable[[torch.Size], int]


def _pack_bfloat16(tensor: Tensor, generator: torch.Generator) -> list[Tensor]:
    return [tensor.to(torch.bfloat16)]


def _unpack_bfloat16(packed: Tensor, shape: torch.Size) -> Tensor:
    return packed.clone().view(torch.bfloat16).float().view(shape)  # a clone is aligned


def _pack_int8(tensor: Tensor, generator: torch.Generator) -> list[Tensor]:
    rows = _rows(tensor)
    factors = rows.abs().amax(dim=1, keepdim=True) / 127
    numbers = rows / factors.clamp_min(torch.finfo(torch.float32).tiny)
    rounded = (numbers + torch.rand(rows.shape, generator=generator)).floor()
    return [factors, rounded.clamp(-127, 127).to(torch.int8)]  # after rounding: in float32, 127 + 0.9999999 is 128


def _unpack_int8(packed: Tensor, shape: torch.Size) -> Tensor:
    count, length = _shape_of_rows(shape)
    factors = packed[: 4 * count].clone().view(torch.float32).view(count, 1)
    rows = packed[4 * count :].view(torch.int8).float().view(count, length) * factors
    return (rows.T if _is_tall(shape) else rows).reshape(shape)


def _rows(tensor: Tensor) -> Tensor:
    """The tensor as a matrix with rows at least as long as its columns: each row has a factor of four bytes."""
    if _is_tall(tensor.shape):
        return tensor.flatten(1).T.contiguous()
    return tensor.reshape(_shape_of_rows(tensor.shape))


def _is_tall(shape: torch.Size) -> bool:
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


def packs(codec: str) -> bool:
    """True if differences are packed; with `float32` complete tensors are sent."""
    return codec != "float32"


def codec_of(name: str, chosen: bool = False) -> Codec:
    """The codec of that name, or of a plug-in. `chosen`: see `plugins.load`."""
    return plugins.load("codec", name, CODECS, lambda found: isinstance(found, Codec), "an exchange.Codec", chosen)


class Payload(NamedTuple):
    """The bytes to send, the state that the receiver decodes from them, and the rounding error."""

    packed: Tensor
    decoded: State
    residual: State


def wrap(codec: str, new: Mapping[str, Tensor], base: State, residual: Mapping[str, Tensor], seed: int) -> Payload:
    """A payload from which a receiver with `base` gets `new`; adds the `residual` of an earlier payload."""
    generator = torch.Generator().manual_seed(seed)
    target = {name: new[name] - base[name] + residual.get(name, 0.0) for name in sorted(base)}
    parts = [part for tensor in target.values() for part in codec_of(codec).pack(tensor, generator)]
    packed = torch.cat([part.reshape(-1).view(torch.uint8) for part in parts])
    difference = _contents(codec, packed, base)
    decoded = {name: base[name] + difference[name] for name in base}
    return Payload(packed, decoded, {name: target[name] - difference[name] for name in base})


def unwrap(codec: str, packed: Tensor, base: State) -> State:
    """The state that a receiver with `base` decodes from a payload, which must have the right size."""
    difference = _contents(codec, packed, base)
    return {name: base[name] + difference[name] for name in base}


def packed_size(codec: str, like: Mapping[str, Tensor]) -> int:
    """The size in bytes of a payload for tensors like these."""
    return sum(codec_of(codec).size(tensor.shape) for tensor in like.values())


def _contents(codec: str, packed: Tensor, like: State) -> State:
    """The difference in the payload, as tensors with the shapes of `like`."""
    names, how = sorted(like), codec_of(codec)
    parts = torch.split(packed, [how.size(like[name].shape) for name in names])
    return {name: how.unpack(part, like[name].shape) for name, part in zip(names, parts, strict=True)}
