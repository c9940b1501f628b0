"""The server's side of a round of secure aggregation; what it is: `exchange/secure/masking.py`."""

from __future__ import annotations

import os
from collections.abc import Mapping

import numpy as np
from cryptography.hazmat.primitives.asymmetric import ec

from fedclip_flwr.base.errors import one_line
from fedclip_flwr.exchange.secure.masking import (
    DIGEST,
    FEWEST,
    LONGEST_LETTER,
    PRIVATE,
    PRIVATE_PIECE,
    PUBLIC,
    SEED,
    SEED_PIECE,
    Numbers,
    Shares,
    digest,
    neighbours,
    own_mask,
    pair_mask,
    point,
    private_of,
    public_of,
    threshold,
)
from fedclip_flwr.exchange.secure.protocol import LetterError, MaskingError
from fedclip_flwr.flower.crypto import combine_shares, generate_shared_key


class Collector:
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
            point(key)
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
            if digest(piece) != (digests[:DIGEST] if other in survivors else digests[DIGEST:]):
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
                total -= own_mask(self._secret(name, SEED), self._context, name, size)
            elif others := near & self._survivors:
                private = self._private_of(name)
                for other in others:
                    secret = generate_shared_key(private, point(self._publics[other][:PUBLIC]))
                    total -= pair_mask(secret, self._context, other, name, size)
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
            if public_of(key) == self._publics[name][:PUBLIC]:
                return private_of(key)
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
        if len(secret) != size or (size == SEED and digest(secret) != self._shares[name].seed):
            raise self._bad(name)
        return secret

    @staticmethod
    def _bad(name: str) -> LetterError:
        return LetterError(name, "do not fit together")
