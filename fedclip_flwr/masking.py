"""The sum of vectors without the vectors: one round of secure aggregation, bytes and numbers in and out.

SecAgg (Bonawitz et al., eprint 2017/281) in the neighbourhoods of SecAgg+ (Bell et al., eprint 2020/704), on numbers
modulo 2³². Four steps, each with one message to a site and one back:

    keys      two public keys of each member             →  to the members near it
    shares    its seed and first private key, split      →  each piece encrypted for one of these, and its digest
    vectors   its numbers + its mask ± a mask with each  →  to the server, which adds them up
    reveals   pieces of seeds of those whose vector came, and of private keys of those whose did not

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
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from cryptography.fernet import InvalidToken
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from flwr.common.secure_aggregation.crypto.shamir import combine_shares, create_shares
from flwr.common.secure_aggregation.crypto.symmetric_encryption import decrypt, encrypt, generate_shared_key
from flwr.supercore.primitives.asymmetric import generate_key_pairs
from numpy.typing import NDArray

from fedclip_flwr.errors import one_line

Numbers = NDArray[np.uint32]

FEWEST = 3
"""Of two, each knows the other's vector from the sum."""
SEED, PRIVATE, PUBLIC = 32, 48, 49  # bytes: a mask's seed; a scalar and a compressed point of P-384
SEED_PIECE, PRIVATE_PIECE = 4 + 48, 4 + 64  # an index, and the secret padded to whole blocks of 16
DIGEST = 32
LONGEST_LETTER = 1000

OWN = "name", "context", "step", "private", "seed"
"""What a member holds besides what it knows of others."""


class MaskingError(ValueError):
    """What an honest round does not have; the text says what in one line."""


class LetterError(MaskingError):
    """A letter that can't be opened; `sender` is whose it is."""

    def __init__(self, sender: str, why: str) -> None:
        super().__init__(f"the pieces from {one_line(sender, 64)} {why}")
        self.sender = sender


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


# Masks


def _label(*parts: str) -> bytes:
    return json.dumps(parts).encode()


def _mask(secret: bytes, label: bytes, size: int) -> Numbers:
    key = HKDF(SHA256(), 32, salt=None, info=label).derive(secret)
    stream = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor().update(bytes(4 * size))
    return np.frombuffer(stream, "<u4").astype(np.uint32, copy=False)


def _own_mask(seed: bytes, context: str, name: str, size: int) -> Numbers:
    return _mask(seed, _label("own", context, name), size)


def _pair_mask(secret: bytes, context: str, name: str, other: str, size: int) -> Numbers:
    """What `name` adds for the two; the other's is the same, but for its sign."""
    mask = _mask(secret, _label("pair", context, *sorted((name, other))), size)
    return mask if name < other else np.negative(mask)


# Keys


def _new_private() -> bytes:
    return generate_key_pairs()[0].private_numbers().private_value.to_bytes(PRIVATE, "big")


def _private(key: bytes) -> ec.EllipticCurvePrivateKey:
    return ec.derive_private_key(int.from_bytes(key, "big"), ec.SECP384R1())


def _public(key: bytes) -> bytes:
    return _private(key).public_key().public_bytes(Encoding.X962, PublicFormat.CompressedPoint)


def _point(key: bytes) -> ec.EllipticCurvePublicKey:
    try:
        return ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP384R1(), key)
    except ValueError:
        raise MaskingError("a public key is no point of its curve") from None


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def _digests(pieces: bytes) -> bytes:
    return _digest(pieces[:SEED_PIECE]) + _digest(pieces[SEED_PIECE:])


def _names(names: Iterable[str]) -> str:
    return one_line(", ".join(sorted(names)), 100)


# A site


