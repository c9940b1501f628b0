"""Secure aggregation: the sum of vectors without the vectors, as functions of bytes and numbers.

SecAgg (Bonawitz et al., eprint 2017/281) with the neighbourhoods of SecAgg+ (Bell et al., eprint 2020/704), on numbers
modulo 2³² (`uint32`: updates, in steps) or 2⁶⁴ (`uint64`: sums, exact). Four steps, each with one message to a site and
one reply:

    keys      two public keys of each member             →  to its neighbours
    shares    its seed and first private key, split      →  each piece encrypted for one neighbour, and its digest
    vectors   its numbers + its mask ± a mask with each  →  to the server, which adds them up
    reveals   pieces of the seeds of members whose vector arrived, and of the private keys of the others

The site's side is in `member.py`, the server's in `server/collector.py`; this module has what both need.

This hides each vector from an honest-but-curious server, even if it colludes with neighbours of that member, as long as
these are fewer than the threshold. It does not protect against a server that invents members or lies about them: sites
know the members only from the server. A member that disrupts a step is identified by the digests, or by the receivers
that can't open its letters. A false vector can't be told from a true one.

Deviations: no signatures and no consistency check of the server's lists (both are against a lying server), but a member
refuses what no honest server asks for. Masks are a keystream of AES-256-CTR with a key from HKDF-SHA256: Flower's have
only 2³² seeds. A member that drops out before its pieces arrive is excluded from the rest, so that missing pieces are
never needed.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from numpy.typing import NDArray
from torch import Tensor

from fedclip_flwr.base.errors import one_line
from fedclip_flwr.base.tensors import State
from fedclip_flwr.exchange.secure.protocol import MaskingError
from fedclip_flwr.flower.crypto import generate_key_pairs

Numbers = NDArray[np.unsignedinteger[Any]]
NumberType = np.dtype[np.unsignedinteger[Any]]

UINT32: NumberType = np.dtype(np.uint32)
UINT64: NumberType = np.dtype(np.uint64)
"""The types of masked updates, and of masked sums."""
FEWEST = 3
"""Minimum number of members: with two, each learns the other's vector from the sum."""
SEED, PRIVATE, PUBLIC = 32, 48, 49  # bytes: a mask's seed; a scalar and a compressed point of P-384
SEED_PIECE, PRIVATE_PIECE = 4 + 48, 4 + 64  # an index, and the secret padded to whole blocks of 16
DIGEST = 32
LONGEST_LETTER = 1000


class Shares(NamedTuple):
    """A member's output of the step `shares`: a letter for each of the others; the digests of both pieces for each
    member, itself included; the digest of its seed."""

    letters: Mapping[str, bytes]
    digests: Mapping[str, bytes]
    seed: bytes

    def to(self, name: str) -> bytes:
        """The letter and the digests that the server forwards to the member `name`."""
        return self.letters[name] + self.digests[name]


def threshold(sharing: int) -> int:
    """How many of `sharing` pieces restore a secret: a majority, so that no two groups of this size are disjoint."""
    return sharing // 2 + 1


def neighbours(names: Iterable[str], most: int, seed: bytes) -> dict[str, frozenset[str]]:
    """The members that each shares with, itself included: all, if at most `most`, else the nearest in a ring."""
    ring = sorted(names, key=lambda name: hashlib.sha256(seed + name.encode()).digest())
    reach = (most - 1) // 2
    if len(ring) <= most:
        return {name: frozenset(ring) for name in ring}
    near = range(-reach, reach + 1)
    return {name: frozenset(ring[(i + away) % len(ring)] for away in near) for i, name in enumerate(ring)}


# Numbers


def finest_step(members: int, bound: float) -> float:
    """The finest power of two as a step with which the sum of `members` numbers within ±bound stays below 2³¹ steps."""
    step = 2.0 ** math.frexp(members * bound / 2**31)[1]
    while members * math.ceil(bound / step) >= 2**31:
        step *= 2
    return step


def quantise(update: NDArray[np.floating[Any]], step: float, bound: float) -> Numbers:
    """The numbers, clipped to ±bound, as integer multiples of the step, rounded half to even."""
    if not np.isfinite(update).all():
        raise MaskingError("an update has numbers that are not finite")
    clipped = np.clip(update.astype(np.float64), -bound, bound)
    return np.rint(clipped / step).astype(np.int32).view(np.uint32)


def dequantise(total: Numbers, step: float) -> NDArray[np.float64]:
    """The value of a sum of such multiples, exact if the step is a power of two."""
    return total.view(np.int32).astype(np.float64) * step


def unsigned(sums: Mapping[str, Tensor]) -> Numbers:
    """Tensors of int64 as numbers modulo 2⁶⁴."""
    return flat(sums).numpy().view(UINT64)


def signed(total: Numbers, like: Mapping[str, Tensor]) -> State:
    """The tensors whose numbers these are, exact if they fit into int64."""
    return unflat(torch.from_numpy(total.view(np.int64)), like)


def flat(update: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([update[name].reshape(-1) for name in sorted(update)])


def unflat(numbers: Tensor, like: Mapping[str, Tensor]) -> State:
    parts = torch.split(numbers, [like[name].numel() for name in sorted(like)])
    return {name: part.view(like[name].shape) for name, part in zip(sorted(like), parts, strict=True)}


# Masks


def label(*parts: str) -> bytes:
    return json.dumps(parts).encode()


def _mask(secret: bytes, label: bytes, size: int, dtype: NumberType) -> Numbers:
    key = HKDF(SHA256(), 32, salt=None, info=label).derive(secret)
    stream = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor().update(bytes(dtype.itemsize * size))
    return np.frombuffer(stream, dtype.newbyteorder("<")).astype(dtype, copy=False)


def own_mask(seed: bytes, context: str, name: str, size: int, dtype: NumberType) -> Numbers:
    return _mask(seed, label("own", context, name), size, dtype)


def pair_mask(secret: bytes, context: str, name: str, other: str, size: int, dtype: NumberType) -> Numbers:
    """The mask that `name` adds for the pair; the other member's has the opposite sign."""
    mask = _mask(secret, label("pair", context, *sorted((name, other))), size, dtype)
    return mask if name < other else np.negative(mask)


# Keys


def new_private() -> bytes:
    return generate_key_pairs()[0].private_numbers().private_value.to_bytes(PRIVATE, "big")


def private_of(key: bytes) -> ec.EllipticCurvePrivateKey:
    return ec.derive_private_key(int.from_bytes(key, "big"), ec.SECP384R1())


def public_of(key: bytes) -> bytes:
    return private_of(key).public_key().public_bytes(Encoding.X962, PublicFormat.CompressedPoint)


def point(key: bytes) -> ec.EllipticCurvePublicKey:
    try:
        return ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP384R1(), key)
    except ValueError:
        raise MaskingError("a public key is not a point on its curve") from None


def digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def digests_of(pieces: bytes) -> bytes:
    return digest(pieces[:SEED_PIECE]) + digest(pieces[SEED_PIECE:])


def listed(names: Iterable[str]) -> str:
    return one_line(", ".join(sorted(names)), 100)
