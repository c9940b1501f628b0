"""The sum of vectors without the vectors: secure aggregation, bytes and numbers in and out.

SecAgg (Bonawitz et al., eprint 2017/281) in the neighbourhoods of SecAgg+ (Bell et al., eprint 2020/704), on numbers
modulo 2³². Four steps, each with one message to a site and one back:

    keys      two public keys of each member             →  to the members near it
    shares    its seed and first private key, split      →  each piece encrypted for one of these, and its digest
    vectors   its numbers + its mask ± a mask with each  →  to the server, which adds them up
    reveals   pieces of seeds of those whose vector came, and of private keys of those whose did not

A site's side is in `member.py`, the server's in `server/collector.py`; here is what both need.

This hides each vector from a server that follows the protocol, whatever it makes of what it sees, even together with
members near that one, if they are fewer than the threshold. It does not from a server that invents members or tells
each another story: who the members are is known from the server only. A member that spoils a step is found out by the
digests, or by those whose letters from it can't be opened; but nobody can tell a bad vector from a good one.

Deviations: no signatures and no round to compare what the server told (both are against one that lies), but a member
refuses what no honest server asks for. Masks are keystream of AES-256-CTR under a key by HKDF-SHA256, for those of
Flower have 2³² seeds at most. Who drops out before its pieces are there has no part in the rest, so that nobody needs
pieces that never were.
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

Numbers = NDArray[np.uint32]

FEWEST = 3
"""Of two, each knows the other's vector from the sum."""
SEED, PRIVATE, PUBLIC = 32, 48, 49  # bytes: a mask's seed; a scalar and a compressed point of P-384
SEED_PIECE, PRIVATE_PIECE = 4 + 48, 4 + 64  # an index, and the secret padded to whole blocks of 16
DIGEST = 32
LONGEST_LETTER = 1000


class Shares(NamedTuple):
    """What a member gives away: a letter for each of the others; the digests of both pieces for each member, itself
    included; that of its seed."""

    letters: Mapping[str, bytes]
    digests: Mapping[str, bytes]
    seed: bytes

    def to(self, name: str) -> bytes:
        """What the server sends on."""
        return self.letters[name] + self.digests[name]


def threshold(sharing: int) -> int:
    """How many pieces give a secret that is split among so many: so many that no two such groups are disjoint."""
    return sharing // 2 + 1


def neighbours(names: Iterable[str], most: int, seed: bytes) -> dict[str, frozenset[str]]:
    """Whom each shares with, itself included: all, if they are at most so many, else those next to it in a ring."""
    ring = sorted(names, key=lambda name: hashlib.sha256(seed + name.encode()).digest())
    reach = (most - 1) // 2
    if len(ring) <= most:
        return {name: frozenset(ring) for name in ring}
    near = range(-reach, reach + 1)
    return {name: frozenset(ring[(i + away) % len(ring)] for away in near) for i, name in enumerate(ring)}


# Numbers


def finest_step(members: int, bound: float) -> float:
    """The least power of two in multiples of which the sum of so many numbers within ±bound stays below 2³¹."""
    step = 2.0 ** math.frexp(members * bound / 2**31)[1]
    while members * math.ceil(bound / step) >= 2**31:
        step *= 2
    return step


def quantise(update: NDArray[np.floating[Any]], step: float, bound: float) -> Numbers:
    """Whole multiples of the step, the nearest ones (of two, the even one), of the numbers cut off at ±bound."""
    if not np.isfinite(update).all():
        raise MaskingError("an update has numbers that are not finite")
    cut = np.clip(update.astype(np.float64), -bound, bound)
    return np.rint(cut / step).astype(np.int32).view(np.uint32)


def dequantise(total: Numbers, step: float) -> NDArray[np.float64]:
    """What a sum of such multiples comes to: exactly, if the step is a power of two."""
    return total.view(np.int32).astype(np.float64) * step


def flat(update: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([update[name].reshape(-1) for name in sorted(update)])


def unflat(numbers: Tensor, like: Mapping[str, Tensor]) -> State:
    parts = torch.split(numbers, [like[name].numel() for name in sorted(like)])
    return {name: part.view(like[name].shape) for name, part in zip(sorted(like), parts, strict=True)}


# Masks


def label(*parts: str) -> bytes:
    return json.dumps(parts).encode()


def _mask(secret: bytes, label: bytes, size: int) -> Numbers:
    key = HKDF(SHA256(), 32, salt=None, info=label).derive(secret)
    stream = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor().update(bytes(4 * size))
    return np.frombuffer(stream, "<u4").astype(np.uint32, copy=False)


def own_mask(seed: bytes, context: str, name: str, size: int) -> Numbers:
    return _mask(seed, label("own", context, name), size)


def pair_mask(secret: bytes, context: str, name: str, other: str, size: int) -> Numbers:
    """What `name` adds for the two; the other's is the same, but for its sign."""
    mask = _mask(secret, label("pair", context, *sorted((name, other))), size)
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
        raise MaskingError("a public key is no point of its curve") from None


def digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def digests_of(pieces: bytes) -> bytes:
    return digest(pieces[:SEED_PIECE]) + digest(pieces[SEED_PIECE:])


def listed(names: Iterable[str]) -> str:
    return one_line(", ".join(sorted(names)), 100)
