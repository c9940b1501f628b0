"""The server's arithmetic in a round of secure aggregation; `exchange/secure/masking.py` explains the protocol."""

from __future__ import annotations

import os
from collections.abc import Mapping

import numpy as np
from cryptography.hazmat.primitives.asymmetric import ec

from fedclip_flwr.base.errors import one_line
from fedclip_flwr.exchange.secure import masking
from fedclip_flwr.exchange.secure.masking import UINT32, Numbers, NumberType, Shares
from fedclip_flwr.exchange.secure.protocol import LetterError, MaskingError
from fedclip_flwr.flower.crypto import combine_shares, generate_shared_key


class Collector:
    """The server's side of a round: collects the members' answers step by step, and makes what is sent to them next.

    `join`, `share`, `add` and `reveal` take one member's answer; if they raise, the member has dropped out, as if it
    had not answered. `neighbourhoods`, `letters`, `lists` and `sum` end these steps. Vectors are not kept.
    """

    def __init__(self, context: str, size: int, most: int, dtype: NumberType = UINT32) -> None:
        """Vectors have `size` numbers of this type; each member shares with up to `most`, itself included."""
        if most < masking.FEWEST:
            raise MaskingError(f"up to {most} members share with each other, expected {masking.FEWEST} or more")
        self._context, self._most = context, most
        self._step, self._awaited = "keys", set[str]()
        self._publics: dict[str, bytes] = {}
        self._keys: set[bytes] = set()
        self._near: dict[str, frozenset[str]] = {}
        """For each member those in the round that it shares with, itself included."""
        self._needed: dict[str, int] = {}
        self._shares: dict[str, Shares] = {}
        self._total = np.zeros(size, dtype)
        self._survivors: set[str] = set()
        self._pieces: dict[str, dict[str, bytes]] = {}
        """The pieces of each member's secret, by the member that revealed them."""

    def join(self, name: str, public: bytes) -> None:
        if self._step != "keys" or name in self._publics:
            raise MaskingError("public keys arrived too late or twice")
        if len(public) != 2 * masking.PUBLIC:
            raise MaskingError(f"public keys have {len(public)} bytes, expected {2 * masking.PUBLIC}")
        own = public[: masking.PUBLIC], public[masking.PUBLIC :]
        for key in own:
            masking.point(key)
        if own[0] == own[1] or {*own} & self._keys:
            raise MaskingError("duplicate public key")
        self._keys |= {*own}
        self._publics[name] = public

    def neighbourhoods(self) -> dict[str, dict[str, bytes]]:
        """For each member the public keys of those that it shares with."""
        if len(self._publics) < masking.FEWEST:
            raise MaskingError(f"public keys came from {len(self._publics)} members, expected {masking.FEWEST} or more")
        self._near = masking.neighbours(self._publics, self._most, os.urandom(masking.SEED))
        self._needed = {name: masking.threshold(len(near)) for name, near in self._near.items()}
        self._step, self._awaited = "shares", set(self._near)
        return {name: {other: self._publics[other] for other in sorted(near)} for name, near in self._near.items()}

    def share(self, name: str, shares: Shares) -> None:
        self._check_awaited("shares", name)
        if shares.letters.keys() != self._near[name] - {name} or shares.digests.keys() != self._near[name]:
            raise MaskingError("pieces are addressed to the wrong members")
        if any(len(letter) > masking.LONGEST_LETTER for letter in shares.letters.values()):
            raise MaskingError(f"a letter is longer than {masking.LONGEST_LETTER} bytes")
        if {*map(len, shares.digests.values())} != {2 * masking.DIGEST} or len(shares.seed) != masking.DIGEST:
            raise MaskingError("digests have the wrong size")
        self._awaited.remove(name)
        self._shares[name] = shares

    def letters(self) -> dict[str, dict[str, bytes]]:
        """For each member still in the round, the pieces from the others."""
        active = set(self._shares)
        while isolated := {name for name in active if len(self._near[name] & active) < self._needed[name]}:
            active -= isolated  # too few of its neighbours could unmask it
        if not active:
            raise MaskingError(f"pieces came from {len(self._shares)} of {len(self._near)} members: too few")
        self._near = {name: self._near[name] & active for name in sorted(active)}
        self._step, self._awaited = "vectors", set(active)
        return {
            name: {sender: self._shares[sender].to(name) for sender in sorted(near - {name})}
            for name, near in self._near.items()
        }

    def add(self, name: str, masked: Numbers) -> None:
        self._check_awaited("vectors", name)
        if masked.dtype != (dtype := self._total.dtype) or masked.shape != self._total.shape:
            raise MaskingError(f"a vector is {masked.dtype}{list(masked.shape)}, expected {dtype}[{len(self._total)}]")
        self._awaited.remove(name)
        self._survivors.add(name)
        self._total += masked

    def lists(self) -> dict[str, tuple[list[str], list[str]]]:
        """For each member whose vector arrived, its neighbours whose vectors arrived, and those whose did not."""
        for name in self._survivors:
            if (arrived := len(self._list(name)[0])) < (needed := max(self._needed[name], masking.FEWEST)):
                raise MaskingError(f"{arrived} vectors arrived near {name}, expected {needed}: nothing is unmasked")
        self._step, self._awaited = "reveals", set(self._survivors)
        return {name: self._list(name) for name in sorted(self._survivors)}

    def reveal(self, name: str, pieces: Mapping[str, bytes]) -> None:
        self._check_awaited("reveals", name)
        survivors, dropped = self._list(name)
        sizes = dict.fromkeys(survivors, masking.SEED_PIECE) | dict.fromkeys(dropped, masking.PRIVATE_PIECE)
        if {other: len(piece) for other, piece in pieces.items()} != sizes:
            raise MaskingError("pieces are not those requested")
        self._awaited.remove(name)
        for other, piece in pieces.items():
            digests = self._shares[other].digests[name]
            if masking.digest(piece) != (
                digests[: masking.DIGEST] if other in survivors else digests[masking.DIGEST :]
            ):
                raise MaskingError("a revealed piece is not the one that was shared")
        for other, piece in pieces.items():
            self._pieces.setdefault(other, {})[name] = piece

    def sum(self) -> Numbers:
        """The sum of the vectors; raises if pieces are missing, and may be called again when more have arrived."""
        if not self._survivors:
            raise MaskingError("no vector arrived")
        total = self._total.copy()
        size, dtype = len(total), total.dtype
        for name, near in self._near.items():
            if name in self._survivors:
                total -= masking.own_mask(self._secret(name, masking.SEED), self._context, name, size, dtype)
            elif others := near & self._survivors:
                private = self._private_of(name)
                for other in others:
                    secret = generate_shared_key(private, masking.point(self._publics[other][: masking.PUBLIC]))
                    total -= masking.pair_mask(secret, self._context, other, name, size, dtype)
        return total

    def _check_awaited(self, step: str, name: str) -> None:
        if self._step != step or name not in self._awaited:
            raise MaskingError(f"{step} arrived too late, twice, or from a member that was not asked")

    def _list(self, name: str) -> tuple[list[str], list[str]]:
        near = self._near[name]
        return sorted(near & self._survivors), sorted(near - self._survivors)

    def _private_of(self, name: str) -> ec.EllipticCurvePrivateKey:
        key = self._secret(name, masking.PRIVATE)
        try:
            if masking.public_of(key) == self._publics[name][: masking.PUBLIC]:
                return masking.private_of(key)
        except ValueError:  # zero, or beyond the curve's order
            pass
        raise self._inconsistent(name)

    def _secret(self, name: str, size: int) -> bytes:
        pieces, needed = self._pieces.get(name, {}), self._needed[name]
        if len(pieces) < needed:
            raise MaskingError(f"{len(pieces)} members revealed their piece of {one_line(name, 64)}, expected {needed}")
        try:
            secret = combine_shares([pieces[other] for other in sorted(pieces)[:needed]])
        except ValueError:
            secret = b""
        if len(secret) != size or (size == masking.SEED and masking.digest(secret) != self._shares[name].seed):
            raise self._inconsistent(name)
        return secret

    @staticmethod
    def _inconsistent(name: str) -> LetterError:
        return LetterError(name, "are inconsistent")
