"""A site's side of a round of secure aggregation. `masking.py` describes the protocol."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from cryptography.fernet import InvalidToken

from fedclip_flwr.exchange.secure import masking
from fedclip_flwr.exchange.secure.masking import (
    DIGEST,
    FEWEST,
    PRIVATE_PIECE,
    PUBLIC,
    SEED,
    SEED_PIECE,
    UINT32,
    UINT64,
    Numbers,
    Shares,
)
from fedclip_flwr.exchange.secure.protocol import LetterError, MaskingError
from fedclip_flwr.flower.crypto import create_shares, decrypt, encrypt, generate_shared_key

OWN = "name", "context", "step", "private", "seed"
"""The fields of a member that are not about other members."""


@dataclass(repr=False)
class Member:
    """A site's side of a round: each step once, in order. Secrets are deleted when they are no longer needed.

    A refused step changes nothing.
    """

    name: str
    context: str
    step: str = "shares"
    private: list[bytes] = field(default_factory=list)
    seed: bytes = b""
    publics: dict[str, bytes] = field(default_factory=dict)
    pieces: dict[str, bytes] = field(default_factory=dict)
    """By sender: a piece of its seed, then a piece of its private key."""

    @classmethod
    def begin(cls, name: str, context: str) -> Member:
        """A member with new keys. The context identifies the round, and must be the same for all members."""
        return cls(name, context, private=[masking.new_private(), masking.new_private()])

    @property
    def public(self) -> bytes:
        """The public keys: for the pairwise masks, then for encryption."""
        return b"".join(map(masking.public_of, self.private))

    def share(self, publics: Mapping[str, bytes]) -> Shares:
        """A piece of its secrets for each; `publics` are the keys of all that share, this member included."""
        self._check_step("shares")
        if len(publics) < FEWEST:
            raise MaskingError(f"there are {len(publics)} members to share with, expected {FEWEST} or more")
        if publics.get(self.name) != self.public:
            raise MaskingError("this member's own public keys came back changed")
        if any(len(public) != 2 * PUBLIC for public in publics.values()):
            raise MaskingError("public keys have the wrong size")
        if len({key for public in publics.values() for key in (public[:PUBLIC], public[PUBLIC:])}) < 2 * len(publics):
            raise MaskingError("two public keys are the same")
        seed, order, needed = os.urandom(SEED), sorted(publics), masking.threshold(len(publics))
        split = zip(*(create_shares(secret, needed, len(order)) for secret in (seed, self.private[0])), strict=True)
        pieces = dict(zip(order, map(b"".join, split), strict=True))
        keys = self._encryption_keys({other: publics[other] for other in order if other != self.name})
        letters = {other: encrypt(key, pieces[other] + self._address(self.name, other)) for other, key in keys.items()}
        self.step, self.seed, self.publics = "vectors", seed, dict(publics)
        self.pieces = {self.name: pieces[self.name]}
        return Shares(
            letters, {other: masking.digests_of(piece) for other, piece in pieces.items()}, masking.digest(seed)
        )

    def mask(self, letters: Mapping[str, bytes], numbers: Numbers) -> Numbers:
        """The masked numbers. `letters` are the pieces from the others that take part in the sum, by sender."""
        self._check_step("vectors")
        if unknown := letters.keys() - (self.publics.keys() - {self.name}):
            raise MaskingError(f"pieces came from members that nothing was shared with: {masking.listed(unknown)}")
        if len(letters) + 1 < (needed := masking.threshold(len(self.publics))):
            raise MaskingError(f"pieces came from {len(letters) + 1} members, expected {needed} or more")
        if numbers.dtype not in (UINT32, UINT64) or numbers.ndim != 1:
            raise MaskingError(
                f"numbers are {numbers.dtype} in {numbers.ndim} dimensions, expected uint32 or uint64 in one"
            )
        keys = self._encryption_keys({sender: self.publics[sender] for sender in letters})
        pieces = {sender: self._open(sender, keys[sender], letter) for sender, letter in letters.items()}
        size, dtype = len(numbers), numbers.dtype
        masked = numbers + masking.own_mask(self.seed, self.context, self.name, size, dtype)
        private = masking.private_of(self.private[0])
        for other in letters:
            secret = generate_shared_key(private, masking.point(self.publics[other][:PUBLIC]))
            masked += masking.pair_mask(secret, self.context, self.name, other, size, dtype)
        self.step, self.private, self.seed, self.pieces = "reveals", [], b"", {**self.pieces, **pieces}
        return masked

    def reveal(self, survivors: Iterable[str], dropped: Iterable[str]) -> dict[str, bytes]:
        """Pieces of the survivors' seeds and of the private keys of the dropped members."""
        self._check_step("reveals")
        survivors, dropped = set(survivors), set(dropped)
        if both := survivors & dropped:
            raise MaskingError(
                f"both pieces of {masking.listed(both)} are requested: that would unmask a single vector"
            )
        if unknown := (survivors | dropped) - self.pieces.keys():
            raise MaskingError(f"requested pieces never arrived: those of {masking.listed(unknown)}")
        if self.name not in survivors:
            raise MaskingError("this member is not among the survivors, but it sent its vector")
        if len(survivors) < (needed := max(masking.threshold(len(self.publics)), FEWEST)):
            raise MaskingError(f"vectors of {len(survivors)} members came, expected {needed} or more")
        revealed = {name: self.pieces[name][:SEED_PIECE] for name in survivors}
        revealed |= {name: self.pieces[name][SEED_PIECE:] for name in dropped}
        self.step, self.publics, self.pieces = "nothing", {}, {}
        return revealed

    def dump(self) -> dict[str, Any]:
        """The member as values that a Flower ConfigRecord can hold."""
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
        private = masking.private_of(self.private[1])
        return {
            other: generate_shared_key(private, masking.point(public[PUBLIC:])) for other, public in publics.items()
        }

    def _address(self, sender: str, receiver: str) -> bytes:
        return masking.label("pieces", self.context, sender, receiver)

    def _open(self, sender: str, key: bytes, letter: bytes) -> bytes:
        """The pieces in the letter, to which the server has appended the digests from its sender."""
        letter, digests = letter[: -2 * DIGEST], letter[-2 * DIGEST :]
        try:
            opened = decrypt(key, letter)
        except InvalidToken:
            raise LetterError(sender, "are corrupt or for another member") from None
        pieces, address = opened[: SEED_PIECE + PRIVATE_PIECE], opened[SEED_PIECE + PRIVATE_PIECE :]
        if masking.digests_of(pieces) != digests:
            raise LetterError(sender, "do not match their digests")
        if address != self._address(sender, self.name):
            raise LetterError(sender, "are of another round, sender or receiver")
        return pieces