@dataclass(repr=False)
class Member:
    """A site's side of a round: each step once, in order, and what is no longer needed is forgotten.

    A step that is refused changes nothing.
    """

    name: str
    context: str
    step: str = "shares"
    private: list[bytes] = field(default_factory=list)
    seed: bytes = b""
    publics: dict[str, bytes] = field(default_factory=dict)
    pieces: dict[str, bytes] = field(default_factory=dict)
    """By the member that they came from: a piece of its seed, then one of its private key."""

    @classmethod
    def begin(cls, name: str, context: str) -> Member:
        """A member with new keys; the context names the round, and must be the same for all."""
        return cls(name, context, private=[_new_private(), _new_private()])

    @property
    def public(self) -> bytes:
        """For the pairs' masks, then for encryption."""
        return b"".join(map(_public, self.private))

    def share(self, publics: Mapping[str, bytes]) -> Shares:
        """Of its secrets a piece for each; `publics` are those of all that share, this one included."""
        self._check_step("shares")
        if len(publics) < FEWEST:
            raise MaskingError(f"there are {len(publics)} members to share with, expected {FEWEST} or more")
        if publics.get(self.name) != self.public:
            raise MaskingError("this member's own public keys came back as others")
        if any(len(public) != 2 * PUBLIC for public in publics.values()):
            raise MaskingError("public keys have another size than they should")
        if len({key for public in publics.values() for key in (public[:PUBLIC], public[PUBLIC:])}) < 2 * len(publics):
            raise MaskingError("two public keys are the same")
        seed, order, needed = os.urandom(SEED), sorted(publics), threshold(len(publics))
        split = zip(*(create_shares(secret, needed, len(order)) for secret in (seed, self.private[0])), strict=True)
        pieces = dict(zip(order, map(b"".join, split), strict=True))
        keys = self._encryption_keys({other: publics[other] for other in order if other != self.name})
        letters = {other: encrypt(key, pieces[other] + self._address(self.name, other)) for other, key in keys.items()}
        self.step, self.seed, self.publics = "vectors", seed, dict(publics)
        self.pieces = {self.name: pieces[self.name]}
        return Shares(letters, {other: _digests(piece) for other, piece in pieces.items()}, _digest(seed))

    def mask(self, letters: Mapping[str, bytes], numbers: Numbers) -> Numbers:
        """The numbers, masked; `letters` are the pieces from others, by sender: these have a part in the sum."""
        self._check_step("vectors")
        if unknown := letters.keys() - (self.publics.keys() - {self.name}):
            raise MaskingError(f"pieces came from members that nothing was shared with: {_names(unknown)}")
        if len(letters) + 1 < (needed := threshold(len(self.publics))):
            raise MaskingError(f"pieces came of {len(letters) + 1} members, expected {needed} or more")
        if numbers.dtype != np.uint32 or numbers.ndim != 1:
            raise MaskingError(f"numbers are {numbers.dtype} in {numbers.ndim} dimensions, expected uint32 in one")
        keys = self._encryption_keys({sender: self.publics[sender] for sender in letters})
        pieces = {sender: self._open(sender, keys[sender], letter) for sender, letter in letters.items()}
        masked = numbers + _own_mask(self.seed, self.context, self.name, len(numbers))
        private = _private(self.private[0])
        for other in letters:
            secret = generate_shared_key(private, _point(self.publics[other][:PUBLIC]))
            masked += _pair_mask(secret, self.context, self.name, other, len(numbers))
        self.step, self.private, self.seed, self.pieces = "reveals", [], b"", {**self.pieces, **pieces}
        return masked

    def reveal(self, survivors: Iterable[str], dropped: Iterable[str]) -> dict[str, bytes]:
        """Pieces of the survivors' seeds and of the private keys of the dropped."""
        self._check_step("reveals")
        survivors, dropped = set(survivors), set(dropped)
        if both := survivors & dropped:
            raise MaskingError(f"both pieces are asked of {_names(both)}: that would unmask a single vector")
        if unknown := (survivors | dropped) - self.pieces.keys():
            raise MaskingError(f"pieces are asked that never came: of {_names(unknown)}")
        if self.name not in survivors:
            raise MaskingError("this member is not among those whose vector came, but its vector went")
        if len(survivors) < (needed := max(threshold(len(self.publics)), FEWEST)):
            raise MaskingError(f"vectors of {len(survivors)} members came, expected {needed} or more")
        told = {name: self.pieces[name][:SEED_PIECE] for name in survivors}
        told |= {name: self.pieces[name][SEED_PIECE:] for name in dropped}
        self.step, self.publics, self.pieces = "nothing", {}, {}
        return told

    def dump(self) -> dict[str, Any]:
        """All of it, as a Flower ConfigRecord can hold it."""
        own = {key: getattr(self, key) for key in OWN}
        publics = {"publics": list(self.publics), "publics-of": list(self.publics.values())}
        return own | publics | {"pieces": list(self.pieces), "pieces-of": list(self.pieces.values())}

    @classmethod
    def load(cls, known: Mapping[str, Any]) -> Member:
        publics, pieces = (dict(zip(known[key], known[f"{key}-of"], strict=True)) for key in ("publics", "pieces"))
        return cls(**{key: known[key] for key in OWN}, publics=publics, pieces=pieces)

    def _check_step(self, step: str) -> None:
        if self.step != step:
            raise MaskingError(f"this member is asked for {step}, expected to be asked for {self.step}")

    def _encryption_keys(self, publics: Mapping[str, bytes]) -> dict[str, bytes]:
        private = _private(self.private[1])
        return {other: generate_shared_key(private, _point(public[PUBLIC:])) for other, public in publics.items()}

    def _address(self, sender: str, receiver: str) -> bytes:
        return _label("pieces", self.context, sender, receiver)

    def _open(self, sender: str, key: bytes, letter: bytes) -> bytes:
        """What is in the letter, behind which the server has put the digests that its sender told."""
        letter, digests = letter[: -2 * DIGEST], letter[-2 * DIGEST :]
        try:
            opened = decrypt(key, letter)
        except InvalidToken:
            raise LetterError(sender, "are damaged or not meant for this one") from None
        pieces, address = opened[: SEED_PIECE + PRIVATE_PIECE], opened[SEED_PIECE + PRIVATE_PIECE :]
        if _digests(pieces) != digests:
            raise LetterError(sender, "have other digests than it told")
        if address != self._address(sender, self.name):
            raise LetterError(sender, "are of another round, sender or receiver")
        return pieces


# The server


class Gathering:
    """The server's side of a round: takes what comes from each member, and tells what to send to each after that.

    `join`, `share`, `add` and `reveal` take what came from one member, or raise: then it has dropped out, as if nothing
    had come. `neighbourhoods`, `letters`, `lists` and `sum` end such a step. Vectors are not kept.
    """

    def __init__(self, context: str, size: int, most: int) -> None:
        """Vectors of this size; up to `most` members share with each other."""
        if most < FEWEST:
            raise MaskingError(f"up to {most} members are to share with each other, expected {FEWEST} or more")
        self._context, self._most = context, most
        self._step, self._awaited = "keys", set[str]()
        self._publics: dict[str, bytes] = {}
        self._keys: set[bytes] = set()
        self._near: dict[str, frozenset[str]] = {}
        """Those still in the round that a member shares with, itself included."""
        self._needed: dict[str, int] = {}
        self._shares: dict[str, Shares] = {}
        self._total = np.zeros(size, np.uint32)
        self._survivors: set[str] = set()
        self._pieces: dict[str, dict[str, bytes]] = {}
        """Of each secret, by the member that revealed it."""

    def join(self, name: str, public: bytes) -> None:
        if self._step != "keys" or name in self._publics:
            raise MaskingError("public keys came too late or twice")
        if len(public) != 2 * PUBLIC:
            raise MaskingError(f"public keys have {len(public)} bytes, expected {2 * PUBLIC}")
        own = public[:PUBLIC], public[PUBLIC:]
        for key in own:
            _point(key)
        if own[0] == own[1] or {*own} & self._keys:
            raise MaskingError("a public key is there already")
        self._keys |= {*own}
        self._publics[name] = public

    def neighbourhoods(self) -> dict[str, dict[str, bytes]]:
        """For each member the public keys of those that it is to share with."""
        if len(self._publics) < FEWEST:
            raise MaskingError(f"public keys came from {len(self._publics)} members, expected {FEWEST} or more")
        self._near = neighbours(self._publics, self._most, os.urandom(SEED))
        self._needed = {name: threshold(len(near)) for name, near in self._near.items()}
        self._step, self._awaited = "shares", set(self._near)
        return {name: {other: self._publics[other] for other in sorted(near)} for name, near in self._near.items()}

    def share(self, name: str, shares: Shares) -> None:
        self._check_awaited("shares", name)
        if shares.letters.keys() != self._near[name] - {name} or shares.digests.keys() != self._near[name]:
            raise MaskingError("pieces are not for those that they should be for")
        if any(len(letter) > LONGEST_LETTER for letter in shares.letters.values()):
            raise MaskingError(f"a letter is longer than {LONGEST_LETTER} bytes")
        if {*map(len, shares.digests.values())} != {2 * DIGEST} or len(shares.seed) != DIGEST:
            raise MaskingError("digests have another size than they should")
        self._awaited.remove(name)
        self._shares[name] = shares

    def letters(self) -> dict[str, dict[str, bytes]]:
        """For each member that goes on, the pieces from the others that do."""
        going = set(self._shares)
        while alone := {name for name in going if len(self._near[name] & going) < self._needed[name]}:
            going -= alone  # too few near it could unmask it
        if not going:
            raise MaskingError(f"pieces came from {len(self._shares)} of {len(self._near)} members: too few to go on")
        self._near = {name: self._near[name] & going for name in sorted(going)}
        self._step, self._awaited = "vectors", set(going)
        return {
            name: {sender: self._shares[sender].to(name) for sender in sorted(near - {name})}
            for name, near in self._near.items()
        }

    def add(self, name: str, masked: Numbers) -> None:
        self._check_awaited("vectors", name)
        if masked.dtype != np.uint32 or masked.shape != self._total.shape:
            raise MaskingError(f"a vector is {masked.dtype}{list(masked.shape)}, expected uint32[{len(self._total)}]")
        self._awaited.remove(name)
        self._survivors.add(name)
        self._total += masked

    def lists(self) -> dict[str, tuple[list[str], list[str]]]:
        """For each member whose vector came, those near it whose vectors came, and those whose did not."""
        for name in self._survivors:
            if (came := len(self._list(name)[0])) < (needed := max(self._needed[name], FEWEST)):
                raise MaskingError(f"vectors came of {came} members near {name}, {needed} must: nothing is unmasked")
        self._step, self._awaited = "reveals", set(self._survivors)
        return {name: self._list(name) for name in sorted(self._survivors)}

    def reveal(self, name: str, pieces: Mapping[str, bytes]) -> None:
        self._check_awaited("reveals", name)
        survivors, dropped = self._list(name)
        sizes = dict.fromkeys(survivors, SEED_PIECE) | dict.fromkeys(dropped, PRIVATE_PIECE)
        if {other: len(piece) for other, piece in pieces.items()} != sizes:
            raise MaskingError("pieces are not those that were asked for")
        self._awaited.remove(name)
        for other, piece in pieces.items():
            digests = self._shares[other].digests[name]
            if _digest(piece) != (digests[:DIGEST] if other in survivors else digests[DIGEST:]):
                raise MaskingError("a piece that it revealed is not the one that it was given")
        for other, piece in pieces.items():
            self._pieces.setdefault(other, {})[name] = piece

    def sum(self) -> Numbers:
        """Of the vectors that came; raises if too few pieces did, and may be tried again when more have come."""
        if not self._survivors:
            raise MaskingError("no vector came")
        total, size = self._total.copy(), len(self._total)
        for name, near in self._near.items():
            if name in self._survivors:
                total -= _own_mask(self._secret(name, SEED), self._context, name, size)
            elif others := near & self._survivors:
                private = self._private_of(name)
                for other in others:
                    secret = generate_shared_key(private, _point(self._publics[other][:PUBLIC]))
                    total -= _pair_mask(secret, self._context, other, name, size)
        return total

    def _check_awaited(self, step: str, name: str) -> None:
        if self._step != step or name not in self._awaited:
            raise MaskingError(f"{step} came too late, twice, or from a member that was not asked")

    def _list(self, name: str) -> tuple[list[str], list[str]]:
        near = self._near[name]
        return sorted(near & self._survivors), sorted(near - self._survivors)

    def _private_of(self, name: str) -> ec.EllipticCurvePrivateKey:
        key = self._secret(name, PRIVATE)
        try:
            if _public(key) == self._publics[name][:PUBLIC]:
                return _private(key)
        except ValueError:  # zero, or more than the curve has
            pass
        raise self._bad(name)

    def _secret(self, name: str, size: int) -> bytes:
        pieces, needed = self._pieces.get(name, {}), self._needed[name]
        if len(pieces) < needed:
            raise MaskingError(f"{len(pieces)} members revealed their piece of {one_line(name, 64)}, {needed} must")
        try:
            secret = combine_shares([pieces[other] for other in sorted(pieces)[:needed]])
        except ValueError:
            secret = b""
        if len(secret) != size or (size == SEED and _digest(secret) != self._shares[name].seed):
            raise self._bad(name)
        return secret

    @staticmethod
    def _bad(name: str) -> LetterError:
        return LetterError(name, "do not fit together")
